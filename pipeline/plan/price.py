"""What planned work costs: hours of machines, and dollars."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.plan.figures import Figures
from pipeline.plan.model import StagePlan
from pipeline.plan.ranges import NOTHING, Range, total
from pipeline.stage import SHARDS_PER_LISTING

_HOUR_S = 3600
GIB = 2**30
"""Bytes of a GB in Google's prices (see costs.toml)."""


@dataclass(frozen=True)
class Price:
    """What a stage costs: ``workers`` machines for ``hours``, with ``vcpu_hours`` in all.

    Machines and requests (and shuffles) are to be paid once, ``usd_month`` each month for what is
    stored.
    """

    workers: int
    hours: Range
    vcpu_hours: Range
    machines_usd: Range
    requests_usd: Range
    usd_month: Range

    @property
    def usd(self) -> Range:
        """What is to be paid once."""
        return self.machines_usd + self.requests_usd


def price(plan: StagePlan, figures: Figures) -> Price:
    """Return what a stage costs; nothing if there is no work."""
    work, machine, prices = plan.work, plan.machine, figures.prices
    if not plan.items:
        return Price(0, *[NOTHING] * 5)
    busy_s = work.worker_s / machine.vcpus
    start_s = figures.machines.start_s.range * plan.jobs
    if work.gpu_s.high:
        # A GPU captions while the machine's processes prepare what comes next.
        busy_s = busy_s.at_least(work.gpu_s / machine.gpus)
        start_s += figures.caption.server_start_s
    busy_s = busy_s * figures.machines.waste
    workers = machine.used_by(plan.items)
    alone_hours = work.alone_s / _HOUR_S
    together_hours = (busy_s + start_s * workers) / _HOUR_S
    hours = together_hours / workers + alone_hours
    return Price(
        workers=workers,
        hours=hours,
        vcpu_hours=together_hours * machine.vcpus + alone_hours * plan.machine_alone.vcpus,
        machines_usd=together_hours * machine.hourly(prices)
        + alone_hours * plan.machine_alone.hourly(prices),
        requests_usd=requests_usd(plan, hours, figures),
        usd_month=stored_usd(work.stored_bytes, figures),
    )


def requests_usd(plan: StagePlan, hours: Range, figures: Figures) -> Range:
    """Return what requests, and shuffles, of a stage cost that takes so many hours."""
    work, prices = plan.work, figures.prices
    pages = math.ceil(plan.items / SHARDS_PER_LISTING)
    # A driver looks for what is new once a second at most.
    listings = hours * figures.machines.listings_per_hour.range.at_most(pages * _HOUR_S)
    class_a = (work.class_a + listings) / 1000 * prices.class_a_thousand
    class_b = work.class_b / 1000 * prices.class_b_thousand
    return class_a + class_b + prices.shuffled_gb.range * (plan.shuffled_bytes / GIB)


def stored_usd(num_bytes: Range, figures: Figures) -> Range:
    """Return what it costs to keep so many bytes for a month."""
    return num_bytes / GIB * figures.prices.stored_gb_month


def all_of(found: Iterable[Price]) -> Price:
    """Return the price of stages that run one after the other, and the most machines of one."""
    prices = list(found)
    return Price(
        workers=max(price.workers for price in prices),
        hours=total(price.hours for price in prices),
        vcpu_hours=total(price.vcpu_hours for price in prices),
        machines_usd=total(price.machines_usd for price in prices),
        requests_usd=total(price.requests_usd for price in prices),
        usd_month=total(price.usd_month for price in prices),
    )
