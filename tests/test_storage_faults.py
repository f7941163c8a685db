"""Whichever request to gs:// goes wrong, and however, what was asked for happens once and whole."""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from itertools import count, product
from queue import Queue
from threading import Event
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline import gcs, storage, stores
from pipeline.errors import EvenmixError
from tests.gcs import Fault, Proxy
from tests.gcs_faults import PASSING, faults

CHUNK_BYTES = 256 << 10
LARGE = bytes(range(256)) * 2500
"""Three chunks, the last one short."""


@pytest.fixture
def store(gcs_server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The storage; small chunks are sent to it, and waits between attempts are short."""
    monkeypatch.setattr(gcs, "_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(stores, "OUTAGE_WAITS_S", (0.0,) * 7)
    quick = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 1000))
    monkeypatch.setattr("gcsfs.retry.asyncio", quick)
    return gcs_server


TABLE = storage.parquet_bytes(pa.table({"key": ["a"]}), {"receipt": "r"})
OPERATIONS: dict[str, Callable[[str], object]] = {
    "publish": lambda folder: storage.publish(f"{folder}/new", LARGE),
    "publish nothing": lambda folder: storage.publish(f"{folder}/new", b""),
    "publish under a taken name": lambda folder: storage.publish(f"{folder}/table", b"other"),
    "replace": lambda folder: storage.replace(f"{folder}/table", LARGE),
    "remove": lambda folder: storage.remove(f"{folder}/table"),
    "read": lambda folder: storage.read_bytes(f"{folder}/large"),
    "read a range": lambda folder: storage.read_bytes(f"{folder}/large", 10, 1000),
    "read a footer": lambda folder: storage.parquet_metadata(f"{folder}/table"),
    "exists": lambda folder: storage.exists(f"{folder}/table"),
    "size": lambda folder: storage.file_info(f"{folder}/large").num_bytes,
    "glob": lambda folder: [file.name for file in storage.glob_files(f"{folder}/*e")],
}


def outcome(operation: str, folder: str) -> tuple[object, dict[str, bytes]]:
    """Do an operation in a folder with two files; return its result and what is there then."""
    storage.publish(f"{folder}/table", TABLE)
    storage.publish(f"{folder}/large", LARGE)
    result = OPERATIONS[operation](folder)
    return result, {file.name: storage.read_bytes(file.url) for file in storage.list_files(folder)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_that_goes_wrong_is_not_noticed(
    operation: str, store: Proxy, gcs_bucket: str
) -> None:
    store.requests.clear()
    expected = outcome(operation, f"{gcs_bucket}/whole")
    requests = len(store.requests)
    for fault, phase in product(PASSING, range(2)):
        numbers = count(phase)
        every_other = partial(next_is_even, numbers, fault)
        store.requests.clear()
        with faults(store, every_other):
            assert outcome(operation, f"{gcs_bucket}/{fault.name}-{phase}") == expected
        assert len(store.requests) > requests


def next_is_even(numbers: "count[int]", fault: Fault, request: str) -> Fault | None:
    """Let a request go wrong if its number is even."""
    return fault if next(numbers) % 2 == 0 else None


@pytest.mark.parametrize("lost_at", range(2, 5))
def test_an_upload_that_the_store_has_lost_begins_anew(
    lost_at: int, store: Proxy, gcs_bucket: str
) -> None:
    """As it is when the store was restarted, or a session has ended after a week."""
    numbers = count(1)

    def lose_uploads(request: str) -> None:
        if next(numbers) == lost_at:
            store.uploads.clear()

    store.requests.clear()
    with faults(store, lose_uploads):
        assert storage.publish(f"{gcs_bucket}/a", LARGE)
    # It is begun and has three chunks.
    assert len(store.requests) == lost_at + 4
    assert storage.read_bytes(f"{gcs_bucket}/a") == LARGE


def test_an_upload_that_does_not_advance_begins_anew() -> None:
    stuck = SimpleNamespace(call=lambda *_, **__: ({"Range": "bytes=0-9"}, b""))
    with pytest.raises(ConnectionError, match="nothing more"):
        gcs._send(stuck, "session", bytes(100))


def test_an_upload_whose_answer_and_session_were_lost_is_known_again(
    store: Proxy, gcs_bucket: str
) -> None:
    numbers = count(1)

    def lose_the_end(request: str) -> Fault | None:
        number = next(numbers)
        if number == 5:
            store.uploads.clear()
        return Fault.LOST_ANSWER if number == 4 else None

    with faults(store, lose_the_end):
        assert storage.publish(f"{gcs_bucket}/a", LARGE)
    assert storage.read_bytes(f"{gcs_bucket}/a") == LARGE
    # Equal bytes do not make it the same upload.
    assert not storage.publish(f"{gcs_bucket}/a", LARGE)


def test_a_name_that_was_taken_and_is_free_again_is_taken(store: Proxy, gcs_bucket: str) -> None:
    """As a work list is, which another build sweeps while this one tries to publish it."""
    storage.publish(f"{gcs_bucket}/a", b"other")
    numbers = count(1)

    def sweep(request: str) -> None:
        # The second request asks what has the name.
        if next(numbers) == 2:
            with faults(store, lambda request: None):
                storage.remove(f"{gcs_bucket}/a")

    with faults(store, sweep):
        assert storage.publish(f"{gcs_bucket}/a", b"own")
    assert storage.read_bytes(f"{gcs_bucket}/a") == b"own"


def test_an_outage_beyond_the_librarys_patience_passes(
    store: Proxy, gcs_bucket: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_TOLD_WAIT_S", 0.0)
    numbers = count(1)
    with faults(store, lambda _: Fault.UNAVAILABLE if next(numbers) <= 7 else None):
        assert storage.publish(f"{gcs_bucket}/a", b"data")
    assert storage.read_bytes(f"{gcs_bucket}/a") == b"data"
    told = [record.getMessage() for record in caplog.records if record.name == "pipeline.stores"]
    assert told == [f"{gcs_bucket}/a is out of reach (HTTP 503); trying again in 0 s"]


CALLS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "written": lambda url: storage.publish(url, b"data"),
    "removed": storage.remove,
}


@pytest.mark.parametrize("purpose", CALLS)
def test_an_outage_that_stays_is_one_error(purpose: str, store: Proxy, gcs_bucket: str) -> None:
    url = f"{gcs_bucket}/a"
    store.requests.clear()
    with faults(store, lambda _: Fault.UNAVAILABLE), pytest.raises(EvenmixError) as caught:
        CALLS[purpose](url)
    assert str(caught.value) == (
        f"{url} cannot be {purpose} (HTTP 503); start the same command again later"
    )
    assert len(store.requests) == 8 * 6  # evenmix's attempts, each with those of gcsfs
    with (
        faults(store, lambda _: Fault.CUT_REQUEST),
        pytest.raises(EvenmixError, match=re.escape(f"{url} is out of reach (Server")),
    ):
        CALLS[purpose](url)


def test_no_attempt_begins_after_the_time_for_an_outage(
    store: Proxy, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "OUTAGE_S", 0.0)
    store.requests.clear()
    with faults(store, lambda _: Fault.UNAVAILABLE), pytest.raises(EvenmixError, match="HTTP 503"):
        storage.read_bytes(f"{gcs_bucket}/a")
    assert len(store.requests) == 6


def test_an_answer_that_does_not_come_is_not_waited_for(
    store: Proxy, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish(f"{gcs_bucket}/a", b"data")
    monkeypatch.setattr(storage, "_STALL_TIMEOUT_S", 0.2)
    numbers, has_read, held = count(1), Event(), Queue[bool]()

    def hold_the_first(request: str) -> None:
        if next(numbers) == 1:
            held.put(has_read.wait(20))

    with faults(store, hold_the_first):
        assert storage.read_bytes(f"{gcs_bucket}/a") == b"data"
        has_read.set()
        assert held.get(timeout=20)


def test_bytes_that_were_damaged_on_the_way_never_appear(store: Proxy, gcs_bucket: str) -> None:
    def damage_chunks(request: str) -> Fault | None:
        return Fault.DAMAGED_REQUEST if request.startswith("PUT") else None

    with (
        faults(store, damage_chunks),
        pytest.raises(EvenmixError, match="a cannot be written"),
    ):
        storage.publish(f"{gcs_bucket}/a", LARGE)
    assert not storage.exists(f"{gcs_bucket}/a")


def test_a_bucket_that_does_not_exist_is_one_error_at_once(store: Proxy) -> None:
    with pytest.raises(EvenmixError, match=r"^gs://absent-bucket/a is in no bucket that exists$"):
        storage.publish("gs://absent-bucket/a", b"data")
    with pytest.raises(EvenmixError, match=r"^gs://absent-bucket/a does not exist$"):
        storage.list_files("gs://absent-bucket/a")
