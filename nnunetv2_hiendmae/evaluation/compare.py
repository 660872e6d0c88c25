"""Comparison of the runs of a dataset: means, spread, ranks and paired tests, per setting of folds."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import Splits, listed, read_splits
from nnunetv2_hiendmae.evaluation.metrics import DICE, Metric, chosen_metrics, tolerances_mm
from nnunetv2_hiendmae.evaluation.results import Run, collect_runs, matching, results_folder, run_names
from nnunetv2_hiendmae.evaluation.statistics import foreground_mean, holm, mean_along, mean_ranks, paired_test, summary

MEAN = "mean"  # stands where the name of a class could stand


@dataclass(frozen=True)
class SettingResult:
    """All runs in one setting, for instance in 5-fold cross-validation or trained on one case. NaN is not available.

    Args:
        folds: number of the fold -> what it is.
        common_cases: number of cases that all runs have.
        runs: a row for each run: `run` (its full name), `folds` with results and `missing_folds`, number of `cases`;
            `nnunet_foreground_mean` over the cases of all its folds, and `…_of_fold` of each; mean, std and number of
            values over cases (each with its mean over the classes it has a value for) and over folds;
            `mean_over_common_cases` and on these `mean_rank`, 1 is best; `per_class` over cases.
        comparisons: a row for each pair: `first` − `second` on the `folds` and cases that both have, `measure` "mean",
            and what `paired_test` gives; one family of tests for Holm's correction.
        class_comparisons: the same for every class as `measure`, another family.
        notes: what a reader must know before believing the numbers.
        all_pairs: as `comparisons`, of every pair whether there is a baseline or not: a family for the diagram.
    """

    setting: str
    folds: Mapping[int, str]
    classes: Sequence[str]
    common_cases: int
    runs: pd.DataFrame
    comparisons: pd.DataFrame
    class_comparisons: pd.DataFrame
    notes: Sequence[str]
    all_pairs: pd.DataFrame


@dataclass(frozen=True)
class Report:
    """What `hiendmae compare` found, as data: the tables and the figure are made of this.

    Args:
        labels: full name of a run -> the shortest one that tells it from the others.
        values: of every case; index setting, run, fold, case; columns "mean" (over the classes that the case has a
            value for) and the classes.
        metric: what the values are.
        signed: of volumes, differences with their sign, as `values`.
        others: name of a metric beside Dice -> report of it, of the same runs and cases.
    """

    dataset: str
    baseline: str | None
    seed: int
    notes: Sequence[str]
    settings: Sequence[SettingResult]
    labels: Mapping[str, str]
    values: pd.DataFrame
    metric: Metric = DICE
    signed: pd.DataFrame | None = None
    others: Mapping[str, "Report"] = field(default_factory=dict)

    @property
    def dice(self) -> pd.DataFrame:
        """`values` of a report on Dice."""
        return self.values


def compare(
    dataset: str | int,
    *,
    runs: Sequence[str] | None = None,
    baseline: str | None = None,
    folds: Sequence[int] | None = None,
    seed: int = 0,
    metrics: Sequence[str] = (DICE.name,),
    tolerance: Sequence[str] = (),
    num_processes: int = 4,
) -> Report:
    """Compares runs by the Dice that nnU-Net measured on each fold's validation cases, and by metrics of the
    predictions that it stored there.

    Folds that mean different things are never put together: cross-validation, 1-shot, 10% and so on are settings of
    their own, and so are other seeds of them.

    Args:
        runs: trainers, plans, whole names, or patterns of one of these with * and ?; None: all.
        baseline: a run that all others are compared with, told in the same way; None: every pair.
        folds: numbers; None: all.
        seed: of the bootstrap, 0 or above.
        metrics: some of `evaluation.metrics.METRICS`; Dice is always there.
        tolerance: of NSD in mm, 1 by default: "2" for all classes, "liver=2" for one.
        num_processes: that measure surfaces, 1 or above.

    Raises:
        UserError: no results, unknown runs, folds, metrics or classes, a number out of range, or files that are damaged
            or, for metrics beside Dice, missing.
    """
    for option, value, least in (("--seed", seed, 0), ("-np", num_processes, 1)):
        if value < least:
            raise UserError(f"{option} is {value}, needed {least} or more")
    others = chosen_metrics(metrics, tolerance)
    folder = results_folder(dataset)
    splits = read_splits(nnunet_folder("nnUNet_preprocessed") / folder.name)
    if baseline is not None:
        fitting = matching(baseline, run_names(folder), "--baseline")
        if len(fitting) > 1:
            raise UserError(f"--baseline {baseline} fits several runs, needed one of: {listed(fitting)}")
        baseline = fitting[0]
    found = collect_runs(folder, runs if runs is None or baseline is None else [*runs, baseline])
    names = [run.name for run in found]
    pairs = list(combinations(names, 2) if baseline is None else product(names, [baseline]))
    settings = _settings(found, splits, folds)
    dice = values_of(found, settings)
    classes, results = list(dice.columns[1:]), []
    tolerances = tolerances_mm(tolerance, classes)
    for setting, numbers in settings.items():
        there, meanings = dice.loc[setting], {fold: splits.meaning(fold) for fold in numbers}
        notes = list(_notes(there, numbers, found, splits, baseline))
        results.append(setting_result(setting, meanings, there, pairs, seed, notes))
    notes = [f"{r.name}: fold_all is left out, it validates on its training cases" for r in found if r.has_fold_all]
    if not splits.folds:
        notes.append("no splits_final.json: which cases belong to which fold was not checked")
    report = Report(folder.name, baseline, seed, notes, results, short_names(names), dice)
    if not others:
        return report
    from nnunetv2_hiendmae.evaluation.beside_dice import reports_beside

    return replace(report, others=reports_beside(report, others, found, settings, pairs, tolerances, num_processes))


def setting_result(
    setting: str,
    folds: Mapping[int, str],
    values: pd.DataFrame,
    pairs: Sequence[tuple],
    seed: int,
    notes: Sequence[str],
    metric: Metric = DICE,
) -> SettingResult:
    """`values`: as `Report.values`, of one setting."""
    classes, everything = list(values.columns[1:]), list(combinations(values.index.unique("run"), 2))
    tests = _comparisons(values, pairs, [MEAN], seed)
    return SettingResult(
        setting,
        folds,
        classes,
        int((values.groupby(["fold", "case"]).size() == values.index.unique("run").size).sum()),
        _runs(values, [*folds], metric),
        tests,
        _comparisons(values, pairs, classes, seed),
        notes,
        tests if len(tests) == len(everything) else _comparisons(values, everything, [MEAN], seed),
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Full name -> the parts of TRAINER__PLANS__CONFIGURATION that tell the runs apart; plans alone if they do."""
    parts = [name.split("__") for name in names]
    for chosen in ((1,), (0,), (2,), (0, 1), (1, 2), (0, 2)):
        short = ["__".join(p[i] for i in chosen) for p in parts]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _settings(runs: Sequence[Run], splits: Splits, wanted: Sequence[int] | None) -> dict[str, list[int]]:
    """Settings with results, in the order in which they are shown -> all their folds, with results or without."""
    present = {fold for run in runs for fold in run.folds}
    if unknown := sorted(set(wanted or ()) - present):
        there = listed(sorted(present))
        raise UserError(f"--folds {listed(unknown)}: no run has results of it; there are results of: {there}")
    grouped = defaultdict(list)
    for fold in sorted({*range(len(splits.folds)), *present}):
        if wanted is None or fold in wanted:
            grouped[splits.setting(fold)].append(fold)
    return {name: folds for (_, name), folds in sorted(grouped.items()) if present & set(folds)}


def values_of(runs: Sequence[Run], settings: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """As `Report.values`; the classes must be the same in all folds of all runs."""
    known = [(f"{run.name} fold {fold}", list(table)) for run in runs for fold, table in run.folds.items()]
    first, classes = known[0]
    for name, other in known:
        if other != classes:
            raise UserError(
                f"{name} has the classes {listed(other)}, {first} has {listed(classes)}: their Dice cannot be "
                "compared; choose others with --runs"
            )
    # a class that is called like the mean keeps its number: both are columns
    names = {key: name for key, name in next(run for run in runs if run.folds).class_names.items() if name != MEAN}
    tables = {
        (setting, run.name, fold): run.folds[fold]
        for setting, folds in settings.items()
        for run, fold in product(runs, folds)
        if fold in run.folds
    }
    dice = pd.concat(tables, names=["setting", "run", "fold", "case"])
    means = mean_along(np.ascontiguousarray(dice), 1)
    dice.columns = [names.get(key, f"label {key}") for key in classes]
    dice.insert(0, MEAN, means)
    return dice


def _runs(dice: pd.DataFrame, folds: Sequence[int], metric: Metric) -> pd.DataFrame:
    """As `SettingResult.runs`."""
    complete = dice[MEAN].unstack("run").sort_index().dropna()
    common_means = dict(zip(complete, mean_along(np.ascontiguousarray(complete), 0), strict=True))
    # of mean_ranks, which takes the highest for the best
    better = complete.to_numpy().T * (1 if metric.higher_is_better else -1)
    ranks = dict(zip(complete, mean_ranks(better), strict=True)) if len(complete.columns) > 1 else {}
    rows = []
    for run, table in dice.droplevel("run").groupby(dice.index.get_level_values("run"), sort=False):
        classes, own = table.drop(columns=MEAN), [fold for fold in folds if fold in table.index.unique("fold")]
        # numpy adds in the order of memory, which decides the last bit: a fold class by class, as nnU-Net does it
        fold_means = {fold: foreground_mean(np.asfortranarray(classes.loc[fold])) for fold in own}
        rows.append(
            {
                "run": run,
                "folds": own,
                "missing_folds": [fold for fold in folds if fold not in own],
                "cases": len(table),
                "nnunet_foreground_mean": foreground_mean(np.ascontiguousarray(classes)),
                **summary(table[MEAN], "cases"),
                **summary(fold_means.values(), "folds"),
                "nnunet_foreground_mean_of_fold": fold_means,
                "mean_over_common_cases": common_means[run],
                "mean_rank": ranks.get(run, np.nan),
                "per_class": {name: summary(values, "cases") for name, values in classes.items()},
            }
        )
    return pd.DataFrame(rows)


def _comparisons(dice: pd.DataFrame, pairs: Iterable[tuple], measures: Iterable[str], seed: int) -> pd.DataFrame:
    """As `SettingResult.comparisons`, one family of tests; pairs of which a run is missing here are left out."""
    by_run, folds = dice.unstack("run").sort_index(), dice.reset_index("fold").groupby("run")["fold"].unique()
    rows = []
    for measure, (first, second) in product(measures, pairs):
        if first == second or not {first, second} <= {*folds.index}:
            continue
        both = by_run[measure][[first, second]].dropna()
        # a case counts once, with its mean over the folds that validate on it: these are not independent
        case, _ = pd.factorize(both.index.get_level_values("case"))
        once = [np.bincount(case, both[run]) / np.bincount(case) for run in (first, second)]
        shared = [fold for fold in folds[first].tolist() if fold in folds[second]]
        test = paired_test(*once, seed)
        rows.append({"first": first, "second": second, "measure": measure, "folds": shared, **test})
    tests = pd.DataFrame(rows)
    return tests.assign(p_holm=holm(tests["p_wilcoxon"])) if rows else tests


def _notes(
    dice: pd.DataFrame, folds: Sequence[int], found: Sequence[Run], splits: Splits, baseline: str | None
) -> Iterator[str]:
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
        started = listed(fold for fold in missing if fold in run.unfinished)
        note = f" (started, without validation/summary.json: {started}; run nnUNetv2_train … --val)" if started else ""
        yield f"no result of fold {listed(missing)}{note}"


def _notes_on_cases(table: pd.DataFrame, splits: Splits) -> Iterator[str]:
    names = table.index.get_level_values("case")
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
    if repeated := names.duplicated().sum():
        yield (
            f"{repeated} results are of cases that an earlier fold validated too: means over cases count them again, "
            "the paired tests take a case's mean over its folds"
        )
