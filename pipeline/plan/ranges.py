"""Numbers that are known from a low to a high value, none below zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Interval(Protocol):
    """Anything with a low and a high value."""

    @property
    def low(self) -> float:
        """The least that it may be."""

    @property
    def high(self) -> float:
        """The most that it may be."""


@dataclass(frozen=True)
class Range:
    """A number of at least ``low`` and at most ``high``.

    Sums and products go from lows to lows and from highs to highs, quotients from a low to a high,
    which holds as nothing is negative.
    """

    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Range":
        """Return a number that is known."""
        return cls(value, value)

    def __add__(self, other: Interval) -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Interval | float) -> "Range":
        if isinstance(other, int | float):
            return Range(self.low * other, self.high * other)
        return Range(self.low * other.low, self.high * other.high)

    def __truediv__(self, other: Interval | float) -> "Range":
        if isinstance(other, int | float):
            return Range(self.low / other, self.high / other)
        return Range(self.low / other.high, self.high / other.low)

    def at_least(self, other: Interval) -> "Range":
        """Return the greater of two numbers."""
        return Range(max(self.low, other.low), max(self.high, other.high))

    def at_most(self, limit: float) -> "Range":
        """Return the number, or a limit where that is less."""
        return Range(min(self.low, limit), min(self.high, limit))

    def rounded_up(self) -> "Range":
        """Return the next whole numbers."""
        return Range(math.ceil(self.low), math.ceil(self.high))


NOTHING = Range(0, 0)


def total(ranges: Iterable[Range]) -> Range:
    """Add up ranges."""
    return sum(ranges, NOTHING)
