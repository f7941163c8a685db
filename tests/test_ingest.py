"""Ingest keeps what is a whole picture of the right size and counts why the rest was not kept."""

import hashlib
import io
import json
import tarfile

import pyarrow as pa
import pytest

from pipeline import images, ingest, readers, storage
from pipeline.beam_job import RunnerOptions
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.images import Limits
from pipeline.ingest_stage import Ingest
from pipeline.receipts import Counts
from pipeline.recipe import Fetch, Images, Recipe
from pipeline.records import INDEX, key_of
from pipeline.summary import read_summary
from tests.pictures import bomb_png, exif_orientation, jpeg_with, save, smooth

LIMITS = Limits(min_short_edge_px=32, max_pixels=1_000_000, max_bytes=500_000)
JPEG = save(smooth(40, 64), "JPEG")
TALL_JPEG = jpeg_with(JPEG, 0xE1, b"Exif\0\0" + exif_orientation(6))
PNG = save(smooth(32, 32), "PNG")

KEPT = {"good.jpg": JPEG, "least.png": PNG, "named-wrongly.webp": PNG, "upright.jpg": TALL_JPEG}
REJECTED = {
    "bomb.png": (bomb_png(), "too_many_pixels"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpg": (b"", "empty_file"),
    "heavy.jpg": (JPEG + bytes(LIMITS.max_bytes), "too_many_bytes"),
    "one-pixel.png": (save(smooth(1, 1), "PNG"), "too_small"),
    "small.png": (save(smooth(31, 500), "PNG"), "too_small"),
    "text.jpg": (b"<html>404 not found</html>", "not_an_image"),
}
COUNTS = Counts(
    11,
    4,
    {
        "empty_file": 1,
        "not_an_image": 1,
        "too_many_bytes": 1,
        "too_many_pixels": 1,
        "too_small": 2,
        "truncated": 1,
    },
)


@pytest.fixture(params=["local", "gs"])
def place(request: pytest.FixtureRequest) -> str:
    """A folder in each kind of store, with the pictures under `in`."""
    gs = request.param == "gs"
    place = str(request.getfixturevalue("gcs_bucket" if gs else "tmp_path"))
    for name, data in [*KEPT.items(), *[(name, data) for name, (data, _) in REJECTED.items()]]:
        storage.publish(f"{place}/in/{name}", data)
    storage.publish(f"{place}/in/good.txt", "a ramp, «soft»".encode())
    return place


def recipe(place: str, **images: int) -> Recipe:
    limits = {
        "min_short_edge_px": LIMITS.min_short_edge_px,
        "max_pixels": LIMITS.max_pixels,
        "max_bytes": LIMITS.max_bytes,
    }
    return Recipe.model_validate(
        {
            "root": f"{place}/R",
            "datasets": {
                "ramps": {"layout": "folder", "source": f"{place}/in", "licence": "CC0 1.0"}
            },
            "images": limits | images,
            "captions": {"own": {"engine": "source"}},
            "mixture": {"name": "m", "resolution": 32, "captions": "own"},
        }
    )


def test_pictures_are_kept_whole_and_others_have_reasons(place: str) -> None:
    ingest.run_recipe(recipe(place), RunnerOptions(workers=1))

    summary = read_summary(f"{place}/R", "images", "ramps")
    assert summary is not None
    assert summary.counts == COUNTS
    (shard,) = summary.items
    folder = f"{place}/R/images/ramps"
    index = storage.read_parquet(f"{folder}/{shard}.parquet")
    assert index.schema.equals(INDEX)
    assert index["source_id"].to_pylist() == list(KEPT)
    assert index["key"].to_pylist() == [key_of("ramps", name) for name in KEPT]
    assert index["format"].to_pylist() == ["jpeg", "png", "png", "jpeg"]
    assert index["width"].to_pylist() == [64, 32, 32, 40]
    assert index["height"].to_pylist() == [40, 32, 32, 64]
    assert index["text"].to_pylist() == ["a ramp, «soft»", None, None, None]
    assert index["sha256"].to_pylist() == [hashlib.sha256(d).hexdigest() for d in KEPT.values()]
    pixels = index["pixels_sha256"].to_pylist()
    assert pixels[0] == images.sha256_of_pixels(images.decode(JPEG, LIMITS))
    assert pixels[1] == pixels[2]

    # The tar has the original bytes, where the index says, and each picture's row beside it.
    tar = storage.read_bytes(f"{folder}/{shard}.tar")
    rows = index.to_pylist()
    for row, data in zip(rows, KEPT.values(), strict=True):
        assert tar[row["offset"] : row["offset"] + row["num_bytes"]] == data
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        extensions = ["jpg", "png", "png", "jpg"]
        assert archive.getnames() == [
            f"{row['key']}.{extension}"
            for row, picture in zip(rows, extensions, strict=True)
            for extension in (picture, "json")
        ]
        member = archive.extractfile(f"{rows[0]['key']}.json")
        assert member is not None
        stored = json.load(member)
    assert stored == {name: value for name, value in rows[0].items() if name != "offset"}

    rejected = storage.read_parquet(f"{folder}/{shard}.rejected.parquet")
    assert {row["source_id"]: row["reason"] for row in rejected.to_pylist()} == {
        name: reason for name, (_, reason) in REJECTED.items()
    }
    assert rejected["key"].to_pylist() == [key_of("ramps", name) for name in REJECTED]
    assert all(rejected["detail"].to_pylist())


def test_limits_are_part_of_what_was_made(place: str) -> None:
    ingest.run_recipe(recipe(place), RunnerOptions(workers=1))
    with pytest.raises(EvenmixError, match=r"config\.min_short_edge_px: 32 -> 33"):
        ingest.run_recipe(recipe(place, min_short_edge_px=33), RunnerOptions(workers=1))


def test_shard_size_does_not_change_what_is_kept(tmp_path: object) -> None:
    for name, data in KEPT.items():
        storage.publish(f"{tmp_path}/in/{name}", data)
    dataset = Dataset(layout="folder", source=f"{tmp_path}/in", licence="CC0 1.0")
    stage = Ingest(f"{tmp_path}/R", {"d": dataset}, {"d": None}, LIMITS, Fetch())

    def rows(records_per_shard: int) -> list[str]:
        shards = Images(records_per_shard=records_per_shard)
        outputs = [stage.process(i) for i in readers.plan("d", dataset, shards)]
        return [row["sha256"] for output in outputs for row in output.table.to_pylist()]

    assert rows(1) == rows(3) == rows(100)


def test_records_without_a_usable_id_are_counted(tmp_path: object) -> None:
    """An empty id names nothing: it must not become a key, and so a file name."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "id": pa.array(["", None, "a"]),
            "image": pa.array([{"bytes": PNG, "path": None}] * 3, image),
        }
    )
    storage.publish(f"{tmp_path}/a.parquet", storage.parquet_bytes(table, {}))
    dataset = Dataset(
        layout="parquet", source=f"{tmp_path}/a.parquet", licence="CC0 1.0", id_rule="{id}"
    )
    (item,) = readers.plan("d", dataset, Images())
    stage = Ingest(f"{tmp_path}/R", {"d": dataset}, {"d": None}, LIMITS, Fetch())
    output = stage.process(item)
    assert output.counts == Counts(3, 1, {"bad_record": 2})
    assert output.rejected is not None
    assert output.rejected["key"].to_pylist() == [None, None]
    assert output.table["key"].to_pylist() == [key_of("d", "a")]


def test_missing_sources_are_all_named_before_any_work(tmp_path: object) -> None:
    wrong = recipe(str(tmp_path))
    with pytest.raises(EvenmixError) as caught:
        ingest.check(wrong)
    assert str(caught.value) == (
        f"dataset ramps: nothing at {tmp_path}/in; correct datasets.ramps.source"
    )
