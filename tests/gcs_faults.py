"""Trouble with the tests' storage: requests that go wrong, and an emulator that goes down."""

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count

from tests.gcs import Fault, FaultOf, Proxy

PASSING = [fault for fault in Fault if fault is not Fault.DAMAGED_REQUEST]
"""The faults that whoever asks again does not see."""


@contextmanager
def trouble(
    proxy: Proxy, every: int, outages: Collection[int] = (), down_s: float = 0.0
) -> Iterator[Counter[Fault]]:
    """Let each `every`-th request go wrong, in every way in turn; yield how often each was chosen.

    At the requests whose numbers are `outages` the emulator is killed, and it starts again after
    `down_s` seconds.
    """
    numbers, chosen, restarts = count(1), Counter[Fault](), list[threading.Thread]()

    def fault_of(request: str) -> Fault | None:
        number = next(numbers)
        if number in outages:
            restarts.append(threading.Thread(target=proxy.restart, args=(down_s,)))
            restarts[-1].start()
        if number % every:
            return None
        fault = PASSING[number // every % len(PASSING)]
        chosen[fault] += 1
        return fault

    with faults(proxy, fault_of):
        yield chosen
    for restart in restarts:
        restart.join()
    assert len(restarts) == len(outages)


@contextmanager
def faults(proxy: Proxy, fault_of: FaultOf) -> Iterator[None]:
    """Have `fault_of` decide which requests go wrong."""
    before, proxy.fault_of = proxy.fault_of, fault_of
    try:
        yield
    finally:
        proxy.fault_of = before
