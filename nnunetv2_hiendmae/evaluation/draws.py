"""Which training cases of a fold a few-shot fold trains on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any

import numpy as np

from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.evaluation.patients import Patients, torn_patients
from nnunetv2_hiendmae.options import share_of

SHOTS, FRACTION = "shots", "fraction"

Fold = Mapping[str, Any]  # as in the file: "train" and "val", lists of case names


@dataclass(frozen=True)
class Subset:
    """A part of the training cases of a fold; its validation cases stay those of that fold.

    Args:
        kind: "shots" or "fraction".
        value: number of cases, or the part of the training cases in (0, 1].
        of_fold: the fold it is taken from.
        seed: decides the order in which cases are drawn.
        repeat: number of the draw; others draw other cases, as far as there are enough.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str
    value: int | float
    of_fold: int = 0
    seed: int = 0
    repeat: int = 0

    def __post_init__(self):
        if self.kind not in (SHOTS, FRACTION):
            raise ValueError(f"kind {self.kind!r} must be '{SHOTS}' or '{FRACTION}'")
        if self.kind == SHOTS and not (isinstance(self.value, int) and self.value >= 1):
            raise ValueError(f"--shots {self.value} must be a whole number of cases, at least 1")
        if self.kind == FRACTION and not 0 < self.value <= 1:
            raise ValueError(f"--fraction {self.value:g} must lie above 0 and not above 1 (0.1 is 10 percent)")
        for option, value in (("--of-fold", self.of_fold), ("--seed", self.seed), ("repeat", self.repeat)):
            if not (isinstance(value, int) and value >= 0):
                raise ValueError(f"{option} {value} must be a whole number, 0 or above")

    @property
    def amount(self) -> str:
        """'3-shot' or '10%'."""
        return f"{self.value}-shot" if self.kind == SHOTS else f"{100 * self.value:.10g}%"

    def num_cases(self, available: int) -> int:
        """Cases drawn from `available` ones."""
        return self.value if self.kind == SHOTS else share_of(available, self.value)

    def facts(self) -> dict[str, Any]:
        """As records and JSON have it: a single draw is written as version 0.1 does, which knows no repeats."""
        return {name: value for name, value in asdict(self).items() if name != "repeat" or value}

    def __str__(self) -> str:
        repeat = f", repeat {self.repeat}" if self.repeat else ""
        return f"{self.amount} of fold {self.of_fold} (seed {self.seed}{repeat})"


def draw(fold: Fold, subset: Subset, patients: Patients = MappingProxyType({})) -> dict[str, list[str]]:
    """The new fold: the first cases of an order that depends on nothing but the names of cases, their patients,
    `of_fold`, `seed` and `repeat`.

    Hence what is drawn for less is part of what is drawn for more, whether by shots or by fraction. Every case is of
    another patient while there are any. The first k patients of n repeats are all different while the fold has k · n.

    Raises:
        UserError: fewer training cases than shots, or a fold that trains on validation cases or their patients.
    """
    cases, number = sorted(set(fold["train"])), subset.of_fold
    if both := sorted(set(cases) & set(fold["val"])):
        raise UserError(f"fold {number} trains on validation cases ({some(both)}); take another one")
    if torn := torn_patients(fold, patients):
        raise UserError(
            f"fold {number} trains and validates on the same patients ({some(torn)}); take another one, or write a "
            "splits_final.json that keeps patients together (without one, hiendmae splits makes such folds)"
        )
    if (wanted := subset.num_cases(len(cases))) > len(cases):
        raise UserError(f"fold {number} has {len(cases)} training cases, fewer than --shots {wanted}; ask for fewer")
    shuffled = np.random.default_rng([subset.seed, number]).permutation(len(cases))
    order = _order([cases[i] for i in shuffled], subset.repeat, patients)
    return {"train": sorted(order[:wanted]), "val": list(fold["val"])}


def _order(cases: Sequence[str], repeat: int, patients: Patients) -> list[str]:
    """All cases in the order of a repeat: first one of every patient, then the second ones, and so on."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(patients.get(case, case), []).append(case)
    ordered = [[group[i] for i in _permutation(len(group), repeat)] for group in groups.values()]
    rounds = zip_longest(*(ordered[i] for i in _permutation(len(groups), repeat)))
    return [case for case in chain.from_iterable(rounds) if case is not None]


def _permutation(count: int, repeat: int) -> list[int]:
    """Order of `count` items in a repeat; in the first it is theirs.

    In each further one, those come first that all former ones draw latest. So among the first k of n repeats none is
    there twice while k · n ≤ count: at most k · (n − 1) were drawn by then, and the others come before them.
    """
    orders = [np.arange(count)]
    for _ in range(repeat):
        # (former repeats, items), the earliest place of each item first
        places = np.sort(np.argsort(orders, axis=1), axis=0)
        orders.append(np.lexsort(-places[::-1]))
    return orders[-1].tolist()
