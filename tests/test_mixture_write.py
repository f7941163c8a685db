"""The shards of a mixture: the same bytes whichever way the samples come, and what is in them."""

import argparse
import hashlib
import io
import itertools
import json
import re
import shutil
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import webdataset
from PIL import Image

from captioning import caption
from dedup import deduplicate, steps
from mixing import gather, mix
from mixing.manifest import load_manifest
from mixing.select import Select, Selection, read_selection
from pipeline import images, ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates
from pipeline.errors import EvenmixError
from pipeline.funnel import funnel_table
from pipeline.images import Limits
from pipeline.originals import DamagedPictureError
from pipeline.presets import PRESETS
from pipeline.progress import console
from pipeline.publishing import publish_item
from pipeline.recipe import Recipe
from pipeline.records import key_of
from pipeline.stage import Stage, WorkItem, finish, make_plan
from pipeline.summary import Summary, read_summary
from pipeline.verify import verify
from tests.stages import run_here

NUM_CROPS, NUM_TINY = 152, 5
CAT: npt.NDArray[np.uint8] = skimage.data.chelsea()  # type: ignore[no-untyped-call]
SIZES = [(72, 64), (64, 90), (100, 70), (64, 64), (65, 131)]
"""Width and height of the crops, one after the other."""

RECIPE: dict[str, Any] = {
    "seed": 5,
    "images": {"min_short_edge_px": 16, "records_per_shard": 8},
    "datasets": {
        "crops": {
            "layout": "parquet",
            "source": "{sources}/crops.parquet",
            "licence": "CC0 1.0",
            "id_rule": "{id}",
            "text_field": "text",
            "extra_fields": ["number"],
            "duplicates": "exact",
        },
        "tiny": {
            "layout": "folder",
            "source": "{sources}/tiny",
            "licence": "public domain",
            "duplicates": "exact",
        },
    },
    "captions": {
        "source": {"engine": "source"},
        "long": {"engine": "source", "templates": {"crops": "A photograph, {text}."}},
    },
    "mixture": {
        "name": "m",
        "resolution": 32,
        "captions": "source",
        "validation_fraction": 0.1,
        "samples_per_shard": 7,
        "min_short_edge_px": 16,
    },
}

FEW = {"datasets": ["crops"], "images_per_dataset": 30, "validation_fraction": 0.0}


def here(stage: Stage, items: Sequence[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


def recipe_of(root: Path, **mixture: Any) -> Recipe:
    document = json.loads(json.dumps(RECIPE).replace("{sources}", str(root / "sources")))
    document["mixture"] |= mixture
    return Recipe.model_validate({"root": str(root / "corpus"), **document})


def crop(number: int) -> Image.Image:
    """Return one of many different parts of a photograph of a cat."""
    photograph = Image.fromarray(CAT)
    width, height = SIZES[number % len(SIZES)]
    left, top = 2 * number % 300, 7 * number % 160
    return photograph.crop((left, top, left + width, top + height))


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    crop(number).save(buffer, "JPEG" if number % 3 else "PNG")
    return buffer.getvalue()


def write_sources(folder: Path) -> None:
    rows = []
    for number in range(NUM_CROPS):
        rows.append(
            {
                "id": number,
                "image": {"bytes": encoded(number), "path": None},
                # Each 19th has no text, so no caption.
                "text": None if number % 19 == 0 else f"part {number} of a cat",
                "number": number,
            }
        )
    (folder / "tiny").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "crops.parquet")
    for number in range(NUM_TINY):
        crop(200 + number).resize((40, 20)).save(folder / "tiny" / f"{number}.png")
        (folder / "tiny" / f"{number}.txt").write_text(f"a small cat, {number}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources, and the corpus of them with its captions."""
    folder = tmp_path_factory.mktemp("corpus")
    write_sources(folder / "sources")
    recipe = recipe_of(folder, captions={"source": 1, "long": 1})
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingest, deduplicate, steps, caption):
            patch.setattr(module, "run_stage", here)
        for job in (ingest, deduplicate, caption):
            job.run_recipe(recipe, RunnerOptions(workers=1))
    return folder


@pytest.fixture(autouse=True)
def _without_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "run_stage", here)


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus in which a mixture may be cut."""
    return Path(shutil.copytree(corpus, tmp_path / "copied"))


def cut(root: Path, **mixture: Any) -> dict[str, bytes]:
    """Cut a mixture and return its files."""
    mix.run_recipe(recipe_of(root, **mixture), RunnerOptions(workers=1))
    return files(root)


def files(root: Path) -> dict[str, bytes]:
    folder = root / "corpus" / "mixtures" / "m"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the samples of a mixture as the webdataset library reads them, with their shards."""
    mixture = root / "corpus" / "mixtures" / "m"
    for dataset in load_manifest(str(mixture)).datasets:
        for shard in [*dataset.train.shards, *dataset.validation.shards]:
            data = (mixture / shard.name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
            found = list(webdataset.WebDataset(str(mixture / shard.name), shardshuffle=False))
            assert len(found) == shard.num_samples
            for sample in found:
                yield shard.name, sample | {"json": json.loads(sample["json"])}


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the corpus with the mixture as it is cut by default: whole tars, in one pass."""
    folder = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("finished") / "c"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix, "run_stage", here)
        cut(folder)
    return folder


@pytest.fixture(scope="module")
def expected(finished: Path) -> dict[str, bytes]:
    """The files of that mixture."""
    return files(finished)


@pytest.mark.parametrize("reads_whole", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_every_way_gives_the_same_bytes(
    copied: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    reads_whole: bool,
    passes: int,
) -> None:
    monkeypatch.setattr(gather, "SHARE_READ_WHOLE", 0.0 if reads_whole else 1.1)
    monkeypatch.setattr(gather, "GROUP_BYTES", 1)  # each image shard is a file
    monkeypatch.setattr(gather, "MIN_SAMPLES_PER_READ", 0 if passes == 1 else 10)
    folders = list[str]()

    def noting(stage: Stage, items: Sequence[WorkItem], runner: RunnerOptions) -> Any:
        folders.append(stage.folder)
        return here(stage, items, runner)

    monkeypatch.setattr(mix, "run_stage", noting)
    assert cut(copied) == expected
    assert folders.count("exchange/mixture-m/regrouped") == passes - 1


def test_the_ways_of_the_largest_dataset(tmp_path: Path) -> None:
    """YFCC at 256 pixels: as the module tells it, and where few of its pictures are selected."""
    recipe = recipe_of(tmp_path, resolution=256)
    shards = {f"{number:06d}": {"counts": {"records_out": 512}} for number in range(191_406)}
    summary = {"stage": "ingest", "dataset": "yfcc", "items": shards, "counts": {}}
    storage.publish(f"{recipe.root}/images/yfcc/stage.json", json.dumps(summary).encode())
    for num_train, expected in (
        (98_000_000, gather.Route(True, 27_344, 314, 98_000)),
        (1_000_000, gather.Route(False, 748, 32, 1_000)),
    ):
        route = gather.route_of(recipe, Selection("yfcc", 0, num_train, 0, 1000, 5))
        assert route == expected
        # A lot has as many files as there are parts; each destination reads one file a lot.
        urls = route.urls(recipe, "yfcc", route.num_destinations - 1)
        last = f"{route.num_parts - 1:05d}"
        assert [url.rpartition("/")[2][:6] for url in urls] == [f"{last}-"] * route.num_lots
        assert 0 <= route.num_lots * route.num_parts - route.num_files < route.num_parts


def test_samples_are_what_the_recipe_says(finished: Path) -> None:
    recipe = recipe_of(finished)
    tables = [
        storage.read_parquet(file.url)
        for file in storage.list_files(f"{recipe.root}/images/crops")
        if file.name.endswith(".parquet") and "rejected" not in file.name
    ]
    originals = {row["key"]: row for table in tables for row in table.to_pylist()}
    taken = [found for found in samples(finished) if found[0].startswith("crops/")]
    keys = [sample["json"]["key"] for _, sample in taken]
    wanted = {key_of("crops", str(n)) for n in range(NUM_CROPS) if n % 19}
    assert len(keys) == len(set(keys))
    assert set(keys) == wanted
    chosen = read_selection(recipe, "crops")
    assert chosen.num_train + chosen.num_validation == len(keys)
    for shard, of_shard in itertools.groupby(taken, key=lambda found: found[0]):
        orders = []
        for _, sample in of_shard:
            told, held_out = sample["json"], shard.startswith("crops/validation")
            original = originals[told["key"]]
            width, height = original["width"], original["height"]
            assert told["key"] == sample["__key__"]
            assert f"crops/{chosen.destination(told['key'], held_out)}.tar" == shard
            orders.append(chosen.order(told["key"]))
            number = int(original["source_id"])
            pixels = images.decode(encoded(number), Limits(1, 1 << 20, 1 << 20))
            square, box = images.resize_and_crop_square(pixels, 32)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), square)
            assert told == {
                "key": original["key"],
                "dataset": "crops",
                "source_id": str(number),
                "source_url": original["source_url"],
                "licence": "CC0 1.0",
                "height": 32,
                "width": 32,
                "crop": list(box),
                "captions": [
                    {"text": f"part {number} of a cat", "caption_set": "source", "model": None}
                ],
                "fields": {"number": number},
                "original_height": height,
                "original_width": width,
                "original_sha256": original["sha256"],
            }
        assert orders == sorted(orders)


def test_a_mixture_that_is_finished_is_left_alone_and_leaves_nothing_behind(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = finished / "corpus"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert not [path for path in (root / "exchange" / "mixture-m").rglob("*") if path.is_file()]
    folders = list[str]()

    def noting(stage: Stage, items: Sequence[WorkItem], runner: RunnerOptions) -> Any:
        assert make_plan(stage, items).is_finished
        folders.append(stage.folder)
        return here(stage, items, runner)

    monkeypatch.setattr(mix, "run_stage", noting)
    cut(finished)
    assert folders == ["selections/m", "mixtures/m"]
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert after == before
    assert verify(str(root), deep=True)[1] == []


class Killed(BaseException):
    """What ends a run in these tests, as a signal would."""


@pytest.mark.parametrize("passes", [1, 2])
def test_a_mixture_killed_again_and_again_ends_with_the_same_files(
    copied: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    monkeypatch.setattr(gather, "GROUP_BYTES", 1)
    monkeypatch.setattr(gather, "MIN_SAMPLES_PER_READ", 0 if passes == 1 else 10)

    def killed_soon(stage: Stage, items: Sequence[WorkItem], _: RunnerOptions) -> Any:
        for number, item in enumerate(make_plan(stage, items).missing):
            if number == 11:
                raise Killed
            publish_item(stage, item)
        if not make_plan(stage, items).is_finished:
            finish(stage, items)
            raise Killed
        found = {
            item.dataset: read_summary(stage.root, stage.folder, item.dataset) for item in items
        }
        return {name: summary for name, summary in found.items() if summary}

    monkeypatch.setattr(mix, "run_stage", killed_soon)
    kills = 0
    while True:
        try:
            cut(copied)
        except Killed:
            kills += 1
        else:
            break
    assert kills > 6
    assert files(copied) == expected
    assert verify(str(copied / "corpus"), deep=False)[1] == []


def test_two_builds_at_once_do_not_mind_that_one_ends_first(
    copied: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter([True])

    def overtaken(stage: Stage, items: Sequence[WorkItem], runner: RunnerOptions) -> Any:
        if stage.name == "mix-gather" and next(others, False):
            assert cut(copied) == expected
            finish(stage, items)  # what was gathered is gone
        return here(stage, items, runner)

    monkeypatch.setattr(mix, "run_stage", overtaken)
    assert cut(copied) == expected


def test_another_mixture_of_the_name_is_refused(finished: Path, expected: dict[str, bytes]) -> None:
    for changed in ({"resolution": 16}, {"images_per_dataset": 9}, {"crop": "none"}):
        with pytest.raises(EvenmixError, match=r"mixture\.name|another name"):
            cut(finished, **changed)
    with pytest.raises(
        EvenmixError,
        match=r'mixture\.json describes another mixture \(crops\.weight: "1/2" -> "3/10"; tiny',
    ):
        cut(finished, weights={"crops": 0.3, "tiny": 0.7})
    assert files(finished) == expected


def test_a_finished_mixture_takes_no_other_dataset_and_none_is_written(copied: Path) -> None:
    alone = cut(copied, datasets=["tiny"])
    with pytest.raises(EvenmixError, match=r"another mixture \(crops: null -> .*; tiny\.weight: "):
        cut(copied)
    assert files(copied) == alone


def test_a_recipe_that_leaves_nothing_may_be_relaxed_under_its_name(
    copied: Path, expected: dict[str, bytes]
) -> None:
    too_wide = {"column": "width", "at_least": 1e6, "datasets": ["tiny"]}
    told = r"left for the mixture in: tiny \(filtered: width >= 1,000,000 5\)\. Relax the recipe"
    with pytest.raises(EvenmixError, match=told):
        cut(copied, filters=[too_wide])
    assert cut(copied) == expected


def reads_of_tars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """Note the reads of image shards' tars: URL, offset and length."""
    reads = list[tuple[str, int, int | None]]()
    read_bytes = storage.read_bytes

    def noting(url: str, offset: int = 0, length: int | None = None) -> bytes:
        if "/images/" in url and url.endswith(".tar"):
            reads.append((url, offset, length))
        return read_bytes(url, offset, length)

    monkeypatch.setattr(storage, "read_bytes", noting)
    return reads


def test_few_pictures_are_read_one_by_one(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = reads_of_tars(monkeypatch)
    small = {"images_per_dataset": 6, "validation_fraction": 0.01, "datasets": ["crops"]}
    found = cut(copied, **small)
    assert len(reads) == len(set(reads)) == len(list(samples(copied))) >= 6
    assert all(length and offset for _, offset, length in reads)
    monkeypatch.setattr(gather, "SHARE_READ_WHOLE", 0.0)
    shutil.rmtree(copied / "corpus" / "mixtures")
    assert cut(copied, **small) == found


def test_of_many_pictures_each_tar_is_read_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = reads_of_tars(monkeypatch)
    cut(copied)
    tars = [str(path) for path in (copied / "corpus" / "images").rglob("*.tar")]
    assert sorted(reads) == sorted((tar, 0, None) for tar in tars)


def test_excluded_pictures_are_in_no_mixture(copied: Path, expected: dict[str, bytes]) -> None:
    listed = copied / "exclusions.txt"
    listed.write_text("source_id crops 1\nsource_id crops 20\n", encoding="utf-8")
    recipe = recipe_of(copied).model_copy(update={"exclusions": str(listed)})
    mix.run_recipe(recipe, RunnerOptions(workers=1))
    names = {sample["json"]["source_id"] for shard, sample in samples(copied) if "crops" in shard}
    assert names == {str(n) for n in range(NUM_CROPS) if n % 19 and n not in (1, 20)}
    assert files(copied) != expected


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_whole_pictures_keep_their_aspect(copied: Path, image_format: str) -> None:
    cut(copied, crop="none", resample="lanczos", image_format=image_format, **FEW)
    manifest = load_manifest(str(copied / "corpus" / "mixtures" / "m"))
    assert (manifest.crop, manifest.image_format) == ("none", image_format)
    shapes = set()
    for _, sample in samples(copied):
        told = sample["json"]
        extension = images.EXTENSIONS[image_format]
        picture = Image.open(io.BytesIO(sample[extension]))
        assert (picture.format or "").lower() == image_format
        assert picture.size == (told["width"], told["height"])
        assert min(picture.size) == 32
        assert told["crop"] == [0, 0, told["original_width"], told["original_height"]]
        number = int(told["source_id"])
        original = images.decode(encoded(number), Limits(1, 1 << 20, 1 << 20))
        resized = images.resize_short_edge(original, 32, "lanczos").astype(int)
        difference = np.abs(np.asarray(picture.convert("RGB")) - resized)
        assert difference.mean() < 3 if image_format == "jpeg" else difference.max() == 0
        shapes.add(picture.size)
    assert shapes == {(36, 32), (32, 45), (45, 32), (32, 32), (32, 64)}


def test_shards_without_samples_are_left_out_of_the_manifest(copied: Path) -> None:
    cut(copied, samples_per_shard=1, **FEW)
    root = copied / "corpus"
    (dataset,) = load_manifest(str(root / "mixtures" / "m")).datasets
    published = [path.stem for path in (root / "mixtures" / "m" / "crops").glob("*.parquet")]
    assert len(published) == dataset.train.num_samples == 30
    assert 15 < len(dataset.train.shards) < 25  # 1 - 1/e of them have samples
    assert sum(shard.num_samples for shard in dataset.train.shards) == 30
    assert dataset.validation.shards == []
    assert verify(str(root), deep=False)[1] == []


def test_captions_of_several_sets(copied: Path) -> None:
    sets = {"captions": {"long": 3, "source": 1}, "captions_of": {"tiny": "source"}}
    cut(copied, **sets)
    crops, tiny = load_manifest(str(copied / "corpus" / "mixtures" / "m")).datasets
    assert crops.caption_sets == {"long": "3/4", "source": "1/4"}
    assert tiny.caption_sets == {"source": "1"}
    for shard, sample in samples(copied):
        told = sample["json"]
        number = told["source_id"]
        texts = [(caption["caption_set"], caption["text"]) for caption in told["captions"]]
        if shard.startswith("crops/"):
            text = f"part {number} of a cat"
            assert texts == [("long", f"A photograph, {text}."), ("source", text)]
        else:
            assert [name for name, _ in texts] == ["source"]
    with console.capture() as captured:
        console.print(funnel_table(recipe_of(copied, **sets)))
    funnel = captured.get()
    assert [line.split()[-3:] for line in funnel.splitlines() if " long " in line] == [
        ["long", "144", "144"]
    ]


def test_a_dataset_with_pictures_for_validation_only_is_refused(copied: Path) -> None:
    with pytest.raises(EvenmixError, match="held out for validation in: crops, tiny"):
        cut(copied, validation_fraction=1 - 1e-12)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_damaged_original_is_named(
    copied: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(gather, "SHARE_READ_WHOLE", share)
    path = min((copied / "corpus" / "images" / "crops").glob("*.tar"))
    data = bytearray(path.read_bytes())
    row = storage.read_parquet(str(path.with_suffix(".parquet"))).to_pylist()[2]
    data[row["offset"] + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedPictureError, match=f"{path}, picture {row['key']}: other bytes"):
        cut(copied)


def test_memory_is_that_of_a_group_however_large_the_corpus(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tenth of the shards a group, the memory is a third: most of it are the samples."""
    recipe = recipe_of(copied, resolution=112, datasets=["crops"])
    for stage in (Candidates(recipe, with_captions=True), Select(recipe)):
        run_here(stage, stage.plan())
    chosen = read_selection(recipe, "crops")
    peaks = list[int]()
    for shards_per_group in (2, 19):
        monkeypatch.setattr(gather, "SHARDS_PER_GROUP", shards_per_group)
        gathering = gather.Gather(recipe, {"crops": gather.route_of(recipe, chosen)})
        items = gathering.plan({"crops": {}})[:3]  # the others are alike
        peaks.append(max(peak(gathering, item) for item in items))
    assert peaks[0] < 0.4 * peaks[1]


def peak(stage: Stage, item: WorkItem) -> int:
    """Return the most bytes that Python holds while an item is processed, and those of its table.

    Arrow's own peak is not seen; it is some copies of the table.
    """
    tracemalloc.start()
    try:
        output = stage.process(item)
        return int(output.table.nbytes) + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ([], "name a recipe, or one of i1's mixtures with --preset NAME --root R"),
        (["--preset", "i1-256"], "name a recipe, or one of i1's mixtures"),
        (["DirectRunner"], "DirectRunner is no recipe, which is a .toml file"),
        (["r.toml", "--preset", "i1-512"], 'in r.toml, write preset = "i1-512" below [mixture]'),
    ],
)
def test_a_recipe_or_a_preset_is_needed(options: list[str], answer: str) -> None:
    parser = argparse.ArgumentParser()
    mix.add_arguments(parser)
    with pytest.raises(EvenmixError, match=re.escape(answer)):
        mix.run(parser.parse_args(options))


def test_a_preset_goes_without_a_recipe(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    mix.add_arguments(parser)
    args = parser.parse_args(["--preset", "i1-256-0.1M", "--root", str(tmp_path)])
    args.beam_options = []
    with pytest.raises(EvenmixError, match="not ingested, or not to the end") as error:
        mix.run(args)
    # Nothing is there yet, which is told of all datasets at once.
    datasets = PRESETS["i1-256-0.1M"].datasets
    assert len(datasets) == 11
    assert all(name in str(error.value) for name in datasets)
