"""Downloads from servers that misbehave in every way we know, over real sockets."""

import asyncio
import gc
import socket
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from pipeline import addresses, fetch
from pipeline.fetch import Fetched, fetch_all
from pipeline.reasons import RejectReason
from pipeline.recipe import Fetch
from tests.hostile import (
    GOOD_BODY,
    Server,
    gzip_bomb,
    make_certificate,
    mute_tls_port,
    run_server,
    silent_port,
)

MAX_BYTES = 1_000_000
TIMEOUT_S = 3.0  # less than the 3.6 s of slow-count-down/5
# Stands for the internet: an address of this machine that the tests declare public.
PUBLIC = "127.0.0.99"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_server() as running:
        yield running


def _policy(**changes: Any) -> Fetch:
    settings = {"timeout_s": TIMEOUT_S, "backoff_s": 0.01, "allow_private_addresses": True}
    return Fetch(**(settings | changes))


def _fetch(*urls: str, max_bytes: int = MAX_BYTES, **changes: Any) -> list[Fetched]:
    return fetch_all(urls, _policy(**changes), max_bytes, lambda _, fetched: fetched)


def _only(url: str, **changes: Any) -> Fetched:
    (fetched,) = _fetch(url, **changes)
    return fetched


# Every misbehaviour, with what becomes of it: the reason, the attempts of three that it has, and
# a part of the detail.
_R = RejectReason
_TOO_LATE = f"not there after {TIMEOUT_S:g} s"
MISBEHAVIOURS: dict[str, tuple[RejectReason, int, str]] = {
    "silent/": (_R.TIMEOUT, 3, _TOO_LATE),
    "drip-headers/": (_R.TIMEOUT, 3, _TOO_LATE),
    "drip-body/": (_R.TIMEOUT, 3, _TOO_LATE),
    "continue/": (_R.TIMEOUT, 3, _TOO_LATE),
    "slow-count-down/5": (_R.TIMEOUT, 3, _TOO_LATE),
    "endless/": (_R.TOO_MANY_BYTES, 1, "more than 1,000,000 bytes"),
    "huge-length/": (_R.TOO_MANY_BYTES, 1, "1,099,511,627,776 bytes announced"),
    "gzip-bomb/": (_R.TOO_MANY_BYTES, 1, "more than 1,000,000 bytes"),
    "endless-headers/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "many-headers/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "two-lengths/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "negative-length/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "no-http/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "gzip-cut/": (_R.BAD_RESPONSE, 1, "the gzip data end too early"),
    "gzip-lie/": (_R.BAD_RESPONSE, 1, "not gzip"),
    "brotli/": (_R.BAD_RESPONSE, 1, "content encoding br"),
    "status/204": (_R.BAD_RESPONSE, 1, "status 204"),
    "status/206": (_R.BAD_RESPONSE, 1, "status 206"),
    "status/304": (_R.BAD_RESPONSE, 1, "status 304"),
    "redirect-nowhere/": (_R.BAD_RESPONSE, 1, "status 302"),
    "short/": (_R.CONNECTION_FAILED, 3, "ClientPayloadError"),
    "short-chunks/": (_R.CONNECTION_FAILED, 3, "ClientPayloadError"),
    "bad-chunks/": (_R.BAD_RESPONSE, 1, "broken HTTP"),
    "disconnect/": (_R.CONNECTION_FAILED, 3, "ServerDisconnectedError"),
    "reset/": (_R.CONNECTION_FAILED, 3, "reset"),
    "reset-half-way/": (_R.CONNECTION_FAILED, 3, "ClientPayloadError"),
    "redirect-loop/": (_R.TOO_MANY_REDIRECTS, 1, "more than 5 redirects"),
    "count-down/6": (_R.TOO_MANY_REDIRECTS, 1, "more than 5 redirects"),
    "redirect/file:///etc/passwd": (_R.BAD_URL, 1, "not an http or https URL"),
    "redirect/http://user@127.0.0.1/": (_R.BAD_URL, 1, "user name"),
    "redirect/http://[::1": (_R.BAD_URL, 1, "IPv6"),
    "status/400": (_R.HTTP_ERROR, 1, "status 400"),
    "status/403": (_R.HTTP_ERROR, 1, "status 403"),
    "status/404": (_R.HTTP_ERROR, 1, "status 404"),
    "status/410": (_R.HTTP_ERROR, 1, "status 410"),
    "status/408": (_R.UNAVAILABLE, 3, "status 408"),
    "status/425": (_R.UNAVAILABLE, 3, "status 425"),
    "status/429": (_R.UNAVAILABLE, 3, "status 429"),
    "status/500": (_R.UNAVAILABLE, 3, "status 500"),
    "status/503": (_R.UNAVAILABLE, 3, "status 503"),
    "opt-out/": (_R.OPTED_OUT, 1, "noai"),
    "opt-out-redirect/": (_R.OPTED_OUT, 1, "noimageai"),
}
RETRYABLE = {_R.TIMEOUT, _R.CONNECTION_FAILED, _R.UNAVAILABLE}
# What arrives in the end, and the attempts that it takes.
WELL_BEHAVED = {
    **dict.fromkeys(("good/", "slow/", "wrong-type/", "no-length/", "chunked/", "gzip/"), 1),
    **dict.fromkeys(("set-cookie/", "count-down/5", "opt-out-of-others/"), 1),
    "bad-then-good/503-500": 3,
    "retry-after/503/soon": 2,
    "retry-after/503/-1": 2,
    "retry-after/503/Wed, 21 Oct 2015 07:28:00 GMT": 2,
    "retry-after/503/Wed, 21 Oct 2015 07:28:00 -0000": 2,
}


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, Fetched]:
    """Everything in one call: the good ones must come through the bad company."""
    paths = [*MISBEHAVIOURS, *WELL_BEHAVED]
    gzip_bomb()  # made by the server, it would hold up all the others, whose deadlines run
    fetched = _fetch(*map(server.url, paths), per_host=len(paths), concurrency=len(paths))
    return dict(zip(paths, fetched, strict=True))


@pytest.mark.parametrize("path", MISBEHAVIOURS)
def test_a_misbehaving_server_is_an_outcome(
    path: str, outcomes: dict[str, Fetched], server: Server
) -> None:
    reason, attempts, detail = MISBEHAVIOURS[path]
    fetched = outcomes[path]
    assert (fetched.reason, fetched.attempts) == (reason, attempts)
    assert fetched.retryable == (reason in RETRYABLE)
    assert fetched.body == b""
    assert detail in fetched.detail
    assert len(fetched.detail) <= 200
    assert fetched.duration_s < attempts * (TIMEOUT_S + 1)
    asked = len(server.seen(path))
    assert asked == (6 if path == "redirect-loop/" else attempts)


@pytest.mark.parametrize("path", WELL_BEHAVED)
def test_an_answer_arrives_whole(path: str, outcomes: dict[str, Fetched]) -> None:
    fetched = outcomes[path]
    assert (fetched.reason, fetched.status, fetched.body) == (None, 200, GOOD_BODY)
    assert fetched.attempts == WELL_BEHAVED[path]
    assert not fetched.retryable


def test_what_is_told_of_a_download(server: Server) -> None:
    before = time.time()
    fetched = _only(server.url("redirect//good/told"))
    assert fetched.url == server.url("redirect//good/told")
    assert fetched.final_url == server.url("good/told")
    assert before <= fetched.started.timestamp() <= before + fetched.duration_s + 1
    assert 0 < fetched.duration_s < TIMEOUT_S
    empty = _only(server.url("empty/"))
    assert (empty.reason, empty.status, empty.body) == (None, 200, b"")
    missing = _only(server.url("redirect//status/404/told"))
    assert (missing.status, missing.final_url) == (404, server.url("status/404/told"))


def test_what_the_server_is_told(server: Server) -> None:
    _fetch(server.url("set-cookie/a"), server.url("good/a"), user_agent="evenmix/9 (x)", per_host=1)
    (request,) = server.seen("good/a")
    assert request.headers == {
        "host": server.origin.removeprefix("http://"),
        "user-agent": "evenmix/9 (x)",
        "accept-encoding": "identity",
        "accept": "*/*",
    }


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "file:///etc/hostname", "ftp://example.com/x", "data:image/png;base64,AAAA"),
        *("//example.com/x", "http:///x", "http://u:p@example.com/", "http://u@example.com/"),
        *("http://example.com:99999/", "http://[::1", "http://h\\@example.com/", "\ud800"),
        *("http://xn--b=.example/", "http://[]@/x"),
    ],
)
def test_what_is_no_url_is_not_asked_for(url: str) -> None:
    fetched = _only(url)
    assert (fetched.reason, fetched.attempts, fetched.retryable) == (_R.BAD_URL, 0, False)
    assert fetched.url == fetched.final_url == url


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254"),
    ],
)
def test_private_addresses_are_not_connected_to(host: str, server: Server) -> None:
    port = server.origin.rsplit(":", 1)[1]
    connections = server.connections
    fetched = _only(f"http://{host}:{port}/good/private", allow_private_addresses=False)
    assert (fetched.reason, fetched.retryable) == (_R.PRIVATE_ADDRESS, False)
    assert server.connections == connections


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server at the one address of this machine that counts as public."""
    is_public = addresses.is_public

    def is_public_here(address: IPv4Address | IPv6Address) -> bool:
        return address == ip_address(PUBLIC) or is_public(address)

    monkeypatch.setattr(addresses, "is_public", is_public_here)
    with run_server(PUBLIC) as running:
        yield running


def test_redirects_to_private_addresses_are_not_followed(internet: Server, server: Server) -> None:
    targets = ["http://169.254.169.254/latest/meta-data/", server.url("good/redirected")]
    targets += ["http://localhost/", "http://[::1]/", "http://2130706433/"]
    urls = [internet.url(f"redirect/{target}") for target in targets]
    outcomes = _fetch(*urls, internet.url("good/"), allow_private_addresses=False)
    assert [fetched.reason for fetched in outcomes] == [_R.PRIVATE_ADDRESS] * 5 + [None]
    assert [fetched.final_url for fetched in outcomes[:5]] == targets
    assert server.seen("good/redirected") == []


def test_a_name_that_moves_to_a_private_address_stays_where_it_was(
    internet: Server, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[PUBLIC], ["127.0.0.1"]]
    monkeypatch.setattr(addresses, "look_up", lambda host: answers.pop(0))
    url = internet.url("disconnect/rebound").replace(PUBLIC, "rebinding.example")
    # New connections each time, and nobody asks for the name's address again.
    assert _only(url, allow_private_addresses=False).attempts == 3
    assert len(internet.seen("disconnect/rebound")) == 3
    assert answers == [["127.0.0.1"]]
    # The next call does, and refuses.
    assert _only(url, allow_private_addresses=False).reason == _R.PRIVATE_ADDRESS


def test_of_a_name_with_both_only_the_public_address_is_used(
    internet: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "look_up", lambda host: ["127.0.0.1", PUBLIC])
    url = internet.url("good/both").replace(PUBLIC, "both.example")
    assert _only(url, allow_private_addresses=False).body == GOOD_BODY


def test_unknown_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str) -> list[str]:
        error = {"gone.example": socket.EAI_NONAME}.get(host, socket.EAI_AGAIN)
        raise socket.gaierror(error, "no answer")

    monkeypatch.setattr(addresses, "look_up", look_up)
    gone, later = _fetch("http://gone.example/", "http://later.example/")
    # Asked for once; but a name that seems not to exist may be one of a network that is down.
    assert (gone.reason, gone.retryable, gone.attempts) == (_R.UNKNOWN_HOST, True, 1)
    assert (later.reason, later.retryable, later.attempts) == (_R.UNKNOWN_HOST, True, 3)


def test_a_look_up_that_hangs_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(addresses, "look_up", lambda host: released.wait(60) and [])
    begun = time.monotonic()
    fetched = _fetch(*(f"http://{n}.example/" for n in range(40)), timeout_s=0.5, attempts=1)
    assert {each.reason for each in fetched} == {_R.TIMEOUT}
    assert time.monotonic() - begun < 20
    released.set()


def test_silence_where_tls_should_be(server: Server) -> None:
    plain_text = server.url("good/").replace("http:", "https:")
    with silent_port() as port:
        urls = [f"https://127.0.0.1:{port}/{n}" for n in range(50)]
        begun = time.monotonic()
        *silent, wrong = _fetch(*urls, plain_text, attempts=1, timeout_s=1, per_host=51)
    assert time.monotonic() - begun < 20
    assert {each.reason for each in silent} == {_R.TIMEOUT}
    assert (wrong.reason, wrong.retryable) == (_R.CONNECTION_FAILED, True)
    assert "SSL" in wrong.detail


def test_refused_connections_may_pass() -> None:
    with silent_port() as port:
        pass
    fetched = _only(f"http://127.0.0.1:{port}/", attempts=2)
    assert (fetched.reason, fetched.attempts) == (_R.CONNECTION_FAILED, 2)
    assert fetched.retryable


def test_tls_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, certificate = make_certificate(tmp_path, "127.0.0.1")
    with run_server(tls=context) as secure:
        strange = _only(secure.url("good/"))
        assert (strange.reason, strange.retryable) == (_R.CONNECTION_FAILED, False)
        assert "certificate" in strange.detail
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert _only(secure.url("good/")).body == GOOD_BODY


@pytest.mark.parametrize("first_words", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_hundreds_of_mute_tls_connections_end_at_once(
    first_words: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, certificate = make_certificate(tmp_path, "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    gc.collect()
    with (
        mute_tls_port(context, first_words) as port,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")  # of connections that are left to the garbage collector
        urls = [f"https://127.0.0.1:{port}/{n}" for n in range(200)]
        begun = time.monotonic()
        outcomes = _fetch(*urls, attempts=1, per_host=200, concurrency=200)
        # aiohttp would say goodbye to each, for which it waits for 30 s.
        assert time.monotonic() - begun < TIMEOUT_S + 15
        gc.collect()
    assert [str(warning.message) for warning in warned] == []
    assert {fetched.reason for fetched in outcomes} == {_R.TIMEOUT}


@pytest.mark.parametrize("path", ["retry-after/429/1", "retry-after-date/a"])
def test_the_whole_host_waits_as_long_as_it_asks(path: str) -> None:
    with run_server() as server:
        others = [server.url(f"good/{n}") for n in range(4)]
        first, *rest = _fetch(server.url(path), *others, concurrency=1)
    assert (first.reason, first.attempts) == (None, 2)
    assert {fetched.reason for fetched in rest} == {None}
    assert 1 <= first.duration_s < 10
    begun, *later = [request.at_s for request in server.requests]
    assert len(later) == 5
    assert min(later) - begun >= 1


def test_a_long_wait_is_not_waited_for() -> None:
    with run_server() as server:
        # 503 may be about one file; 429 is about us, and the host is not asked again.
        busy, file = _fetch(server.url("retry-after/503/3600"), server.url("good/"), per_host=1)
        limited, other = _fetch(server.url("retry-after/429/3600"), server.url("good/"), per_host=1)
    assert (busy.reason, busy.attempts, busy.retryable) == (_R.UNAVAILABLE, 1, True)
    assert file.reason is None
    assert (limited.reason, limited.attempts, limited.retryable) == (_R.UNAVAILABLE, 1, True)
    assert (other.reason, other.attempts, other.retryable) == (_R.UNAVAILABLE, 0, True)
    assert "asked for no requests for another 3600 s" in other.detail
    assert len(server.requests) == 3


def test_a_host_gets_few_requests_at_once() -> None:
    with run_server() as one, run_server() as other_port, run_server("127.0.0.2") as target:
        urls = [server.url(f"slow/{n}") for n in range(15) for server in (one, other_port)]
        # Redirects count for the host that they lead to.
        urls += [one.url(f"redirect/{target.url(f'slow/{n}')}") for n in range(30)]
        begun = time.monotonic()
        outcomes = _fetch(*urls, per_host=3)
        assert {fetched.reason for fetched in outcomes} == {None}
        assert time.monotonic() - begun >= 30 / 3 * 0.05
        assert max(one.most_in_flight, other_port.most_in_flight) <= 3
        assert target.most_in_flight == 3


def test_requests_in_flight_are_limited_in_all() -> None:
    with run_server() as one, run_server("127.0.0.2") as two:
        urls = [server.url(f"slow/{n}") for n in range(20) for server in (one, two)]
        begun = time.monotonic()
        outcomes = _fetch(*urls, per_host=8, concurrency=4)
        assert {fetched.reason for fetched in outcomes} == {None}
        assert time.monotonic() - begun >= 40 / 4 * 0.05
        assert max(one.most_in_flight, two.most_in_flight) <= 4


def test_waiting_for_a_turn_does_not_count() -> None:
    with run_server() as server:
        urls = [server.url(f"slow/{n}") for n in range(40)]
        outcomes = _fetch(*urls, per_host=1, timeout_s=1.5, attempts=1)
    assert {fetched.reason for fetched in outcomes} == {None}
    assert max(fetched.duration_s for fetched in outcomes) < 1.5


def test_connections_are_kept(server: Server) -> None:
    before = server.connections
    _fetch(*(server.url(f"good/{n}") for n in range(200)), per_host=4)
    assert server.connections - before <= 4


def test_bytes_after_an_answer_are_no_answer_to_the_next_request(server: Server) -> None:
    outcomes = _fetch(*(server.url(f"long/{n}") for n in range(20)), per_host=1)
    assert {fetched.body for fetched in outcomes} == {b"short"}


def test_results_come_in_the_order_of_the_urls(server: Server) -> None:
    # The first is answered after 0.6 s.
    paths = ["slow-count-down/0", *(f"good/{n}" for n in range(50))]
    seen: list[int] = []

    def then(index: int, fetched: Fetched) -> str:
        seen.append(index)
        return f"{index} {fetched.url}"

    results = fetch_all([*map(server.url, paths)], _policy(per_host=8), MAX_BYTES, then)
    assert results == [f"{index} {server.url(path)}" for index, path in enumerate(paths)]
    assert sorted(seen) == list(range(51))
    assert seen[0] != 0  # as they arrive
    assert fetch_all([], _policy(), MAX_BYTES, then) == []


def test_large_bodies_have_another_thread_than_small_ones(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_SMALL_BYTES", len(GOOD_BODY) - 1)
    paths = [f"{kind}/{n}" for n in range(5) for kind in ("good", "empty")]
    threads = fetch_all(
        [*map(server.url, paths)], _policy(), MAX_BYTES, lambda *_: threading.current_thread().name
    )
    assert threads == ["large bodies_0", "downloads"] * 5


def test_slow_work_on_small_bodies_costs_no_other_download(server: Server) -> None:
    """Such as a small file that is a picture of millions of pixels.

    Here they are eight seconds of work, more than the deadline. The others need two answers: the
    first may be there as soon as the small ones, and be read between them.
    """
    urls = [server.url(f"good/{n}") for n in range(20)] + [server.url("slow-count-down/1")] * 20

    def then(index: int, fetched: Fetched) -> RejectReason | None:
        time.sleep(0.4 if "good" in fetched.url else 0)
        return fetched.reason

    policy = _policy(attempts=1, timeout_s=5, per_host=40)
    assert fetch_all(urls, policy, MAX_BYTES, then) == [None] * 40


def test_slow_work_on_the_bodies_holds_back_the_network() -> None:
    with run_server() as server:
        urls = [server.url(f"good/{n}") for n in range(60)]
        lead: list[int] = []

        def then(index: int, fetched: Fetched) -> None:
            time.sleep(0.01)
            lead.append(len(server.requests) - len(lead))

        fetch_all(urls, _policy(concurrency=4, per_host=4), MAX_BYTES, then)
    assert len(lead) == 60
    assert max(lead) <= 4


def test_an_error_of_the_caller_ends_the_downloads(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def then(index: int, fetched: Fetched) -> None:
        raise ZeroDivisionError(fetched.url)

    urls = [server.url(f"{kind}/{n}") for n in range(50) for kind in ("silent", "good", "slow")]
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="good"):
        policy = _policy(timeout_s=30, per_host=150, concurrency=150)
        fetch_all(urls, policy, MAX_BYTES, then)
    assert time.monotonic() - begun < 15  # not at the deadline of the silent ones
    gc.collect()
    assert caplog.records == []


def test_bombs_cost_no_more_than_the_cap(server: Server) -> None:
    _fetch(server.url("gzip-bomb/"))  # the server has made it now
    urls = [server.url(f"{kind}/{n}") for n in range(8) for kind in ("endless", "gzip-bomb")]
    tracemalloc.start()
    try:
        outcomes = _fetch(*urls, per_host=16)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {fetched.reason for fetched in outcomes} == {_R.TOO_MANY_BYTES}
    assert peak_bytes < 2 * 16 * MAX_BYTES


def test_large_bodies_share_their_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    max_bytes = 8_000_000
    monkeypatch.setattr(fetch, "_ROOM_BYTES", 2 * max_bytes)
    urls = [server.url(f"endless/{n}") for n in range(16)]
    tracemalloc.start()
    try:
        outcomes = _fetch(*urls, per_host=16, max_bytes=max_bytes)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {fetched.reason for fetched in outcomes} == {_R.TOO_MANY_BYTES}
    # Beside the room there are the starts of the bodies that wait, and what is read ahead of them.
    assert peak_bytes < 6 * max_bytes


def test_waiting_for_room_does_not_count(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_SMALL_BYTES", 0)
    monkeypatch.setattr(fetch, "_ROOM_BYTES", len(GOOD_BODY))
    kinds = ("good", "no-length", "chunked", "gzip")  # with known and unknown lengths
    urls = [server.url(f"{kind}/{n}") for n in range(2) for kind in kinds]

    def then(index: int, fetched: Fetched) -> RejectReason | None:
        time.sleep(0.2)
        return fetched.reason

    policy = _policy(attempts=1, timeout_s=0.5)
    assert fetch_all(urls, policy, len(GOOD_BODY), then) == [None] * 8


def test_calls_at_once_share_the_limits_and_no_errors() -> None:
    def fail(index: int, fetched: Fetched) -> None:
        raise ZeroDivisionError

    with run_server() as server, ThreadPoolExecutor() as threads:
        urls = [server.url(f"slow/{n}") for n in range(15)]
        policy = _policy(per_host=3)
        # One request: others would be given up when it fails, while the server still counts them.
        failing = threads.submit(fetch_all, urls[:1], policy, MAX_BYTES, fail)
        others = [
            threads.submit(fetch_all, urls, policy, MAX_BYTES, lambda _, fetched: fetched.reason)
            for _ in range(2)
        ]
        assert isinstance(failing.exception(), ZeroDivisionError)
        assert [call.result() for call in others] == [[None] * 15] * 2
    assert server.most_in_flight == 3


def test_nothing_is_left_of_a_call(server: Server) -> None:
    threads = set(threading.enumerate())
    _fetch(server.url("good/"), server.url("silent/"), attempts=1)
    # Threads of others, such as a server's, may have ended meanwhile.
    assert set(threading.enumerate()) <= threads


def test_it_runs_beside_another_event_loop(server: Server) -> None:
    async def main() -> Fetched:
        return await asyncio.to_thread(_only, server.url("good/"))

    assert asyncio.run(main()).body == GOOD_BODY
