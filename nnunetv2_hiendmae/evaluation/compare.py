"""Comparison of the runs of a dataset: means, spread, ranks and paired tests, per setting of folds."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import Setting, Splits, read_splits
from nnunetv2_hiendmae.evaluation.report import MEAN, Comparison, Key, Report, RunResult, SettingResult
from nnunetv2_hiendmae.evaluation.results import (
    Run,
    class_means,
    collect_runs,
    foreground_mean,
    matching,
    results_folder,
    run_names,
)
from nnunetv2_hiendmae.evaluation.statistics import holm, mean_ranks, paired_test


def compare(
    dataset: str | int,
    *,
    runs: Sequence[str] | None = None,
    baseline: str | None = None,
    folds: Sequence[int] | None = None,
    seed: int = 0,
) -> Report:
    """Compares runs by the Dice that nnU-Net measured on each fold's validation cases.

    Folds that mean different things are never put together: cross-validation, 1-shot, 10% and so on are settings of
    their own, and so are other seeds of them.

    Args:
        runs: trainers, plans, whole names, or patterns of one of these with * and ?; None: all.
        baseline: a run that all others are compared with, told in the same way; None: every pair.
        folds: numbers; None: all.
        seed: of the bootstrap, 0 or above.

    Raises:
        UserError: no results, unknown runs or folds, a negative seed, or damaged files.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}, needed 0 or more")
    folder = results_folder(dataset)
    splits = read_splits(nnunet_folder("nnUNet_preprocessed") / folder.name)
    baseline = None if baseline is None else _baseline(baseline, run_names(folder))
    found = collect_runs(folder, None if runs is None else [*runs, *([baseline] if baseline else [])])
    classes = _common_classes(found)
    _check_folds(found, folds)
    settings = [
        _compare_setting(setting, numbers, found, splits, classes, baseline, seed)
        for setting, numbers in _settings(found, splits, folds).items()
    ]
    notes = [f"{r.name}: fold_all is left out, it validates on its training cases" for r in found if r.has_fold_all]
    if not splits.folds:
        notes.append("no splits_final.json: which cases belong to which fold was not checked")
    return Report(folder.name, short_names([run.name for run in found]), baseline, seed, tuple(settings), tuple(notes))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Full name -> the parts of TRAINER__PLANS__CONFIGURATION that tell the runs apart; plans alone if they do."""
    parts = [name.split("__") for name in names]
    for chosen in ((1,), (0,), (2,), (0, 1), (1, 2), (0, 2)):
        short = ["__".join(p[i] for i in chosen) for p in parts]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _baseline(wanted: str, names: Sequence[str]) -> str:
    fitting = matching(wanted, names, "--baseline")
    if len(fitting) > 1:
        raise UserError(f"--baseline {wanted} fits several runs, needed one of: {', '.join(fitting)}")
    return fitting[0]


def _common_classes(runs: Sequence[Run]) -> tuple[str, ...]:
    """Names of the classes, which must be the same in all folds of all runs."""
    known = [(f"{run.name} fold {fold}", dice.classes) for run in runs for fold, dice in run.folds.items()]
    (first, classes), *others = known
    for name, other in others:
        if other != classes:
            raise UserError(
                f"{name} has the classes {', '.join(other)}, {first} has {', '.join(classes)}: "
                f"their Dice cannot be compared; choose others with --runs"
            )
    names = next(run.class_names for run in runs if run.folds)
    return tuple(names.get(key, f"label {key}") for key in classes)


def _check_folds(runs: Sequence[Run], wanted: Sequence[int] | None) -> None:
    present = {fold for run in runs for fold in run.folds}
    if unknown := sorted(set(wanted or ()) - present):
        listed, there = (", ".join(map(str, sorted(numbers))) for numbers in (unknown, present))
        raise UserError(f"--folds {listed}: no run has results of it; there are results of: {there}")


def _settings(runs: Sequence[Run], splits: Splits, wanted: Sequence[int] | None) -> dict[Setting, list[int]]:
    """Settings with results, in the order in which they are shown -> all their folds, with results or without."""
    grouped = defaultdict(set)
    for fold in {*range(len(splits.folds)), *(fold for run in runs for fold in run.folds)}:
        if wanted is None or fold in wanted:
            grouped[splits.setting(fold)].add(fold)
    present = {fold for run in runs for fold in run.folds}
    ordered = sorted(grouped.items(), key=lambda item: item[0].order)
    return {setting: sorted(folds) for setting, folds in ordered if folds & present}


def _compare_setting(
    setting: Setting,
    folds: Sequence[int],
    found: Sequence[Run],
    splits: Splits,
    classes: tuple[str, ...],
    baseline: str | None,
    seed: int,
) -> SettingResult:
    rows = [_run_result(run, folds) for run in found if set(folds) & set(run.folds)]
    common = sorted(set.intersection(*(set(row.dice) for row in rows)))
    rows = _with_common(rows, common)
    pairs = list(_pairs(rows, baseline))
    overall = [_compare_pair(a, b, None, MEAN, seed) for a, b in pairs]
    per_class = [_compare_pair(a, b, i, name, seed) for i, name in enumerate(classes) for a, b in pairs]
    return SettingResult(
        setting,
        {fold: splits.meaning(fold) for fold in folds},
        classes,
        tuple(rows),
        len(common),
        _corrected(overall),
        _corrected(per_class),
        tuple(_notes(folds, found, rows, splits, classes, baseline)),
    )


def _run_result(run: Run, folds: Sequence[int]) -> RunResult:
    own = tuple(fold for fold in folds if fold in run.folds)
    dice = {
        (fold, case): values
        for fold in own
        for case, values in zip(run.folds[fold].cases, run.folds[fold].values, strict=True)
    }
    return RunResult(
        run.name,
        own,
        tuple(fold for fold in folds if fold not in run.folds),
        dice,
        nnunet_mean=foreground_mean(np.stack(list(dice.values()))),
        fold_means={fold: foreground_mean(run.folds[fold].values) for fold in own},
    )


def _with_common(rows: Sequence[RunResult], common: Sequence[Key]) -> list[RunResult]:
    """With what is measured on the cases that all runs have."""
    if not common:
        return list(rows)
    measured = [row.measure(None) for row in rows]
    values = np.array([[cases[key] for key in common] for cases in measured])
    complete = values[:, ~np.isnan(values).any(axis=0)]
    means = complete.mean(axis=1) if complete.size else [math.nan] * len(rows)
    ranks = mean_ranks(values) if len(rows) > 1 else [math.nan]
    return [
        replace(row, common_mean=float(mean), rank=float(rank))
        for row, mean, rank in zip(rows, means, ranks, strict=True)
    ]


def _pairs(rows: Sequence[RunResult], baseline: str | None) -> Iterator[tuple[RunResult, RunResult]]:
    if baseline is None:
        yield from combinations(rows, 2)
        return
    for reference in (row for row in rows if row.name == baseline):
        yield from ((row, reference) for row in rows if row is not reference)


def _compare_pair(first: RunResult, second: RunResult, index: int | None, measure: str, seed: int) -> Comparison:
    test = paired_test(*_paired(first.measure(index), second.measure(index)), seed)
    folds = tuple(fold for fold in first.folds if fold in second.folds)
    return Comparison(first.name, second.name, measure, folds, test)


def _paired(first: Mapping[Key, float], second: Mapping[Key, float]) -> np.ndarray:
    """(2, cases): both on their common cases that have a value. A case counts once, with its mean over the folds that
    validate on it: its results in several folds are not independent."""
    both = defaultdict(list)
    for key in sorted(set(first) & set(second)):
        if not math.isnan(first[key] - second[key]):
            both[key[1]].append((first[key], second[key]))
    return np.array([np.mean(pairs, axis=0) for pairs in both.values()]).reshape(-1, 2).T


def _corrected(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    corrected = holm([c.test.p for c in comparisons])
    return tuple(replace(c, test=replace(c.test, p_holm=p)) for c, p in zip(comparisons, corrected, strict=True))


def _notes(
    folds: Sequence[int],
    found: Sequence[Run],
    rows: Sequence[RunResult],
    splits: Splits,
    classes: Sequence[str],
    baseline: str | None,
) -> Iterator[str]:
    by_name = {row.name: row for row in rows}
    missing = {run.name: by_name[run.name].missing if run.name in by_name else folds for run in found}
    yield from _grouped({run.name: _notes_on_folds(run, missing[run.name]) for run in found})
    yield from _grouped({row.name: _notes_on_cases(row, splits, classes) for row in rows})
    if len({row.folds for row in rows}) > 1:
        yield (
            "the runs stand on different folds: compare them by the column on common cases and by the paired tests, "
            "not by their own means"
        )
    elif len({frozenset(row.dice) for row in rows}) > 1:
        yield "the runs have different validation cases; only common ones are paired"
    if baseline is not None and baseline not in by_name:
        yield f"the baseline {baseline} has no result here, so nothing is tested"


def _grouped(notes: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Run -> its notes, told once for all runs that share one."""
    about = defaultdict(list)
    for name, own in notes.items():
        for note in own:
            about[note].append(name)
    for note, names in about.items():
        yield f"{'all runs here' if 1 < len(names) == len(notes) else _listed(names)}: {note}"


def _notes_on_folds(run: Run, missing: Sequence[int]) -> Iterator[str]:
    if missing:
        started = [fold for fold in missing if fold in run.unfinished]
        note = f" (started, without validation/summary.json: {_listed(started)})" if started else ""
        yield f"no result of fold {_listed(missing)}{note}"


def _notes_on_cases(row: RunResult, splits: Splits, classes: Sequence[str]) -> Iterator[str]:
    for fold in row.folds:
        cases = {case for number, case in row.dice if number == fold}
        expected = set(splits.folds[fold]["val"]) if fold < len(splits.folds) else cases
        if cases != expected:
            yield (
                f"the {len(cases)} validation cases of fold {fold} are not the {len(expected)} of splits_final.json; "
                "was it trained with other splits?"
            )
    never = [name for name, mean in zip(classes, class_means(row.values), strict=True) if math.isnan(mean)]
    if never:
        yield f"neither truth nor prediction holds {_listed(never)}, so nnU-Net's foreground mean is n/a"
    undefined = [fold for fold, mean in row.fold_means.items() if math.isnan(mean)]
    if undefined and not never:
        yield f"a class does not occur in fold {_listed(undefined)}; left out of mean ± std over folds"
    empty = [case for (_, case), value in row.measure(None).items() if math.isnan(value)]
    if empty:
        yield f"nothing to segment and nothing found in {_listed(empty)}; left out"
    repeated = len(row.dice) - len({case for _, case in row.dice})
    if repeated:
        yield (
            f"{repeated} results are of cases that an earlier fold validated too: means over cases count them again, "
            "the paired tests take a case's mean over its folds"
        )


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
