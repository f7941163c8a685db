"""A recipe is right as a whole or is refused with every mistake and the way out."""

from fractions import Fraction
from pathlib import Path

import pytest

from pipeline.catalog import CATALOG
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe, SourceCaptions, VllmCaptions, load_recipe

GOOD = """
root = "corpus"
[datasets.cats]
layout = "folder"
source = "cats"
licence = "CC0 1.0"
[datasets.dogs]
layout = "parquet"
source = "dogs/*.parquet"
licence = "CC0 1.0"
id_rule = "{id}"
[captions.own]
engine = "source"
templates.cats = "A photo of {text}."
[mixture]
name = "small"
resolution = 256
captions = "own"
"""


def load(folder: Path, text: str, **overrides: object) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return load_recipe(str(folder / "recipe.toml"), overrides)


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(EvenmixError) as caught:
        load(folder, text)
    return str(caught.value).splitlines()


def test_a_good_recipe_has_its_values_and_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.root == "corpus"
    assert recipe.seed == 0
    assert recipe.images.min_short_edge_px == 256
    assert recipe.datasets["cats"] == Dataset(layout="folder", source="cats", licence="CC0 1.0")
    assert recipe.captions == {
        "own": SourceCaptions(engine="source", templates={"cats": "A photo of {text}."})
    }
    assert recipe.mixture_datasets() == ["cats", "dogs"]


def test_the_engine_decides_what_a_caption_set_may_say(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD + '[captions.model]\nengine = "vllm"\nmax_tokens = 9\n')
    assert recipe.captions["model"] == VllmCaptions(engine="vllm", max_tokens=9)


def test_caption_sets_have_exact_shares_by_dataset(tmp_path: Path) -> None:
    text = GOOD.replace(
        'captions = "own"', 'captions = {own = 0.3, short = 0.1}\ncaptions_of = {dogs = "short"}'
    )
    recipe = load(tmp_path, text + '[captions.short]\nengine = "source"\n')
    mixture = recipe.mixture
    assert mixture.caption_sets("cats") == {"own": Fraction(3, 4), "short": Fraction(1, 4)}
    assert mixture.caption_sets("dogs") == {"short": Fraction(1)}
    assert mixture.all_caption_sets(["dogs"]) == ["short"]
    assert recipe.datasets_of_set("own") == ["cats"]
    assert recipe.datasets_of_set("short") == ["cats", "dogs"]


def test_a_filter_says_what_it_asks_for_and_where(tmp_path: Path) -> None:
    text = GOOD + (
        "[[mixture.filters]]\ncolumn = 'quality.score'\nat_least = 0.5\nat_most = 1_234_567\n"
        "[[mixture.filters]]\ncolumn = 'licence'\none_of = ['CC0 1.0', 'MIT']\n"
    )
    score, licence = load(tmp_path, text).mixture.filters
    assert str(score) == "quality.score >= 0.5 and <= 1,234,567"
    assert (score.folder, score.column_name) == ("attributes/quality", "score")
    assert str(licence) == "licence in CC0 1.0, MIT"
    assert (licence.folder, licence.column_name) == ("images", "licence")


def test_open_clip_wants_thresholds_of_its_own(tmp_path: Path) -> None:
    text = GOOD + '[dedup]\nmodel = "open_clip"\nopen_clip_model = "ViT-B-32"\n'
    _, line = mistakes(tmp_path, text)
    assert "dedup.model = 'open_clip' measures" in line
    assert "give cats, dogs a threshold" in line
    cats = 'source = "cats"\nthreshold = 0.95'
    _, line = mistakes(tmp_path, text.replace('source = "cats"', cats))
    assert "give dogs a threshold" in line
    exact = text.replace('source = "cats"', cats).replace(
        'id_rule = "{id}"', 'id_rule = "{id}"\nduplicates = "exact"'
    )
    assert load(tmp_path, exact).datasets["cats"].threshold == 0.95
    pair = '[[dedup.pairs]]\nbetween = ["dogs", "dogs"]\nduplicates = "near"\n'
    _, line = mistakes(tmp_path, exact + pair)
    assert "give dogs a threshold" in line
    load(tmp_path, exact + pair + "threshold = 0.9\n")


def test_overrides_replace_values_and_none_does_not(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, GOOD, **{"root": "other", "images.max_pixels": 5, "mixture.resolution": None}
    )
    assert (recipe.root, recipe.images.max_pixels, recipe.mixture.resolution) == ("other", 5, 256)


def test_all_mistakes_come_at_once_with_a_suggestion_for_each_unknown_key(tmp_path: Path) -> None:
    text = (
        GOOD.replace("licence", "license", 1)
        .replace('layout = "parquet"', 'layout = "csv"')
        .replace("templates", "template")
        .replace("resolution = 256", 'resolution = "big"\nmin_short_edge = 3')
    )
    assert mistakes(tmp_path, "sead = 1\n" + text + "[zebra]\n") == [
        f"{tmp_path}/recipe.toml has 8 mistakes:",
        "  datasets.cats.licence: Field required",
        "  datasets.cats.license: unknown key; did you mean 'licence'?",
        "  datasets.dogs.layout: Input should be 'folder', 'parquet', 'webdataset', 'tar', "
        "'url_list' or 'sqlite'",
        "  captions.own.source.template: unknown key; did you mean 'templates'?",
        "  mixture.resolution: Input should be a valid integer, unable to parse string as an "
        "integer",
        "  mixture.min_short_edge: unknown key; did you mean 'min_short_edge_px'?",
        "  sead: unknown key; did you mean 'seed'?",
        "  zebra: unknown key; known are captions, dataflow, datasets, dedup, exclusions, "
        "fetch, images, mixture, resources, root, seed",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('captions = "own"', 'captions = "their"', "mixture.captions names 'their'"),
        ("templates.cats", "templates.cows", "captions.own.templates names 'cows', no dataset"),
        ("{text}", "text", "captions.own.templates.cats has no {text}"),
        (
            'captions = "own"',
            'captions = "own"\ndatasets = ["cows"]',
            "names 'cows', not among datasets",
        ),
        (
            'captions = "own"',
            'captions = "own"\nweights = {cats = 1}',
            "must give every dataset of the mixture a weight",
        ),
        (
            'captions = "own"',
            'captions = "own"\nweights = {cats = 0, dogs = 1}',
            "mixture.weights.shares.cats: Input should be greater than 0",
        ),
        (
            'captions = "own"',
            'captions = "own"\nweights = {cats = inf, dogs = 1}',
            "mixture.weights.shares.cats: Input should be a finite number",
        ),
        (
            'captions = "own"',
            'captions = "own"\nweights = "cap:0"',
            "mixture.weights.name: 'cap:0' is none of 'equal', 'size', 'cap:1_000_000' or a table",
        ),
        (
            'captions = "own"',
            'captions = "own"\nweights = "cap:1_"',
            "mixture.weights.name: 'cap:1_' is none of 'equal', 'size', 'cap:1_000_000' or a table",
        ),
        (
            'captions = "own"',
            "captions = {}",
            "mixture.captions.shares: Dictionary should have at least 1 item",
        ),
        (
            'captions = "own"',
            "captions = {own = 2, their = 1}",
            "mixture.captions names 'their', but the caption sets are own",
        ),
        (
            'captions = "own"',
            'captions = "own"\ncaptions_of = {cow = "own"}',
            "mixture.captions_of names 'cow', not among datasets",
        ),
        (
            'captions = "own"',
            'captions = "own"\nwithout = ["cat"]',
            "mixture.without names 'cat', not among datasets; did you mean 'cats'?",
        ),
        (
            'captions = "own"',
            'captions = "own"\nwithout = ["cats", "dogs"]',
            "mixture.without leaves no dataset",
        ),
        (
            'captions = "own"',
            'captions = "own"\ndatasets = []',
            "mixture.datasets: List should have at least 1 item after validation, not 0",
        ),
        (
            'captions = "own"',
            'captions = "own"\n[[mixture.filters]]\ncolumn = "width"',
            "mixture.filters.0: needs at_least, at_most or one_of",
        ),
        (
            'captions = "own"',
            'captions = "own"\n[[mixture.filters]]\ncolumn = "w"\nat_least = 1\ndatasets = ["x"]',
            "mixture.filters names 'x', not among datasets",
        ),
        (
            'captions = "own"',
            'captions = "own"\ndatasets = ["cats", "cats"]',
            "mixture.datasets names a dataset twice",
        ),
        ('id_rule = "{id}"', "", "layout 'parquet' needs id_rule"),
        (
            'id_rule = "{id}"',
            'id_rule = "{id}"\npath_pattern = "("',
            "'(' is no regular expression",
        ),
        (
            "[datasets.cats]",
            '[datasets.caps]\ncatalog = "redcap"\n[datasets.cats]',
            "the catalogue has no 'redcap'; did you mean 'redcaps'?",
        ),
        ("[datasets.cats]", '[datasets."../cats"]', "becomes a folder name"),
        (
            'source = "cats"',
            'source = "https://me:pa55@x.org/cats"',
            "datasets.cats.source: has a user name or a password in it, which would be stored",
        ),
        (
            'source = "cats"',
            'source = "s3://me:pa55@bucket/cats"',
            "datasets.cats.source: has a user name or a password in it, which would be stored",
        ),
        (
            'source = "cats"',
            'source = "https://x.org/cats?token=pa55"',
            "datasets.cats.source: has a query ('?…') in it, which may be a signature or a token",
        ),
        (
            'source = "cats"',
            'source = "gs://bucket/cats"\nrevision = "0123abc"',
            "datasets.cats: revision is one of a source on the Hub (hf://…), which this is not",
        ),
        ("resolution = 256", "resolution = 0", "mixture.resolution: Input should be greater than"),
        ('root = "corpus"', "root = 3", "root: Input should be a valid string"),
        ('root = "corpus"', 'root = ""', "root: is empty; name a folder"),
        ('root = "corpus"', 'root = "gs://"', "'gs://' is no URL of a folder"),
        ('root = "corpus"', 'root = "gs:/bucket/R"', "'gs:/bucket/R' is no URL of a folder"),
    ],
)
def test_each_mistake_is_explained(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    told = "\n".join(mistakes(tmp_path, GOOD.replace(old, new)))
    assert expected in told
    assert "pa55" not in told


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("gs://bucket/photo-?.tar", None),
        ("/data/a@b/photo-?.tar", None),
        ("hf://datasets/someone/data@main/*.tar", None),
        ("hf://datasets/someone/data/*.tar", "0123abc"),
        ("https://x.org/a%3Fb.tar", None),
    ],
)
def test_sources_that_only_look_like_secrets(source: str, revision: str | None) -> None:
    spec = Dataset(layout="tar", source=source, revision=revision, licence="CC0 1.0")
    assert spec.source == source


def test_a_dataset_of_the_catalogue_needs_only_its_name(tmp_path: Path) -> None:
    changed = '[datasets.caps]\ncatalog = "redcaps"\nsource = "/data/*.zip"\nlicence = "own"\n'
    text = '[datasets.reason]\ncatalog = "fluxreason"\n' + changed
    recipe = load(tmp_path, GOOD.replace("[datasets.cats]", f"{text}[datasets.cats]"))
    assert recipe.datasets["reason"] == CATALOG["fluxreason"].dataset
    redcaps = CATALOG["redcaps"].dataset
    # A revision belongs to the source that it was written down for.
    changes = {"source": "/data/*.zip", "licence": "own", "revision": None}
    assert redcaps.revision is not None
    assert recipe.datasets["caps"] == redcaps.model_copy(update=changes)


def test_a_recipe_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "root = \n")
    assert line.startswith(f"{tmp_path}/recipe.toml is not TOML: Invalid value (at line 1")


def test_a_value_in_the_place_of_a_table_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match="images is a value, but must be a table"):
        load(tmp_path, "images = 3\n" + GOOD, **{"images.max_bytes": 5})


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError) as caught:
        load_recipe(f"{tmp_path}/absent.toml")
    assert str(caught.value) == f"{tmp_path}/absent.toml does not exist"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match=f"{tmp_path} cannot be read"):
        load_recipe(str(tmp_path))
