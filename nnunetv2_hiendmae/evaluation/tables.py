"""A comparison as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.evaluation.report import MEAN, Comparison, Report, RunResult, SettingResult
from nnunetv2_hiendmae.evaluation.results import case_means
from nnunetv2_hiendmae.evaluation.statistics import RESAMPLES, spread
from nnunetv2_hiendmae.files import write_text

NOT_AVAILABLE = "n/a"
CONVENTIONS = (
    "Dice of the foreground classes, between 0 and 1, as nnU-Net measured it on each fold's validation cases. Where "
    "truth and prediction hold none of a class, the case has no Dice for it and is left out of that class's mean; "
    "where only the prediction holds it, Dice is 0. **nnU-Net's mean** is the mean over classes of their means over "
    "the cases of all listed folds, as in nnU-Net's own summary: n/a if a class has no value at all. **Over cases**: a "
    "case counts with the mean over the classes it has a value for. **Over folds**: nnU-Net's mean of each fold. ± is "
    "the sample standard deviation (n − 1); where values were left out, n says how many there are. **Rank**: mean over "
    "the common cases, 1 is the highest Dice, ties share."
)
TESTS = (
    "Mean difference over the pairs, one per case, with the 95% percentile interval of {resamples} bootstrap samples "
    "of cases (seed {seed}), which is too narrow where pairs are few; two-sided Wilcoxon signed-rank test, {holm}."
)


def markdown(report: Report) -> str:
    """The whole report for a reader."""
    names = [[short, *name.split("__")] for name, short in report.labels.items()]
    blocks = [
        f"# Comparison on {report.dataset}",
        CONVENTIONS,
        _table(["run", "trainer", "plans", "configuration"], names),
        _list(report.notes),
    ]
    for result in report.settings:
        blocks += [f"## {result.setting.name}", *_setting(result, report)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain values; what is not available is None."""
    return {
        "dataset": report.dataset,
        "baseline": report.baseline,
        "seed": report.seed,
        "notes": list(report.notes),
        "settings": [
            {
                "setting": result.setting.name,
                "folds": {str(fold): meaning for fold, meaning in result.fold_meanings.items()},
                "classes": list(result.classes),
                "common_cases": result.common_cases,
                "runs": [_run_json(run, result.classes) for run in result.runs],
                "comparisons": [_comparison_json(c) for c in result.comparisons],
                "class_comparisons": [_comparison_json(c) for c in result.class_comparisons],
                "notes": list(result.notes),
            }
            for result in report.settings
        ],
    }


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Writes comparison.md, comparison.json, runs.csv, tests.csv and cases.csv; gives their paths."""
    texts = {
        "comparison.md": markdown(report),
        "comparison.json": json.dumps(as_json(report), indent=2) + "\n",
        "runs.csv": _csv(_run_rows(report)),
        "tests.csv": _csv(_test_rows(report)),
        "cases.csv": _csv(_case_rows(report)),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _setting(result: SettingResult, report: Report) -> list[str]:
    head = ["run", "folds", "missing", "cases", "nnU-Net's mean", "over cases", "over folds"]
    head += [f"over the {result.common_cases} common", "rank"]
    overview = [
        [
            report.labels[run.name],
            _listed(run.folds),
            _listed(run.missing) or "none",
            str(len(run.dice)),
            number(run.nnunet_mean),
            _mean_std(case_means(run.values)),
            _mean_std(run.fold_means.values()),
            number(run.common_mean),
            number(run.rank, 2),
        ]
        for run in result.runs
    ]
    per_class = [[name, *(_mean_std(run.values[:, i]) for run in result.runs)] for i, name in enumerate(result.classes)]
    told = any(meaning != result.setting.name for meaning in result.fold_meanings.values())
    blocks = [
        "; ".join(f"fold {fold}: {meaning}" for fold, meaning in result.fold_meanings.items()) if told else "",
        _table(head, overview),
        "Per class, over cases:",
        _table(["class", *(report.labels[run.name] for run in result.runs)], per_class),
    ]
    if result.comparisons:
        count = sum(not math.isnan(c.test.p) for c in result.comparisons)
        tests = [_comparison_row(c, report) for c in result.comparisons]
        holm = f"Holm's correction over the {count} tests of this table" if count else "not possible here"
        blocks += [
            TESTS.format(resamples=RESAMPLES, seed=report.seed, holm=holm),
            _table(["comparison", "folds", "pairs", "difference [95%]", "p", "p, Holm"], tests),
        ]
    return [*blocks, _list(result.notes)]


def _comparison_row(comparison: Comparison, report: Report) -> list[str]:
    test = comparison.test
    p = [_p(test.p), _p(test.p_holm)] if not test.reason else [f"{NOT_AVAILABLE} ({test.reason})", NOT_AVAILABLE]
    return [
        f"{report.labels[comparison.first]} − {report.labels[comparison.second]}",
        _listed(comparison.folds) or "none",
        str(test.pairs),
        f"{number(test.difference, sign='+')} [{number(test.low, sign='+')}, {number(test.high, sign='+')}]",
        *p,
    ]


def _run_json(run: RunResult, classes: Sequence[str]) -> dict[str, Any]:
    cases = case_means(run.values)
    return {
        "run": run.name,
        "folds": list(run.folds),
        "missing_folds": list(run.missing),
        "cases": len(run.dice),
        "nnunet_foreground_mean": _plain(run.nnunet_mean),
        **_statistics(cases, "cases"),
        **_statistics(run.fold_means.values(), "folds"),
        "nnunet_foreground_mean_of_fold": {str(fold): _plain(mean) for fold, mean in run.fold_means.items()},
        "mean_over_common_cases": _plain(run.common_mean),
        "mean_rank": _plain(run.rank),
        "per_class": {name: _statistics(run.values[:, i], "cases") for i, name in enumerate(classes)},
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    test = comparison.test
    return {
        "first": comparison.first,
        "second": comparison.second,
        "measure": comparison.measure,
        "folds": list(comparison.folds),
        "pairs": test.pairs,
        "mean_difference": _plain(test.difference),
        "interval_95": [_plain(test.low), _plain(test.high)],
        "p_wilcoxon": _plain(test.p),
        "p_holm": _plain(test.p_holm),
        "reason": test.reason,
    }


def _run_rows(report: Report) -> Iterable[dict[str, Any]]:
    for result in report.settings:
        for run in result.runs:
            about = {"setting": result.setting.name, "run": run.name}
            about |= {"folds": _listed(run.folds), "missing_folds": _listed(run.missing)}
            cases, folds = (
                _statistics(v, name)
                for v, name in ((case_means(run.values), "cases"), (run.fold_means.values(), "folds"))
            )
            extra = {"nnunet_foreground_mean": _plain(run.nnunet_mean)}
            extra |= {"mean_over_common_cases": _plain(run.common_mean), "mean_rank": _plain(run.rank)}
            yield {**about, "class": MEAN, **cases, **folds, **extra}
            for i, name in enumerate(result.classes):
                yield {**about, "class": name, **_statistics(run.values[:, i], "cases")}


def _test_rows(report: Report) -> Iterable[dict[str, Any]]:
    for result in report.settings:
        for comparison in (*result.comparisons, *result.class_comparisons):
            row = _comparison_json(comparison)
            low, high = row.pop("interval_95")
            row |= {"folds": _listed(comparison.folds), "low_95": low, "high_95": high}
            yield {"setting": result.setting.name, **row}


def _case_rows(report: Report) -> Iterable[dict[str, Any]]:
    for result in report.settings:
        for run in result.runs:
            about = {"setting": result.setting.name, "run": run.name}
            for index, name in ((None, MEAN), *enumerate(result.classes)):
                for (fold, case), value in run.measure(index).items():
                    yield {**about, "fold": fold, "case": case, "class": name, "dice": _plain(value)}


def _statistics(values: Iterable[float], over: str) -> dict[str, Any]:
    known = [v for v in map(float, values) if not math.isnan(v)]
    mean = float(np.mean(known)) if known else math.nan
    return {
        f"mean_over_{over}": _plain(mean),
        f"std_over_{over}": _plain(spread(known)),
        f"{over}_with_value": len(known),
    }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    text = io.StringIO()
    # the first row has every column; what is not available stays empty
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (" | ".join(cell.replace("|", "/") for cell in row) for row in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {line} |" for line in lines)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def number(value: float, digits: int = 4, sign: str = "") -> str:
    """A number for a reader; 'n/a' for NaN."""
    return NOT_AVAILABLE if math.isnan(value) else f"{value:{sign}.{digits}f}"


def _mean_std(values: Iterable[float]) -> str:
    values = [float(v) for v in values]
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return NOT_AVAILABLE
    left_out = f" (n = {len(known)})" if len(known) < len(values) else ""
    return f"{number(float(np.mean(known)))} ± {number(spread(known))}{left_out}"


def _p(value: float) -> str:
    return NOT_AVAILABLE if math.isnan(value) else f"{value:.2g}"


def _listed(items: Iterable[object]) -> str:
    return " ".join(map(str, items))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
