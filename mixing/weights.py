"""What share of the trainer's samples each dataset of a mixture gets, as exact fractions.

Weights count repetitions: a small dataset of equal weight is seen more often, not padded. (i1's
finding is that equal weights over curated datasets are a strong default.)
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal


def dataset_weights(
    datasets: Sequence[str], weights: Literal["equal"] | Mapping[str, float]
) -> dict[str, Fraction]:
    """Return each dataset's share; the shares sum to exactly one.

    Given weights are read as the decimal numbers they were written as, so 0.1 is 1/10.
    """
    if weights == "equal":
        return {name: Fraction(1, len(datasets)) for name in datasets}
    given = {name: Fraction(str(weights[name])) for name in datasets}
    return {name: weight / sum(given.values()) for name, weight in given.items()}
