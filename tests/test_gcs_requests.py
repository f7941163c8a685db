"""What is asked of gs://: requests cost time and money, and a corpus has a million objects."""

import os
import re
import subprocess
import sys
from collections import Counter
from threading import Barrier

import pyarrow as pa
import pytest

from pipeline import stage as stage_module
from pipeline import storage
from pipeline.publishing import publish_item
from pipeline.receipts import read_receipt
from pipeline.stage import finish, make_plan
from tests.gcs import Fault, Proxy
from tests.gcs_faults import faults
from tests.stages import Words, items

SHARDS = [f"s{number:02d}" for number in range(12)]
LISTING = "GET /storage/v1/b/*/o"
OBJECT = "GET /storage/v1/b/*/o/*"
DOWNLOAD = "GET /download/storage/v1/b/*/o/*"


@pytest.fixture
def store(gcs_server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The storage; a page of a listing has ten objects, as many as five shards of `Words`."""
    monkeypatch.setattr(gcs_server, "page_objects", 10)
    monkeypatch.setattr(stage_module, "SHARDS_PER_LISTING", 5)
    return gcs_server


@pytest.fixture
def folder(gcs_bucket: str) -> str:
    """A folder with 25 objects."""
    for number in range(25):
        storage.publish(f"{gcs_bucket}/d/{number:02d}", b"x" * number)
    return f"{gcs_bucket}/d"


def asked(store: Proxy) -> Counter[str]:
    """Count the requests since the last call, by kind."""
    kinds = Counter(
        re.sub(r"/b/[^/]+/o(/[^?]+)?.*", lambda m: "/b/*/o" + "/*" * bool(m[1]), request)
        for request in store.requests
    )
    store.requests.clear()
    return kinds


def test_a_listing_takes_a_request_a_page(store: Proxy, folder: str) -> None:
    asked(store)
    files = storage.list_files(folder)
    assert [(file.name, file.num_bytes) for file in files] == [(f"{n:02d}", n) for n in range(25)]
    assert asked(store) == {LISTING: 3}


def test_the_parts_of_a_listing_are_asked_for_at_once(store: Proxy, folder: str) -> None:
    begun = Barrier(3, timeout=20)

    def all_have_begun(request: str) -> Fault | None:
        begun.wait()
        return None

    asked(store)
    with faults(store, all_have_begun):
        files = list(storage.walk_files(folder, ["09", "18"]))
    assert files == storage.list_files(folder)
    assert asked(store) == {LISTING: 3 + 3}


def test_a_listing_by_prefix_asks_for_nothing_else(store: Proxy, folder: str) -> None:
    asked(store)
    files = list(storage.walk_files(folder, prefix="2"))
    assert [file.name for file in files] == ["20", "21", "22", "23", "24"]
    assert asked(store) == {LISTING: 1}


def test_a_small_table_is_read_in_one_request_and_so_is_all_that_is_known_of_a_file(
    store: Proxy, gcs_bucket: str
) -> None:
    url = f"{gcs_bucket}/table.parquet"
    table = pa.table({"key": ["a", "b"]})
    data = storage.parquet_bytes(table, {"receipt": "r"})
    asked(store)
    assert storage.publish(url, data)
    assert asked(store).total() == 2
    assert storage.read_parquet(url).equals(table.replace_schema_metadata({"receipt": "r"}))
    assert storage.parquet_metadata(url) == {"receipt": "r"}
    assert asked(store) == {DOWNLOAD: 2}
    assert storage.exists(url)
    assert storage.file_info(url).num_bytes == len(data)
    assert asked(store) == {OBJECT: 2}


def test_of_a_large_table_no_byte_is_read_twice(store: Proxy, gcs_bucket: str) -> None:
    url = f"{gcs_bucket}/table.parquet"
    table = pa.table({"key": [f"{number * 7919 % 100_003:032x}" for number in range(100_000)]})
    data = storage.parquet_bytes(table, {})
    assert len(data) > 4 << 16
    storage.publish(url, data)
    asked(store)
    assert storage.read_parquet(url).equals(table)
    assert asked(store)[DOWNLOAD] <= 1 + 7  # the footer, and the row groups


def test_a_stage_asks_for_each_receipt_once(store: Proxy, gcs_bucket: str) -> None:
    stage, work = Words(gcs_bucket), items(*SHARDS)
    for item in work:
        publish_item(stage, item)
    asked(store)

    assert make_plan(stage, work).finished == {f"d/{shard}" for shard in SHARDS}
    # Is there a stage.json? Then three parts of the listing, one page each, and the receipts.
    assert asked(store) == {OBJECT: 1, LISTING: 3, DOWNLOAD: 12}

    finish(stage, work)
    counts = asked(store)
    # Those again, what is temporary, and the upload of stage.json.
    assert (counts.pop(LISTING), counts.pop(DOWNLOAD), counts.total()) == (4, 12, 2)

    assert make_plan(stage, work).is_finished
    assert asked(store) == {OBJECT: 1, DOWNLOAD: 1}


def test_receipts_are_asked_for_at_once(store: Proxy, gcs_bucket: str) -> None:
    stage, work = Words(gcs_bucket), items(*SHARDS)
    for item in work:
        publish_item(stage, item)
    begun = Barrier(len(SHARDS), timeout=20)

    def all_have_begun(request: str) -> Fault | None:
        if request.startswith("GET /download/"):
            begun.wait()
        return None

    with faults(store, all_have_begun):
        receipts = dict(stage_module.read_receipts(f"{gcs_bucket}/words/d", SHARDS))
    assert receipts["s07"] == read_receipt(f"{gcs_bucket}/words/d/s07.parquet")
    assert list(receipts) == SHARDS


def test_nobody_is_asked_what_kind_of_bucket_it_is() -> None:
    """In a process of its own, as a user's is."""
    code = "import fsspec, pipeline.storage; print(fsspec.get_filesystem_class('gs').__module__)"
    environment = {**os.environ}
    environment.pop("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", None)
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert printed.stdout == "gcsfs.core\n"
