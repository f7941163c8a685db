"""The recipes are i1's, and a configuration says only in what it differs from the one below."""

from itertools import pairwise
from pathlib import Path

import fsspec
import jax
import pytest

from pipeline.errors import EvenmixError
from pipeline.presets import PRESETS
from train.baselines import BaselineConfig, BaselineKind
from train.config import load_config
from train.flux2_vae import FLUX2_VAE, Flux2Codec
from train.model import ModelConfig, abstract_params
from train.recipe import recipe_names

DEMO = Path(__file__).parent.parent / "demo/train.toml"
BASELINES: list[BaselineKind] = ["cross_attention", "single_stream", "dual_stream"]


def shape_of(recipe: str) -> ModelConfig:
    """The network of a recipe; no weights of a codec are needed for that."""
    return load_config(recipe).model_config_for(Flux2Codec(FLUX2_VAE, {}))


def test_every_recipe_is_whole_and_fits_its_mixture() -> None:
    stages = [f"i1-{size}-{side}" for size in ("1b", "3b") for side in (256, 512, 1024)]
    baselines = [kind.replace("_", "-") for kind in BASELINES]
    assert recipe_names() == sorted([*stages, *baselines, "quick-start"])
    for name in recipe_names():
        config = load_config(name)
        assert config.output == f"runs/{name}"
        assert config.resolution == PRESETS[Path(config.mixture).name].resolution
        assert config.batch_size % (config.mesh.fsdp * config.accumulate) == 0
        assert shape_of(name).dtype == "bfloat16"


@pytest.mark.parametrize(("size", "published", "width"), [("1b", 1.036, 1152), ("3b", 3.166, 2016)])
def test_the_stages_are_i1s_and_each_goes_on_from_the_one_before(
    size: str, published: float, width: int
) -> None:
    shape = shape_of(f"i1-{size}-256")
    kept = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(shape)))
    # i1 counts what nothing depends on: its timestep embedder, the last block's text after the
    # attention (MLP, projection and queries), and a table of positions.
    inner = int(2 / 3 * 4 * width)
    unused = 256 * width + width + width**2 + width
    unused += (3 * inner * width + 2 * inner + width) + 2 * (width**2 + width)
    unused += shape.grid_size**2 * width
    assert round((kept + unused) / 1e9, 3) == published

    stages = [load_config(f"i1-{size}-{side}") for side in (256, 512, 1024)]
    assert [(s.steps, s.batch_size, s.time_shift) for s in stages] == [
        (2_000_000, 512, 1.0),
        (2_500_000, 512, 1.0),
        (2_800_000, 128, 0.3),
    ]
    assert stages[0].init is None
    for before, after in pairwise(stages):
        assert after.init == before.output
        assert (after.model, after.text, after.latent) == (before.model, before.text, before.latent)
        assert (after.optimiser, after.seed) == (before.optimiser, before.seed)


@pytest.mark.parametrize("kind", BASELINES)
def test_the_baselines_are_those_of_the_experiments(kind: BaselineKind) -> None:
    """Their numbers of weights are counted in test_train_baselines.py."""
    recipe = kind.replace("_", "-")
    assert load_config(recipe).steps == 500_000
    assert shape_of(recipe) == BaselineConfig(
        input_size=32,
        image_resolution=256,
        in_channels=32,
        hidden_size=1152,
        depth=29,
        num_heads=16,
        text_embed_dim=2304,
        text_num_tokens=256,
        dtype="bfloat16",
        kind=kind,
    )


def test_without_a_commit_of_t5gemma_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvenmixError, match=r"google/t5gemma-2b-2b-ul2-it is no .* set revision"):
        load_config("quick-start").text_encoder()


def test_what_is_nearer_wins_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "i1-3b-512"\nseed = 7\n[text]\nrevision = "r"\n[model]\ndepth = 5\n')
    mine, base = load_config(str(path), output="o", steps=None), load_config("i1-3b-512")
    assert (mine.seed, mine.output, mine.steps) == (7, "o", base.steps)
    assert mine.model == base.model.model_copy(update={"depth": 5})
    assert mine.text == base.text.model_copy(update={"revision": "r"})
    # The run is that of the whole configuration, however it is divided among files.
    changed = {"seed": 7, "model": mine.model, "text": mine.text}
    assert mine.identity() == base.model_copy(update=changed).identity()


def test_a_table_of_another_kind_takes_the_others_place(tmp_path: Path) -> None:
    (tmp_path / "below.toml").write_text('base = "i1-1b-256"\n[text]\nrevision = "r"\n')
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "below.toml"\n[text]\nencoder = "bytes"\nnum_tokens = 8\nembed_dim = 16\n'
    )
    assert load_config(str(path)).text.model_dump() == {
        "num_tokens": 8,
        "embed_dim": 16,
        "dropout": 0.1,
        "trim_to": [],
        "encoder": "bytes",
    }


def test_a_base_is_found_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "below.toml").write_text(DEMO.read_text())
    (tmp_path / "sub/mine.toml").write_text('base = "../below.toml"\nseed = 1\n')
    monkeypatch.chdir(tmp_path)
    assert load_config("sub/mine.toml").seed == 1

    store = fsspec.filesystem("memory")
    store.pipe("/runs/below.toml", DEMO.read_bytes())
    store.pipe("/runs/sub/mine.toml", b'base = "../below.toml"\nseed = 2\n')
    assert load_config("memory://runs/sub/mine.toml").seed == 2
    (tmp_path / "far.toml").write_text('base = "memory://runs/sub/mine.toml"\nsteps = 3\n')
    far = load_config("far.toml")
    assert (far.seed, far.steps) == (2, 3)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ('"i1-3b-265"', r"mine\.toml: base: 'i1-3b-265' is no recipe; did you mean 'i1-3b-256'\?"),
        ('"x.toml"', r"mine\.toml: base: .*x\.toml does not exist"),
        ('"mine.toml"', r"mine\.toml: base: .*mine\.toml builds on itself"),
        ('"../a/other.toml"', r"mine\.toml: base: .*other\.toml: base: .*mine\.toml builds on its"),
        ("3", r"mine\.toml: base is 3; name a recipe or a file"),
    ],
)
def test_a_base_that_is_none_is_told(tmp_path: Path, base: str, message: str) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "other.toml").write_text('base = "../a/mine.toml"')
    (folder / "mine.toml").write_text(f"base = {base}")
    with pytest.raises(EvenmixError, match=message):
        load_config(str(folder / "mine.toml"))


def test_a_mistake_names_the_file_that_has_it(tmp_path: Path) -> None:
    path, below = tmp_path / "mine.toml", tmp_path / "below.toml"
    below.write_text(
        'base = "i1-1b-256"\nlog_every_steps = 0\n[model]\ndept = 3\n[text]\ntrim_to = [0]\n'
    )
    path.write_text(
        'base = "below.toml"\nstep = 3\n[model]\nnum_heads = -1\n[latent]\nencoder = "pixels"\n'
    )
    with pytest.raises(EvenmixError) as caught:
        load_config(str(path), seed=-1)
    first, *mistakes = str(caught.value).split("\n")
    assert first == f"{path} has 7 mistakes:"
    in_below = f" (in {below})"
    assert {m.strip() for m in mistakes} == {
        "seed: Input should be greater than or equal to 0",
        f"log_every_steps: Input should be greater than 0{in_below}",
        "model.i1.num_heads: Input should be greater than 0",
        f"model.i1.dept: unknown key; did you mean 'depth'?{in_below}",
        "text.t5gemma: trim_to must be increasing, each length above 0 and below num_tokens"
        + in_below,
        # The base has a value for it, which went with the rest of its table.
        "latent.pixels.downsampling: Field required",
        "step: unknown key; did you mean 'steps'?",
    }
