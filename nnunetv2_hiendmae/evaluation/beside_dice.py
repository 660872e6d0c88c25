"""Reports on metrics beside Dice, of the same runs, settings and cases as that on Dice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.evaluation.compare import Design, Report, setting_result, values_of
from nnunetv2_hiendmae.evaluation.folds import listed
from nnunetv2_hiendmae.evaluation.measuring import measure_runs
from nnunetv2_hiendmae.evaluation.metrics import MEAN, MISSED, SIGNED, VOLUME, Metric
from nnunetv2_hiendmae.evaluation.repeats import over_repeats
from nnunetv2_hiendmae.evaluation.results import Run


def reports_beside(
    report: Report,
    metrics: Sequence[Metric],
    runs: Sequence[Run],
    settings: Mapping[str, Sequence[int]],
    design: Design,
    tolerances: Sequence[float],
    num_processes: int,
) -> dict[str, Report]:
    """Name of a metric -> report on it. What is to be said of all metrics, the report on Dice says.

    Args:
        report: on Dice.
        runs, settings, design: what it was made of.
        tolerances: of the classes, mm.

    Raises:
        UserError: as `measure_runs`.
    """
    folder = nnunet_folder("nnUNet_results") / report.dataset
    folds = {fold for numbers in settings.values() for fold in numbers}
    wanted = [replace(run, folds={n: table for n, table in run.folds.items() if n in folds}) for run in runs]
    measured = measure_runs(folder, wanted, tolerances, num_processes)
    tables = {name: values_of(of_name, settings) for name, of_name in measured.items()}
    by_class = dict(zip(report.values.columns.drop(MEAN), tolerances, strict=True))
    return {m.name: _report(report, m.told_with(by_class), tables, design) for m in metrics}


def _report(report: Report, metric: Metric, tables: Mapping[str, pd.DataFrame], design: Design) -> Report:
    """`tables`: as `Report.values`, by name of a metric or of what stands beside them."""
    values, results = tables[metric.name], []
    signed = tables[SIGNED] if metric.name == VOLUME.name else None
    for of_dice in report.settings:
        setting = of_dice.setting
        notes = list(_misses(tables[MISSED].loc[setting]))
        result = setting_result(setting, [*of_dice.folds], values.loc[setting], design, notes, metric)
        if signed is not None:
            _add_bias(result.runs, signed.loc[setting], design)
        results.append(result)
    return replace(report, notes=[], settings=results, values=values, metric=metric, signed=signed)


def _add_bias(runs: pd.DataFrame, signed: pd.DataFrame, design: Design) -> None:
    """Adds mean and standard deviation of signed differences over cases to what `SettingResult.runs` says per class."""
    for run, per_class in zip(runs["run"], runs["per_class"], strict=True):
        once = over_repeats(signed.xs(run, level="run"), design.splits)
        for name, differences in once[[*per_class]].items():
            per_class[name] |= {"mean_signed": differences.mean(), "std_signed": differences.std()}


def _misses(missed: pd.DataFrame) -> Iterator[str]:
    """`missed`: 1 where only one of truth and prediction holds the class, of one setting."""
    counts = missed.drop(columns=MEAN).groupby("run", sort=False).sum().astype(int)
    for run, of_run in counts.iterrows():
        if told := listed(f"{name} {count}" for name, count in of_run.items() if count):
            yield f"{run}: cases where only one of truth and prediction holds the class, which count as misses: {told}"
