"""Notes beside the tables of a comparison: what is missing, left out or counted twice."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import pandas as pd

from nnunetv2_hiendmae.evaluation.folds import Splits, listed
from nnunetv2_hiendmae.evaluation.metrics import MEAN
from nnunetv2_hiendmae.evaluation.repeats import over_repeats
from nnunetv2_hiendmae.evaluation.results import Run


def notes_on_setting(
    dice: pd.DataFrame, folds: Sequence[int], found: Sequence[Run], splits: Splits, baseline: str | None
) -> Iterator[str]:
    """What a reader must know before believing the numbers of a setting.

    Args:
        dice: index run, fold, case; columns as in `Report.values`.
        folds: all of the setting, with results or without.
        found: all runs.
    """
    tables = {run: dice.xs(run, level="run") for run in dice.index.unique("run")}
    about = defaultdict(list)  # (note, number of runs that may have it) -> those that have it
    for run in found:
        for note in _notes_on_folds(run, folds):
            about[note, len(found)].append(run.name)
    for run, table in tables.items():
        for note in _notes_on_cases(table, splits):
            about[note, len(tables)].append(run)
    for (note, total), names in about.items():
        yield f"{'all runs here' if 1 < len(names) == total else listed(names)}: {note}"
    if len({tuple(table.index.unique("fold")) for table in tables.values()}) > 1:
        yield (
            "the runs stand on different folds: compare them by the column on common cases and by the paired tests, "
            "not by their own means"
        )
    elif len({frozenset(table.index) for table in tables.values()}) > 1:
        yield "the runs have different validation cases; only common ones are paired"
    if baseline is not None and baseline not in tables:
        yield f"the baseline {baseline} has no result here, so nothing is tested"


def _notes_on_folds(run: Run, folds: Sequence[int]) -> Iterator[str]:
    if missing := [fold for fold in folds if fold not in run.folds]:
        started = {fold: run.unfinished[fold] for fold in missing if fold in run.unfinished}
        mend = f"started, without validation/summary.json: {listed(started)}; run: {'; '.join(started.values())}"
        note = f" ({mend})" if started else ""
        yield f"no result of fold {listed(missing)}{note}"


def _notes_on_cases(table: pd.DataFrame, splits: Splits) -> Iterator[str]:
    names = table.index.get_level_values("case")
    repeated = over_repeats(table, splits).index.get_level_values("case").duplicated().sum()
    values = table.drop(columns=MEAN).groupby("fold").count()  # (folds, classes)
    for fold in values.index:
        cases = set(table.loc[fold].index)
        expected = set(splits.folds[fold]["val"]) if fold < len(splits.folds) else cases
        if cases != expected:
            yield (
                f"the {len(cases)} validation cases of fold {fold} are not the {len(expected)} of splits_final.json; "
                "was it trained with other splits?"
            )
    if never := listed(values.columns[values.sum() == 0]):
        yield f"neither truth nor prediction holds {never}, so nnU-Net's foreground mean is n/a"
    elif undefined := listed(values.index[(values == 0).any(axis="columns")]):
        yield f"a class does not occur in fold {undefined}; left out of mean ± std over folds"
    if empty := listed(names[table[MEAN].isna()]):
        yield f"nothing to segment and nothing found in {empty}; left out"
    if repeated:
        yield (
            f"{repeated} results are of cases that an earlier fold validated too: means over cases count them again, "
            "the paired tests take a case's mean over its folds"
        )
