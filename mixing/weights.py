"""What share of the trainer's samples each dataset of a mixture gets, as exact fractions.

Weights count repetitions: a small dataset of equal weight is seen more often, not padded. (i1's
finding is that equal weights over curated datasets are a strong default.)
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from mixing.manifest import MAX_COMMON_DENOMINATOR
from pipeline.errors import EvenmixError


def dataset_weights(
    datasets: Sequence[str], weights: Literal["equal"] | Mapping[str, float]
) -> dict[str, Fraction]:
    """Return each dataset's share; the shares sum to exactly one.

    Given weights are read as the decimal numbers they were written as, so 0.1 is 1/10.

    Raises:
        EvenmixError: the shares have no common denominator that a trainer could tabulate.
    """
    if weights == "equal":
        return {name: Fraction(1, len(datasets)) for name in datasets}
    given = {name: Fraction(str(weights[name])) for name in datasets}
    shares = {name: weight / sum(given.values()) for name, weight in given.items()}
    denominator = math.lcm(*(share.denominator for share in shares.values()))
    if denominator > MAX_COMMON_DENOMINATOR:
        raise EvenmixError(
            f"mixture.weights have the common denominator {denominator:,}, above "
            f"{MAX_COMMON_DENOMINATOR:,}; round them, for instance to three digits"
        )
    return shares
