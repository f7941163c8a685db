"""The tables of `evenmix plan`."""

import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel
from rich import box
from rich.table import Table

from pipeline.dataflow import Command
from pipeline.plan.figures import Figure, Figures
from pipeline.plan.model import StagePlan, Work
from pipeline.plan.price import Price, all_of
from pipeline.plan.ranges import Interval, Range
from pipeline.plan.used import Used

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LEAST_PREFIXED = 1e4
"""Smaller numbers are written out."""


def span(number: Interval, unit: str = "", digits: int = 2) -> str:
    """Return a range for people, such as ``1.9-28``, ``200-1,100``, ``19-46 TB``.

    Estimates have so many digits that count, and at most two decimals; what is known has three and
    at most four, and whole numbers that are known are written out below a million.
    """
    is_known = number.low == number.high
    if is_known and not unit and number.low < 1e6 and number.low == int(number.low):
        return f"{int(number.low):,}"
    least = 0 if unit else _LEAST_PREFIXED
    scale, prefix = next(((s, p) for s, p in _PREFIXES if number.high >= max(s, least)), (1.0, ""))
    precision = (3, 4) if is_known else (digits, 2)
    low, high = (_digits(end / scale, *precision) for end in (number.low, number.high))
    return f"{low if low == high else f'{low}-{high}'} {prefix}{unit}".rstrip()


def _digits(number: float, count: int, most_decimals: int) -> str:
    """Return a number with so many digits that count."""
    if number == 0:
        return "0"
    decimals = min(most_decimals, count - 1 - math.floor(math.log10(number)))
    text = f"{round(number, decimals):,.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def time_table(plans: Sequence[StagePlan], prices: Sequence[Price]) -> Table:
    """Return the table of machines, hours and dollars."""
    table = _table(
        "what is to be done, in how much time, for how much",
        "stage", "pictures", "items", "machines", "hours", "vCPU hours", "$", "$ a month",
    )  # fmt: skip
    for plan, price in zip(plans, prices, strict=True):
        if not plan.items:
            table.add_row(plan.name, "0", "0", "done or not needed", "0", "0", "0", "0")
            continue
        table.add_row(
            plan.name,
            span(plan.work.pictures, digits=3),
            span(Range.exactly(plan.items)),
            f"{price.workers} x {plan.machine.machine_type}",
            *_times(price),
        )
    table.add_section()
    table.add_row("all", "", "", "", *_times(all_of(prices)))
    return table


def _times(price: Price) -> list[str]:
    return [span(r) for r in (price.hours, price.vcpu_hours, price.usd, price.usd_month)]


def bytes_table(plans: Sequence[StagePlan], prices: Sequence[Price]) -> Table:
    """Return the table of bytes and requests."""
    table = _table(
        "bytes, and requests to the bucket",
        "stage", "downloaded", "read", "written", "kept", "class A", "class B", "$",
    )  # fmt: skip
    all_work = sum((plan.work for plan in plans), Work())
    rows = [(plan.name, plan.work) for plan in plans]
    for (name, work), price in zip(rows, prices, strict=True):
        table.add_row(name, *_amounts(work), span(price.requests_usd))
    table.add_section()
    table.add_row("all", *_amounts(all_work), span(all_of(prices).requests_usd))
    return table


def _amounts(work: Work) -> list[str]:
    sizes = (work.downloaded_bytes, work.read_bytes, work.written_bytes, work.stored_bytes)
    requests = (work.class_a, work.class_b)
    return [span(size, "B") for size in sizes] + [span(number) for number in requests]


def used_table(
    plans: Sequence[StagePlan], prices: Sequence[Price], used: Mapping[Command, Used]
) -> Table:
    """Return the table of the plan beside what was used, two lines a stage."""
    table = _table(
        "what was planned for it all, and what runs have used",
        "stage", "", "pictures", "vCPU hours", "kept", "$ of machines", "$ a month",
    )  # fmt: skip
    for plan, price in zip(plans, prices, strict=True):
        if plan.name not in used:
            continue
        real = used[plan.name]
        table.add_row(
            plan.name,
            "planned",
            span(plan.work.pictures, digits=3),
            span(price.vcpu_hours),
            span(plan.work.stored_bytes, "B"),
            span(price.machines_usd),
            span(price.usd_month),
        )
        table.add_row(
            "",
            "used",
            span(Range.exactly(real.pictures)),
            "unknown" if real.vcpu_hours is None else span(Range.exactly(real.vcpu_hours)),
            span(Range.exactly(real.stored_bytes), "B"),
            "unknown" if real.usd is None else span(real.usd),
            span(real.usd_month),
        )
    return table


def figures_table(figures: Figures) -> Table:
    """Return the table of all figures with their sources."""
    table = _table("the figures", "figure", "low", "high")
    table.add_column("source", overflow="fold")
    for name, figure in _figures("", figures):
        table.add_row(name, f"{figure.low:g}", f"{figure.high:g}", figure.source)
    return table


def _figures(name: str, value: object) -> Iterator[tuple[str, Figure]]:
    """Yield the figures in a section or a table of them, by dotted name."""
    if isinstance(value, Figure):
        yield name, value
        return
    members = dict(value) if isinstance(value, BaseModel) else value
    assert isinstance(members, dict)
    for key, member in members.items():
        yield from _figures(f"{name}.{key}".lstrip("."), member)
