"""What share of the trainer's samples each dataset of a mixture gets, as exact fractions.

Weights count repetitions: a small dataset of equal weight is seen more often, not padded. (i1's
finding is that equal weights over curated datasets are a strong default, and that of weights by
size up to a threshold, ``cap:T``, the lower threshold is the better one.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mixing.manifest import MAX_COMMON_DENOMINATOR
from pipeline.errors import EvenmixError
from pipeline.mixture import CAP
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Weight:
    """A dataset's share; ``before_rounding`` is the share asked for, where that was rounded."""

    share: Fraction
    before_rounding: Fraction | None = None


def dataset_weights(recipe: Recipe, sizes: Mapping[str, int]) -> dict[str, Weight]:
    """Return the weight of each dataset of a mixture; the shares sum to exactly one.

    ``sizes`` has the number of pictures that are selected of each for training, at least one.
    Shares by size whose common denominator is above what a trainer tabulates are rounded to parts
    of that many.

    Raises:
        EvenmixError: as :func:`check_weights`.
    """
    datasets, weights = recipe.mixture_datasets(), recipe.mixture.weights
    if weights == "equal":
        return {name: Weight(Fraction(1, len(datasets))) for name in datasets}
    if not isinstance(weights, str):
        return {name: Weight(share) for name, share in _given(datasets, weights).items()}
    cap = CAP.fullmatch(weights)
    most = int(cap[1]) if cap else max(sizes.values())
    exact = _normalised({name: Fraction(min(sizes[name], most)) for name in datasets})
    if _common_denominator(exact) <= MAX_COMMON_DENOMINATOR:
        return {name: Weight(share) for name, share in exact.items()}
    parts = _apportion(exact, MAX_COMMON_DENOMINATOR)
    return {
        name: Weight(Fraction(parts[name], MAX_COMMON_DENOMINATOR), share)
        for name, share in exact.items()
    }


def check_weights(recipe: Recipe) -> None:
    """Check that weights which the recipe gives can be kept exactly; sizes are not needed.

    Raises:
        EvenmixError: they have no common denominator that a trainer could tabulate.
    """
    if not isinstance(recipe.mixture.weights, str):
        _given(recipe.mixture_datasets(), recipe.mixture.weights)


def _given(datasets: Sequence[str], weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Read weights as the decimal numbers that they were written as, so that 0.1 is 1/10."""
    shares = _normalised({name: Fraction(str(weights[name])) for name in datasets})
    denominator = _common_denominator(shares)
    if denominator > MAX_COMMON_DENOMINATOR:
        raise EvenmixError(
            f"mixture.weights have the common denominator {denominator:,}, above "
            f"{MAX_COMMON_DENOMINATOR:,}; round them, for instance to three digits"
        )
    return shares


def _normalised(weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _common_denominator(shares: Mapping[str, Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares.values()))


def _apportion(shares: Mapping[str, Fraction], num_parts: int) -> dict[str, int]:
    """Divide parts by largest remainder, of equal ones the first name's; none gets less than one.

    So each has less than one part more or less than its share, unless others are raised to one.
    """
    parts: dict[str, int] = {}
    others = dict(shares)
    while True:
        left = num_parts - len(parts)
        quotas = {name: share * left for name, share in _normalised(others).items()}
        tiny = [name for name, quota in quotas.items() if quota < 1]
        if not tiny:
            break
        for name in tiny:
            parts[name] = 1
            del others[name]
    by_remainder = sorted(quotas, key=lambda name: (math.floor(quotas[name]) - quotas[name], name))
    num_rounded_up = left - sum(map(math.floor, quotas.values()))
    for rank, name in enumerate(by_remainder):
        parts[name] = math.floor(quotas[name]) + (rank < num_rounded_up)
    return parts
