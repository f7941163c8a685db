"""A model of the machines that work through a job's items, event by event.

Machines come one after the other, each after a start; each has slots that take one item at a time.
A machine may be preempted: what its slots were at is lost and waits for the next free slot, and
another machine is started in its place. All of them share limits, such as requests of a bucket:
an item that begins uses what it needs of each, in the order of beginnings, and is not done
before that is through.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_HOUR_S = 3600


@dataclass(frozen=True)
class Limit:
    """Units a second that all machines share; they double every ``doubling_s``."""

    name: str
    units_per_s: float
    doubling_s: float = math.inf

    def units_until(self, time_s: float) -> float:
        """Return how many units go through in a job's first ``time_s``."""
        if math.isinf(self.doubling_s):
            return self.units_per_s * time_s
        to_e_fold_s = self.doubling_s / math.log(2)
        # After hundreds of doublings nothing is limited any more.
        growth = math.expm1(min(time_s / to_e_fold_s, 500))
        return self.units_per_s * to_e_fold_s * growth

    def time_s_of(self, units: float) -> float:
        """Return when so many units are through, if there are always some to come."""
        if math.isinf(self.doubling_s):
            return units / self.units_per_s
        to_e_fold_s = self.doubling_s / math.log(2)
        return to_e_fold_s * math.log1p(units / (self.units_per_s * to_e_fold_s))


@dataclass(frozen=True)
class Job:
    """Items in the order in which they are begun: the seconds of a slot that each takes.

    ``uses`` has the units of each limit that each item needs.
    """

    item_s: Floats
    uses: Mapping[Limit, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Machines:
    """At most ``count`` machines of ``slots``.

    They are asked for one by one, twice as many every ``doubling_s`` (0: all at once), and start in
    between ``start_s``, evenly spread. The speeds of machines have ``speed_sigma`` as the standard
    deviation of their logarithm. ``preemptions_per_hour`` are those of one machine.
    """

    count: int
    slots: int
    start_s: tuple[float, float] = (0, 0)
    doubling_s: float = 0
    speed_sigma: float = 0
    preemptions_per_hour: float = 0


@dataclass(frozen=True)
class Outcome:
    """When the last item is done, and what machines are paid for.

    ``lost_s`` are the seconds of slots that were at items which a preemption ended; ``attempts``
    are those at all items.
    """

    finished_s: float
    machine_s: float
    lost_s: float
    attempts: int


@dataclass
class _Machine:
    """A machine from when it is asked for until it is preempted."""

    asked_s: float
    up_s: float
    gone_s: float
    slowness: float
    busy_until_s: float = 0

    def paid_s(self, finished_s: float) -> float:
        """Return for how long it is paid: until it is idle for good."""
        until_s = min(self.gone_s, finished_s, max(self.up_s, self.busy_until_s))
        return max(0.0, until_s - self.asked_s)


def _ask(machines: Machines, asked_s: float, rng: np.random.Generator) -> _Machine:
    up_s = asked_s + rng.uniform(*machines.start_s)
    gone_s = math.inf
    if machines.preemptions_per_hour:
        gone_s = up_s + rng.exponential(_HOUR_S / machines.preemptions_per_hour)
    return _Machine(asked_s, up_s, gone_s, float(np.exp(rng.normal(0, machines.speed_sigma))))


class _Queue:
    """The use of a limit by the items that have begun."""

    def __init__(self, limit: Limit, units: Floats) -> None:
        self._limit, self._units = limit, units.tolist()
        self._through = 0.0

    def use(self, item: int, now_s: float) -> float:
        """Return when an item's units are through that begins now."""
        self._through = max(self._through, self._limit.units_until(now_s)) + self._units[item]
        return self._limit.time_s_of(self._through)


def simulate(job: Job, machines: Machines, rng: np.random.Generator) -> Outcome:
    """Work through a job's items."""
    fleet = [
        _ask(machines, machines.doubling_s * math.log2(number + 1), rng)
        for number in range(machines.count)
    ]
    gone: list[_Machine] = []
    queues = [_Queue(limit, units) for limit, units in job.uses.items()]
    item_s: Sequence[float] = job.item_s.tolist()
    begun, lost_s, finished_s, attempts = 0, 0.0, 0.0, 0
    returned: list[tuple[float, int]] = []  # items, by the time when their machine is gone
    free = [(m.up_s, number) for number, m in enumerate(fleet) for _ in range(machines.slots)]
    heapq.heapify(free)
    while free:
        now_s, number = heapq.heappop(free)
        machine = fleet[number]
        if now_s >= machine.gone_s:
            gone.append(machine)
            fleet[number] = machine = _ask(machines, machine.gone_s, rng)
        if now_s < machine.up_s:
            heapq.heappush(free, (machine.up_s, number))
            continue
        if returned and returned[0][0] <= now_s:
            item = heapq.heappop(returned)[1]
        elif begun < len(item_s):
            item, begun = begun, begun + 1
        elif returned:
            heapq.heappush(free, (returned[0][0], number))
            continue
        else:
            continue  # Nothing is left, and what is under way will be done.
        attempts += 1
        end_s = now_s + item_s[item] * machine.slowness
        for queue in queues:
            end_s = max(end_s, queue.use(item, now_s))
        if end_s > machine.gone_s:
            end_s = machine.gone_s
            lost_s += end_s - now_s
            heapq.heappush(returned, (end_s, item))
        else:
            finished_s = max(finished_s, end_s)
        machine.busy_until_s = max(machine.busy_until_s, end_s)
        heapq.heappush(free, (end_s, number))
    machine_s = sum(machine.paid_s(finished_s) for machine in [*fleet, *gone])
    return Outcome(finished_s, machine_s, lost_s, attempts)


def terms_s(job: Job, machines: Machines) -> dict[str, float]:
    """Return what a job cannot be faster than, by name, on machines of equal speed.

    It is its work, evenly shared, its longest item, and each limit.
    """
    return {
        "work": float(job.item_s.sum()) / (machines.count * machines.slots),
        "longest item": float(job.item_s.max()),
        **{limit.name: limit.time_s_of(float(units.sum())) for limit, units in job.uses.items()},
    }
