"""A comparison as files: Markdown, CSV, JSON and a figure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_hiendmae.evaluation.compare import PATIENT, Report, SettingResult
from nnunetv2_hiendmae.evaluation.critical_difference import draw_critical_difference
from nnunetv2_hiendmae.evaluation.figure import draw_comparison
from nnunetv2_hiendmae.evaluation.latex import latex
from nnunetv2_hiendmae.evaluation.metrics import DICE, MEAN
from nnunetv2_hiendmae.evaluation.statistics import MIN_DIFFERENCES, RESAMPLES
from nnunetv2_hiendmae.files import write_text

CONVENTIONS = (
    "Dice of the foreground classes, between 0 and 1, as nnU-Net measured it on each fold's validation cases. Where "
    "truth and prediction hold none of a class, the case has no Dice for it and is left out of that class's mean; "
    "where only the prediction holds it, Dice is 0. **nnU-Net's mean** is the mean over classes of their means over "
    "the cases of all listed folds, as in nnU-Net's own summary: n/a if a class has no value at all. **Over cases**: a "
    "case counts with the mean over the classes it has a value for. **Over folds**: nnU-Net's mean of each fold. ± is "
    "the sample standard deviation (n − 1); where values were left out, n says how many there are. **Rank**: mean over "
    "the common cases, 1 is the highest Dice, ties share."
)
# of metrics beside Dice
AS_DICE = (
    "{better} is better. Tables and tests as for Dice, over the same cases: **mean of class means** is what nnU-Net's "
    "mean is there, and rank 1 is best. The tests of each table are a family of their own for Holm's correction."
)
SIGNED_TITLE = "Signed difference, prediction − truth, mean ± std over cases:"
TESTS = (
    "Mean difference over the pairs, one per {unit}, with the 95% percentile interval of {resamples} bootstrap samples "
    "of {unit}s (seed {seed}), which is too narrow where pairs are few; two-sided Wilcoxon signed-rank test, {holm}."
)
EQUIVALENT = (
    " Equivalent: the 90% interval of the same samples lies within {margin} (two one-sided tests at 5%; a point is a "
    "Dice of 0.01); n/a for fewer than {least} pairs."
)
REPEATS = (
    "Every repeat trains on other cases. A case counts with its mean over repeats. **Over repeats**: mean of each "
    "repeat over the cases that all repeats of the run have; in tests, of the differences in one repeat."
)

# columns of runs.csv
RUN_MEASURES = (
    *("mean_over_cases", "std_over_cases", "cases_with_value", "mean_over_folds", "std_over_folds", "folds_with_value"),
    *("nnunet_foreground_mean", "mean_over_common_cases", "mean_rank", "patients"),
    *("repeats", "mean_over_repeats", "std_over_repeats", "repeats_with_value"),
)


def markdown(report: Report) -> str:
    """The whole report for a reader, Dice first."""
    names = [[short, *name.split("__")] for name, short in report.labels.items()]
    blocks = [
        f"# Comparison on {report.dataset}",
        CONVENTIONS,
        table(["run", "trainer", "plans", "configuration"], names),
        _list(report.notes),
    ]
    for of_metric in (report, *report.others.values()):
        metric = of_metric.metric
        if of_metric is not report:
            better = "Higher" if metric.higher_is_better else "Lower"
            blocks += [f"# {metric.label}", metric.definition, AS_DICE.format(better=better)]
        for result in of_metric.settings:
            blocks += [f"## {result.setting}", *_setting(result, of_metric)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything but the values of single cases, as plain values; what is not available is None. Metrics beside Dice
    are under `metrics`, each with its own `settings`."""
    left_out = ("labels", "values", "metric", "signed", "others")
    content = {name: value for name, value in vars(report).items() if name not in left_out}
    if report.others:
        content["metrics"] = {
            name: {**vars(other.metric), "settings": other.settings} for name, other in report.others.items()
        }
    text = json.dumps(content, default=_plain)
    # JSON has no NaN
    return json.loads(text, parse_constant=lambda _: None)


def write(report: Report, folder: Path) -> list[Path]:
    """Writes comparison.md, .json and .tex; for each metric runs.csv, tests.csv, cases.csv, comparison.png and, where
    there are enough runs and cases, critical_difference.png, those of metrics beside Dice with its name at the end
    (runs_nsd.csv). Gives their paths."""
    texts = {
        "comparison.md": markdown(report),
        "comparison.json": json.dumps(as_json(report), indent=2) + "\n",
        "comparison.tex": latex(report),
    }
    drawings = {}
    for of_metric in (report, *report.others.values()):
        end = "" if of_metric is report else f"_{of_metric.metric.name}"
        texts |= {
            f"runs{end}.csv": _csv(_run_rows(of_metric)),
            f"tests{end}.csv": _csv(_test_rows(of_metric)),
            f"cases{end}.csv": _cases(of_metric).to_csv(lineterminator="\n"),
        }
        drawings[f"comparison{end}.png"] = partial(draw_comparison, of_metric)
        drawings[f"critical_difference{end}.png"] = partial(draw_critical_difference, of_metric)
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, draw in drawings.items():
        draw(folder / name)
    return [folder / name for name in (*texts, *drawings) if (folder / name).exists()]


def _setting(result: SettingResult, report: Report) -> list[str]:
    runs, tests, labels = result.runs.to_dict("records"), result.comparisons.to_dict("records"), report.labels
    overview = [_run_cells(run, result, report) for run in runs]
    decimals = report.metric.decimals
    per_class = [
        [name, *(_mean_std(run["per_class"][name], "cases", run["cases"], decimals) for run in runs)]
        for name in result.classes
    ]
    told = any(meaning != result.setting for meaning in result.folds.values())
    blocks = [
        "; ".join(f"fold {fold}: {meaning}" for fold, meaning in result.folds.items()) if told else "",
        _table_of(overview),
        "Per class, over cases:",
        table(["class", *(labels[run["run"]] for run in runs)], per_class),
        REPEATS if _repeated(result) else "",
    ]
    if report.signed is not None:
        rows = [[name, *(_bias(run["per_class"][name], decimals) for run in runs)] for name in result.classes]
        blocks += [SIGNED_TITLE, table(["class", *(labels[run["run"]] for run in runs)], rows)]
    if tests:
        count = result.comparisons["p_wilcoxon"].count()
        holm = f"Holm's correction over the {count} tests of this table" if count else "not possible here"
        words = {"unit": report.unit, "margin": _margin(report), "least": MIN_DIFFERENCES, "resamples": RESAMPLES}
        about = TESTS + EQUIVALENT if report.metric is DICE else TESTS
        blocks += [
            about.format(seed=report.seed, holm=holm, **words),
            _table_of([_test_cells(test, result, report) for test in tests]),
        ]
    return [*blocks, _list(result.notes)]


def _run_cells(run: Mapping[str, Any], result: SettingResult, report: Report) -> dict[str, str]:
    by_patient, repeated, decimals = report.unit == PATIENT, _repeated(result), report.metric.decimals
    return {
        "run": report.labels[run["run"]],
        "folds": _listed(run["folds"]),
        "missing": _listed(run["missing_folds"]) or "none",
        **({"patients": str(run["patients"])} if by_patient else {}),
        "cases": str(run["cases"]),
        **({"repeats": str(run["repeats"])} if repeated else {}),
        "nnU-Net's mean" if report.metric is DICE else "mean of class means": _number(
            run["nnunet_foreground_mean"], f".{decimals}f"
        ),
        "over cases": _mean_std(run, "cases", run["cases"], decimals),
        "over folds": _mean_std(run, "folds", len(run["folds"]), decimals),
        **({"over repeats": _mean_std(run, "repeats", run["repeats"], decimals)} if repeated else {}),
        f"over the {result.common_cases} common": _number(run["mean_over_common_cases"], f".{decimals}f"),
        "rank": _number(run["mean_rank"], ".2f"),
    }


def _test_cells(test: Mapping[str, Any], result: SettingResult, report: Report) -> dict[str, str]:
    units = {"patients": test["pairs"], "cases": test["cases"]} if report.unit == PATIENT else {"pairs": test["pairs"]}
    units |= {"repeats": test["repeats"]} if _repeated(result) else {}
    reason = f" ({test['reason']})" if test["reason"] else ""
    decimals, verdict = report.metric.decimals, "n/a"
    if test.get("equivalent") is not None:
        verdict = f"{'equivalent' if test['equivalent'] else 'not shown'} {_interval(test['interval_90'], decimals)}"
    difference = _number(test["mean_difference"], f"+.{decimals}f")
    return {
        "comparison": f"{report.labels[test['first']]} − {report.labels[test['second']]}",
        "folds": _listed(test["folds"]) or "none",
        **{name: str(count) for name, count in units.items()},
        "difference [95%]": f"{difference} {_interval(test['interval_95'], decimals)}",
        **({"over repeats": f"± {_number(test['std_over_repeats'], f'.{decimals}f')}"} if _repeated(result) else {}),
        "p": _number(test["p_wilcoxon"], ".2g") + reason,
        "p, Holm": _number(test["p_holm"], ".2g"),
        **({f"within {_margin(report)} [90%]": verdict} if "equivalent" in test else {}),
    }


def _repeated(result: SettingResult) -> bool:
    return result.runs["repeats"].max() > 1


def _interval(bounds: Sequence[float], decimals: int) -> str:
    low, high = (_number(value, f"+.{decimals}f") for value in bounds)
    return f"[{low}, {high}]"


def _margin(report: Report) -> str:
    return f"±{report.equivalence:g} point{'' if report.equivalence == 1 else 's'}"


def _plain(value: Any) -> Any:
    """What json cannot write: tables, and results without the pairs that only the diagram shows."""
    if isinstance(value, pd.DataFrame):
        return value.to_dict("records")
    return {name: part for name, part in vars(value).items() if name != "all_pairs"}


def _cases(report: Report) -> pd.DataFrame:
    """A row for each case and class, the mean of the classes among them."""
    rows = _melted(report.values, report.metric.name)
    return rows if report.signed is None else rows.assign(signed=_melted(report.signed, "signed")["signed"].to_numpy())


def _melted(values: pd.DataFrame, name: str) -> pd.DataFrame:
    runs = values.groupby(["setting", "run"], sort=False)
    # named later: a class may be called like a metric
    rows = [run.melt(var_name="class", value_name="", ignore_index=False) for _, run in runs]
    return pd.concat(rows).rename(columns={"": name})


def _run_rows(report: Report) -> Iterable[dict[str, Any]]:
    for result in report.settings:
        for run in result.runs.to_dict("records"):
            about = {"setting": result.setting, "run": run["run"]}
            about |= {part: _listed(run[part]) for part in ("folds", "missing_folds")}
            yield {**about, "class": MEAN, **{name: run[name] for name in RUN_MEASURES}}
            for name, values in run["per_class"].items():
                yield {**about, "class": name, **values}


def _test_rows(report: Report) -> Iterable[dict[str, Any]]:
    for result in report.settings:
        for test in (*result.comparisons.to_dict("records"), *result.class_comparisons.to_dict("records")):
            bounds = {}
            for level in (95, 90):
                bounds[f"low_{level}"], bounds[f"high_{level}"] = test.pop(f"interval_{level}")
            yield {"setting": result.setting, **test, "folds": _listed(test["folds"]), **bounds}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    # objects: counts stay whole where other rows have none
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown, from texts; a | in one of them becomes a /."""
    lines = (" | ".join(cell.replace("|", "/") for cell in row) for row in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {line} |" for line in lines)


def _table_of(rows: Sequence[Mapping[str, str]]) -> str:
    return table([*rows[0]], [[*row.values()] for row in rows])


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _listed(items: Iterable[object]) -> str:
    return " ".join(map(str, items))


def _number(value: float, form: str) -> str:
    return "n/a" if math.isnan(value) else f"{value:{form}}"


def _mean_std(values: Mapping[str, Any], over: str, total: int, decimals: int) -> str:
    mean, std, known = (values[name] for name in (f"mean_over_{over}", f"std_over_{over}", f"{over}_with_value"))
    left_out = f" (n = {known})" if known < total else ""
    form = f".{decimals}f"
    return f"{_number(mean, form)} ± {_number(std, form)}{left_out}" if known else _number(mean, form)


def _bias(values: Mapping[str, Any], decimals: int) -> str:
    if math.isnan(values["mean_signed"]):
        return "n/a"
    return f"{_number(values['mean_signed'], f'+.{decimals}f')} ± {_number(values['std_signed'], f'.{decimals}f')}"
