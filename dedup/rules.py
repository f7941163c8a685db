"""Rules: when two pictures count as copies, by the datasets that they come from.

Each dataset says what it wants; of two the stricter wish holds, unless the recipe has a rule for
that pair of datasets. A picture of a dataset and an evaluation picture are compared by the
dataset's own rule; one whose copies may stay loses equal ones all the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.dataset import Dataset, Duplicates, SecondLook
from pipeline.recipe import PairRule, Recipe

AGAINST = "_against"
"""Stands for the evaluation pictures where datasets are listed; it comes last."""

_STRICTER_DUPLICATES: Sequence[Duplicates] = ("near", "exact", "off")
_STRICTER_LOOK: Sequence[SecondLook] = ("none", "graphics", "all")


@dataclass(frozen=True)
class Rule:
    """When two pictures count as copies.

    ``duplicates`` is ``near``, ``exact`` or ``off``; ``threshold`` is the least cosine of near
    ones. ``second_look`` and ``mirrored`` are as in :class:`pipeline.dataset.Dataset`.
    """

    duplicates: Duplicates
    threshold: float
    second_look: SecondLook
    mirrored: bool

    @property
    def is_near(self) -> bool:
        """Tell whether near-duplicates count."""
        return self.duplicates == "near"

    @property
    def is_exact(self) -> bool:
        """Tell whether pictures with equal bytes or equal pixels count."""
        return self.duplicates != "off"


@dataclass(frozen=True)
class Rules:
    """The rules of all pairs of datasets, by the numbers of the datasets."""

    datasets: tuple[str, ...]
    table: tuple[tuple[Rule, ...], ...]

    def between(self, a: int, b: int) -> Rule:
        """Return the rule of two datasets, by their numbers."""
        return self.table[a][b]

    def near_datasets(self) -> list[str]:
        """Return the datasets of which descriptors are wanted, in order."""
        return [
            dataset
            for dataset, row in zip(self.datasets, self.table, strict=True)
            if dataset != AGAINST and any(rule.is_near for rule in row)
        ]

    def searched_datasets(self) -> list[str]:
        """Return the datasets that are searched: those, and the evaluation pictures with them."""
        near = self.near_datasets()
        return [*near, AGAINST] if near and AGAINST in self.datasets else near

    def look_at_all(self, dataset: int) -> bool:
        """Tell whether some rule of a dataset needs the thumbnails of all its pictures."""
        return any(
            rule.is_near and (rule.second_look == "all" or not rule.mirrored)
            for rule in self.table[dataset]
        )

    def look_at_graphics(self, dataset: int) -> bool:
        """Tell whether some rule of a dataset needs the thumbnails of its graphics."""
        return any(rule.is_near and rule.second_look == "graphics" for rule in self.table[dataset])

    def identity(self) -> dict[str, Any]:
        """Return the rules as JSON values."""
        return {
            f"{a} {b}": asdict(self.table[i][j])
            for i, a in enumerate(self.datasets)
            for j, b in enumerate(self.datasets)
            if i <= j
        }


def rules_of(recipe: Recipe) -> Rules:
    """Return the rules of a recipe; datasets are in order of their names."""
    names = sorted(recipe.datasets)
    own = {tuple(sorted(rule.between)): rule for rule in recipe.dedup.pairs}
    table = [
        [
            _changed(
                _stricter(recipe.datasets[a], recipe.datasets[b]), own.get(tuple(sorted((a, b))))
            )
            for b in names
        ]
        for a in names
    ]
    if recipe.dedup.against is not None:
        against = [_against(recipe.datasets[name]) for name in names]
        for row, rule in zip(table, against, strict=True):
            row.append(rule)
        # Evaluation pictures are not compared with each other.
        table.append([*against, Rule("off", 1.0, "none", True)])
        names.append(AGAINST)
    return Rules(tuple(names), tuple(tuple(row) for row in table))


def _stricter(a: Dataset, b: Dataset) -> Rule:
    return Rule(
        duplicates=max(a.duplicates, b.duplicates, key=_STRICTER_DUPLICATES.index),
        threshold=max(a.threshold, b.threshold),
        second_look=max(a.second_look, b.second_look, key=_STRICTER_LOOK.index),
        mirrored=a.mirrored and b.mirrored,
    )


def _changed(rule: Rule, pair: PairRule | None) -> Rule:
    """Return a rule with what the recipe says of this pair."""
    if pair is None:
        return rule
    return Rule(
        duplicates=pair.duplicates or rule.duplicates,
        threshold=pair.threshold or rule.threshold,
        second_look=pair.second_look or rule.second_look,
        mirrored=rule.mirrored if pair.mirrored is None else pair.mirrored,
    )


def _against(dataset: Dataset) -> Rule:
    duplicates: Literal["near", "exact"] = "near" if dataset.duplicates == "near" else "exact"
    return Rule(duplicates, dataset.threshold, dataset.second_look, dataset.mirrored)
