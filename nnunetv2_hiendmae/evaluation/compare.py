"""Comparison of the runs of a dataset: means, spread, ranks and paired tests, per setting of folds."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import Splits, listed, read_splits
from nnunetv2_hiendmae.evaluation.metrics import DICE, MEAN, Metric, chosen_metrics, tolerances_mm
from nnunetv2_hiendmae.evaluation.notes import notes_on_setting
from nnunetv2_hiendmae.evaluation.patients import Patients, notes_on_patients, read_patients
from nnunetv2_hiendmae.evaluation.repeats import over_repeats, spread_over_repeats
from nnunetv2_hiendmae.evaluation.results import Run, collect_runs, matching, results_folder, run_names
from nnunetv2_hiendmae.evaluation.statistics import (
    equivalent,
    foreground_mean,
    holm,
    mean_along,
    mean_ranks,
    paired_test,
    summary,
)
from nnunetv2_hiendmae.evaluation.trainings import notes_on_trainings

CASE, PATIENT = "case", "patient"
_LEVELS = ("setting", "run", "fold", CASE)  # of `Report.values`


@dataclass(frozen=True)
class SettingResult:
    """All runs in one setting, for instance in 5-fold cross-validation or trained on one case. NaN is not available.

    Args:
        folds: number of the fold -> what it is.
        common_cases: number of cases that all runs have.
        runs: a row for each run: `run` (its full name), `folds` with results and `missing_folds`, number of `cases`;
            `nnunet_foreground_mean` over the cases of all its folds, and `…_of_fold` of each; mean, std and number of
            values over cases (each with its mean over the classes it has a value for) and over folds;
            `mean_over_common_cases` and on these `mean_rank`, 1 is best; `per_class` over cases; number of `patients`
            (of cases, where nothing is known of patients) and of `repeats`, and mean and std over these of their means
            over the cases that all of them have. A case counts with its mean over repeats.
        comparisons: a row for each pair: `first` − `second` on the `folds` and cases that both have, `measure` "mean",
            what `paired_test` gives, number of `repeats`, std over these of the mean difference, and whether the runs
            are `equivalent`; one family of tests for Holm's correction. A case is compared with itself in the same
            repeat, and counts with the mean of these differences.
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
        unit: what the tests take for independent, "patient" where there is a `patients.json`, else "case".
        equivalence: runs whose difference is below it are equivalent, in Dice points of 0.01.
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
    unit: str
    equivalence: float
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


@dataclass(frozen=True)
class Design:
    """What all tables of a comparison stand on; `pairs` of runs are tested."""

    splits: Splits
    patients: Patients
    pairs: Sequence[tuple[str, str]]
    seed: int
    equivalence: float


def compare(
    dataset: str | int,
    *,
    runs: Sequence[str] | None = None,
    baseline: str | None = None,
    folds: Sequence[int] | None = None,
    seed: int = 0,
    equivalence: float = 1.0,
    metrics: Sequence[str] = (DICE.name,),
    tolerance: Sequence[str] = (),
    num_processes: int = 4,
) -> Report:
    """Compares runs by the Dice that nnU-Net measured on each fold's validation cases, and by metrics of the
    predictions that it stored there.

    Folds that mean different things are never put together: cross-validation, 1-shot, 10% and so on are settings of
    their own, and so are other seeds of them. Repeats of one draw are one setting.

    Args:
        runs: trainers, plans, whole names, or patterns of one of these with * and ?; None: all.
        baseline: a run that all others are compared with, told in the same way; None: every pair.
        folds: numbers; None: all.
        seed: of the bootstrap, 0 or above.
        equivalence: margin of the equivalence tests in Dice points of 0.01, above 0.
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
    if not 0 < equivalence <= 100:
        raise UserError(
            f"--equivalence is {equivalence:g}, needed Dice points above 0, at most 100 (1 is a Dice of 0.01)"
        )
    others = chosen_metrics(metrics, tolerance)
    folder = results_folder(dataset)
    splits = read_splits(nnunet_folder("nnUNet_preprocessed") / folder.name)
    patients = read_patients(folder.name, splits.cases)
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
    tolerances = tolerances_mm(tolerance, list(dice.columns[1:]))
    design = Design(splits, patients, pairs, seed, equivalence)
    results = []
    for setting, numbers in settings.items():
        there = dice.loc[setting]
        notes = list(notes_on_setting(there, numbers, found, splits, baseline))
        results.append(setting_result(setting, numbers, there, design, notes))
    notes = [f"{r.name}: fold_all is left out, it validates on its training cases" for r in found if r.has_fold_all]
    if not splits.folds:
        notes.append("no splits_final.json: which cases belong to which fold was not checked")
    notes += notes_on_trainings(folder, found, {*dice.index.unique("fold")})
    shown = {n: splits.folds[n] for n in dice.index.unique("fold") if n < len(splits.folds)}
    notes += notes_on_patients(patients, shown, dice.index.unique("case"))
    unit = PATIENT if patients else CASE
    report = Report(folder.name, baseline, seed, unit, equivalence, notes, results, short_names(names), dice)
    if not others:
        return report
    from nnunetv2_hiendmae.evaluation.beside_dice import reports_beside

    return replace(report, others=reports_beside(report, others, found, settings, design, tolerances, num_processes))


def setting_result(
    setting: str,
    folds: Sequence[int],
    values: pd.DataFrame,
    design: Design,
    notes: Sequence[str],
    metric: Metric = DICE,
) -> SettingResult:
    """`values`: as `Report.values`, of one setting."""
    splits, classes = design.splits, list(values.columns[1:])
    every_pair = list(combinations(values.index.unique("run"), 2))
    tests, class_tests = (_comparisons(values, design.pairs, measures, design) for measures in ([MEAN], classes))
    all_pairs = tests if len(tests) == len(every_pair) else _comparisons(values, every_pair, [MEAN], design)
    if metric is DICE:
        tests, class_tests = (_with_verdicts(table, design.equivalence) for table in (tests, class_tests))
    return SettingResult(
        setting,
        {fold: splits.meaning(fold) for fold in folds},
        classes,
        len({(splits.draw_of(fold)[0], case) for fold, case in _in_all_runs(values)}),
        _runs(values, folds, design, metric),
        tests,
        class_tests,
        notes,
        all_pairs,
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
    # a class that is called like the mean or a level keeps its number
    known_names = next(run for run in runs if run.folds).class_names
    names = {key: name for key, name in known_names.items() if name not in (MEAN, *_LEVELS)}
    tables = {
        (setting, run.name, fold): run.folds[fold]
        for setting, folds in settings.items()
        for run, fold in product(runs, folds)
        if fold in run.folds
    }
    dice = pd.concat(tables, names=_LEVELS)
    means = mean_along(np.ascontiguousarray(dice), 1)
    dice.columns = [names.get(key, f"label {key}") for key in classes]
    dice.insert(0, MEAN, means)
    return dice


def _in_all_runs(dice: pd.DataFrame) -> pd.Index:
    """(fold, case) that every run has a result of, with a value or without."""
    found = dice.groupby(["fold", "case"]).size()
    return found.index[found == dice.index.unique("run").size]


def _runs(dice: pd.DataFrame, folds: Sequence[int], design: Design, metric: Metric) -> pd.DataFrame:
    """As `SettingResult.runs`."""
    splits, patients = design.splits, design.patients
    complete = over_repeats(dice[MEAN].unstack("run").sort_index().dropna(), splits)
    common_means = dict(zip(complete, mean_along(np.ascontiguousarray(complete), 0), strict=True))
    # of mean_ranks, which takes the highest for the best
    better = complete.to_numpy().T * (1 if metric.higher_is_better else -1)
    ranks = dict(zip(complete, mean_ranks(better), strict=True)) if len(complete.columns) > 1 else {}
    rows = []
    for run, table in dice.droplevel("run").groupby(dice.index.get_level_values("run"), sort=False):
        classes, own = table.drop(columns=MEAN), [fold for fold in folds if fold in table.index.unique("fold")]
        once = over_repeats(table, splits)
        # numpy adds in the order of memory, which decides the last bit: a fold class by class, as nnU-Net does it
        fold_means = {fold: foreground_mean(np.asfortranarray(classes.loc[fold])) for fold in own}
        rows.append(
            {
                "run": run,
                "folds": own,
                "missing_folds": [fold for fold in folds if fold not in own],
                "cases": len(once),
                "patients": len({patients.get(case, case) for case in table.index.unique("case")}),
                "nnunet_foreground_mean": foreground_mean(np.ascontiguousarray(classes)),
                **summary(once[MEAN], "cases"),
                **summary(fold_means.values(), "folds"),
                **spread_over_repeats(table[MEAN], splits),
                "nnunet_foreground_mean_of_fold": fold_means,
                "mean_over_common_cases": common_means[run],
                "mean_rank": ranks.get(run, np.nan),
                "per_class": {name: summary(values, "cases") for name, values in once.drop(columns=MEAN).items()},
            }
        )
    return pd.DataFrame(rows)


def _comparisons(dice: pd.DataFrame, pairs: Iterable[tuple], measures: Iterable[str], design: Design) -> pd.DataFrame:
    """As `SettingResult.comparisons` but for verdicts; pairs of which a run is missing here are left out."""
    by_run, folds = dice.unstack("run").sort_index(), dice.reset_index("fold").groupby("run")["fold"].unique()
    rows = []
    for measure, (first, second) in product(measures, pairs):
        if first == second or not {first, second} <= {*folds.index}:
            continue
        both = by_run[measure][[first, second]].dropna()
        # a case counts once, with its mean over the folds that validate on it: these are not independent
        case, names = pd.factorize(both.index.get_level_values("case"))
        once = [np.bincount(case, both[run]) / np.bincount(case) for run in (first, second)]
        shared = [fold for fold in folds[first].tolist() if fold in folds[second]]
        clusters = [design.patients.get(name, name) for name in names] if design.patients else None
        test = paired_test(*once, clusters, design.seed)
        about = {"first": first, "second": second, "measure": measure, "folds": shared}
        # the runs stand on the same repeats: what a draw does to both of them cancels
        spread = spread_over_repeats(both[first] - both[second], design.splits)
        rows.append({**about, **test, **{name: spread[name] for name in ("repeats", "std_over_repeats")}})
    tests = pd.DataFrame(rows)
    return tests.assign(p_holm=holm(tests["p_wilcoxon"])) if rows else tests


def _with_verdicts(tests: pd.DataFrame, points: float) -> pd.DataFrame:
    """Tests of Dice, and whether the differences are within ± `points`."""
    found = [equivalent(row.pairs, row.interval_90, points / 100) for row in tests.itertuples()]
    return tests.assign(equivalent=pd.Series(found, tests.index, dtype=object))
