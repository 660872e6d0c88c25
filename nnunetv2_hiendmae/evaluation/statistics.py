"""Paired statistics of runs on the same cases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# with 5 differences the smallest two-sided p of the exact test is 2 / 2^5 = 0.0625
MIN_DIFFERENCES = 6
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the cases that both have a value for.

    Args:
        pairs: number of such cases.
        difference: mean of first − second; NaN without pairs.
        low, high: bootstrap 95% percentile interval of `difference`; NaN with fewer than 2 pairs.
        p: two-sided Wilcoxon signed-rank, NaN where it makes no sense.
        p_holm: `p` corrected for the family of tests it belongs to, NaN like `p`.
        reason: why there is no p, "" where there is one.
    """

    pairs: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = math.nan
    reason: str = ""


def paired_test(first: np.ndarray, second: np.ndarray, seed: int = 0) -> PairedTest:
    """Compares two runs case by case; a case where either is NaN is left out.

    Equal pairs are dropped before ranking (Wilcoxon's own treatment). With fewer than 6 pairs that differ there is no
    p: no outcome could fall below 0.05.

    Args:
        first, second: Dice of the same cases in the same order, (cases,).
        seed: of the bootstrap.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    difference = difference[~np.isnan(difference)]
    if not difference.size:
        return PairedTest(0, math.nan, math.nan, math.nan, math.nan, reason="no case in common")
    low, high = _bootstrap(difference, seed)
    changed = difference[difference != 0]
    p, reason = math.nan, ""
    if not changed.size:
        reason = f"all {difference.size} pairs are equal"
    elif changed.size < MIN_DIFFERENCES:
        reason = f"only {changed.size} pairs that differ, needed {MIN_DIFFERENCES}"
    else:
        p = float(stats.wilcoxon(changed).pvalue)
    return PairedTest(difference.size, float(difference.mean()), low, high, p, reason=reason)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN values are no tests and do not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of every run over the cases that all runs have a value for; 1 is the highest Dice, ties share.

    Args:
        values: (runs, cases).

    Returns:
        (runs,), NaN without such a case.
    """
    complete = values[:, ~np.isnan(values).any(axis=0)]
    if not complete.shape[1]:
        return np.full(len(values), np.nan)
    return stats.rankdata(-complete, axis=0).mean(axis=1)


def spread(values: np.ndarray) -> float:
    """Sample standard deviation (n − 1) of the values that are not NaN; NaN for fewer than two."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.std(ddof=1)) if known.size > 1 else math.nan


def _bootstrap(difference: np.ndarray, seed: int) -> tuple[float, float]:
    if difference.size < 2:
        return math.nan, math.nan
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
