"""Means, spreads, ranks and paired tests of runs on the same cases; NaN is a case without a value."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nnunetv2_hiendmae.evaluation.metrics import DECIMALS

# with 5 differences the smallest two-sided p of the exact test is 2 / 2^5 = 0.0625
MIN_DIFFERENCES = 6
# of the largest value, that differences are ranked by. Distances between voxels often tie, and rounding must not
# decide: 2.1 − 1.4 is not 1.4 − 0.7, and headers keep spacings as 32-bit floats
RANKED_DIGITS = 6
RESAMPLES = 10_000
CONFIDENCE = 0.95
# two one-sided tests at 5% reject where this interval lies within the margins (Schuirmann 1987)
EQUIVALENCE_CONFIDENCE = 0.90


def paired_test(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[object] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compares two runs case by case; a case where either is NaN is left out.

    Equal pairs are dropped before ranking (Wilcoxon's own treatment), and differences are ranked to six digits of the
    largest value: those that only rounding tells apart tie. With fewer than 6 pairs that differ there is no p: no
    outcome could fall below 0.05.

    Args:
        first, second: Dice of the same cases in the same order, (cases,).
        clusters: of which patient each case is, (cases,): a patient is one pair, with the mean difference of his cases,
            and the bootstrap draws patients. None: every case is one pair.
        seed: of the bootstrap.

    Returns:
        `pairs`, their number, and of `cases` in them; `mean_difference` of first − second over the pairs, NaN without
        any; `interval_95` and `interval_90`, low and high of bootstrap percentile intervals of it, NaN with fewer than
        2 pairs; `p_wilcoxon`, two-sided signed-rank; `p_holm`, NaN until it is corrected for its family of tests;
        `reason`, why there is no p (NaN), or "".
    """
    difference = pd.Series(np.subtract(first, second), dtype=float).dropna()
    cases = difference.size
    if clusters is not None:
        difference = difference.groupby(pd.factorize(np.asarray(clusters))[0][difference.index]).mean()
    ranked = difference.round(_decimals(first, second))
    changed = ranked[ranked != 0]
    p, reason = math.nan, ""
    if difference.empty:
        reason = "no case in common"
    elif changed.empty:
        reason = f"all {difference.size} pairs are equal"
    elif changed.size < MIN_DIFFERENCES:
        reason = f"only {changed.size} pairs that differ, needed {MIN_DIFFERENCES}"
    else:
        p = float(stats.wilcoxon(changed).pvalue)
    about = {"pairs": difference.size, "cases": cases, "mean_difference": float(difference.mean())}
    about["interval_95"], about["interval_90"] = _bootstrap(difference.to_numpy(), seed)
    return {**about, "p_wilcoxon": p, "p_holm": math.nan, "reason": reason}


def _decimals(*values: np.ndarray) -> int:
    """Those that leave `RANKED_DIGITS` of the largest value."""
    largest = np.nanmax(np.abs(np.asarray(values, dtype=float)), initial=0)
    return RANKED_DIGITS - math.ceil(math.log10(largest)) if largest else RANKED_DIGITS


def equivalent(pairs: int, interval_90: tuple[float, float], margin: float) -> bool | None:
    """Whether a difference is shown to be smaller than `margin`, by two one-sided tests at 5% as their interval says
    it; None with fewer than 6 pairs."""
    if pairs < MIN_DIFFERENCES:
        return None
    low, high = interval_90
    return -margin < low and high < margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN values are no tests and do not count."""
    p = pd.Series(p_values, dtype=float)
    known = p.dropna().sort_values()
    corrected = (known * np.arange(len(known), 0, -1)).clip(upper=1).cummax()
    return corrected.reindex(p.index).tolist()


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of every run over the cases that all runs have a value for, (runs, cases) -> (runs,); 1 is the highest
    Dice, ties share; NaN without such a case."""
    known = pd.DataFrame(values).dropna(axis="columns").round(DECIMALS)
    return known.rank(ascending=False).mean(axis="columns").to_numpy()


def summary(values: Iterable[float], over: str) -> dict[str, Any]:
    """Mean, sample standard deviation (n − 1) and number of the values that are not NaN, under the names of the output.

    The mean is NaN without a value, the standard deviation for fewer than two.
    """
    known = pd.Series(list(values), dtype=float).dropna()
    return {f"mean_over_{over}": known.mean(), f"std_over_{over}": known.std(), f"{over}_with_value": len(known)}


def foreground_mean(values: np.ndarray) -> float:
    """nnU-Net's foreground mean of (cases, classes): the mean of the classes' means; NaN if a class has no value."""
    return float(np.mean(mean_along(values, 0)))


def mean_along(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the values along an axis that are not NaN; NaN where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def _bootstrap(difference: np.ndarray, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Percentile intervals of the mean at both levels, of the same samples."""
    if difference.size < 2:
        return (math.nan, math.nan), (math.nan, math.nan)
    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", "batch": 1000}
    found = stats.bootstrap((difference,), np.mean, rng=np.random.default_rng(seed), **options)
    tail = 50 * (1 - EQUIVALENCE_CONFIDENCE)
    narrower = np.percentile(found.bootstrap_distribution, [tail, 100 - tail])
    return tuple(map(float, found.confidence_interval)), tuple(map(float, narrower))
