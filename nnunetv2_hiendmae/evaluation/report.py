"""What a comparison found, as data: the tables and the figure are made of this."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nnunetv2_hiendmae.evaluation.folds import Setting
from nnunetv2_hiendmae.evaluation.results import case_means
from nnunetv2_hiendmae.evaluation.statistics import PairedTest

MEAN = "mean"  # stands where the name of a class could stand
Key = tuple[int, str]  # fold and case


@dataclass(frozen=True)
class RunResult:
    """One run in one setting. Means are NaN where there is nothing to average.

    Args:
        name: TRAINER__PLANS__CONFIGURATION.
        folds: folds with results, all of this setting.
        missing: folds of this setting that this run lacks.
        dice: (fold, case) -> Dice per class, (classes,).
        nnunet_mean: nnU-Net's foreground mean over the cases of all these folds.
        fold_means: nnU-Net's foreground mean of every fold.
        common_mean: mean over the cases that all runs of the setting have.
        rank: mean rank on those cases, 1 is best.
    """

    name: str
    folds: tuple[int, ...]
    missing: tuple[int, ...]
    dice: Mapping[Key, np.ndarray]
    nnunet_mean: float
    fold_means: Mapping[int, float]
    common_mean: float = math.nan
    rank: float = math.nan

    @property
    def values(self) -> np.ndarray:
        """(cases, classes)."""
        return np.stack(list(self.dice.values()))

    def measure(self, index: int | None) -> dict[Key, float]:
        """Dice per case of one class, or the mean over the classes that are there (index None)."""
        values = case_means(self.values) if index is None else self.values[:, index]
        return dict(zip(self.dice, values.tolist(), strict=True))


@dataclass(frozen=True)
class Comparison:
    """`first` − `second` on the folds and cases that both have.

    Args:
        measure: name of a class, or "mean".
    """

    first: str
    second: str
    measure: str
    folds: tuple[int, ...]
    test: PairedTest


@dataclass(frozen=True)
class SettingResult:
    """All runs in one setting, for instance in 5-fold cross-validation or trained on one case.

    Args:
        fold_meanings: number of the fold -> what it is.
        classes: names, in the order of `RunResult.values`.
        common_cases: number of cases that all runs have.
        comparisons: on the mean, one family of tests for Holm's correction.
        class_comparisons: on every class, another family.
        notes: what a reader must know before believing the numbers.
    """

    setting: Setting
    fold_meanings: Mapping[int, str]
    classes: tuple[str, ...]
    runs: tuple[RunResult, ...]
    common_cases: int
    comparisons: tuple[Comparison, ...]
    class_comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `hiendmae compare` found.

    Args:
        labels: full name of a run -> the shortest one that tells it from the others.
    """

    dataset: str
    labels: Mapping[str, str]
    baseline: str | None
    seed: int
    settings: tuple[SettingResult, ...]
    notes: tuple[str, ...]
