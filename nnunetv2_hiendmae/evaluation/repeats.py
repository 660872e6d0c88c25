"""Dice of several draws of one few-shot fold: mean per case, and spread between draws."""

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.evaluation.folds import Splits
from nnunetv2_hiendmae.evaluation.statistics import summary


def over_repeats(values: pd.DataFrame, splits: Splits) -> pd.DataFrame:
    """Mean of every case over repeats, (fold, case): the fold becomes the one whose cases are validated.

    Where there are no repeats, nothing changes, the last bit included.
    """
    keys = _keys(values.index, splits)
    if not any(keys["repeat"]):
        return values
    return values.groupby([keys["fold"], keys["case"]], sort=False).mean()


def spread_over_repeats(dice: pd.Series, splits: Splits) -> dict[str, float]:
    """Summary over repeats of their means over the cases that all of them have, and their number; (fold, case)."""
    by_repeat = dice.groupby([*_keys(dice.index, splits).values()]).mean().unstack()
    return {**summary(by_repeat.dropna().mean(), "repeats"), "repeats": by_repeat.columns.size}


def _keys(index: pd.MultiIndex, splits: Splits) -> dict[str, pd.Index]:
    """Fold whose cases are validated, case and repeat of every result."""
    fold, repeat = np.array([splits.draw_of(n) for n in index.get_level_values("fold")], int).reshape(-1, 2).T
    case = index.get_level_values("case")
    return {"fold": pd.Index(fold, name="fold"), "case": case, "repeat": pd.Index(repeat, name="repeat")}
