"""A comparison as files: Markdown, CSV, JSON and a figure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.evaluation.compare import MEAN, Report, SettingResult
from nnunetv2_hiendmae.evaluation.critical_difference import draw_critical_difference
from nnunetv2_hiendmae.evaluation.latex import latex
from nnunetv2_hiendmae.evaluation.metrics import DICE
from nnunetv2_hiendmae.evaluation.statistics import RESAMPLES
from nnunetv2_hiendmae.files import write_text, write_with

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
    "Mean difference over the pairs, one per case, with the 95% percentile interval of {resamples} bootstrap samples "
    "of cases (seed {seed}), which is too narrow where pairs are few; two-sided Wilcoxon signed-rank test, {holm}."
)

# columns of runs.csv
RUN_MEASURES = (
    *("mean_over_cases", "std_over_cases", "cases_with_value", "mean_over_folds", "std_over_folds", "folds_with_value"),
    *("nnunet_foreground_mean", "mean_over_common_cases", "mean_rank"),
)

# of the figure
COLOURS = "tab10"
ROW_INCHES = 3.4
INCHES_PER_RUN = 0.9
INCHES_PER_BAR = 0.22
GROUP_WIDTH = 0.8
LONGEST_LABEL = 28
# the dots' axis never shows less than this: differences in the fourth digit must not look like a gulf
SMALLEST_SPAN = 0.2


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
    content = {name: getattr(report, name) for name in ("dataset", "baseline", "seed", "notes", "settings")}
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


def draw_comparison(report: Report, path: Path) -> None:
    """Writes a PNG with one row per setting: left a dot per case (mean over classes), right a bar per class.

    The line in the dots is their mean; a whisker on a bar is the standard deviation over cases. Thin lines join the
    same case in neighbouring runs. A class without a value in a run has no bar but "n/a". A run that lacks folds says
    so.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs, classes = len(report.labels), max(len(result.classes) for result in report.settings)
    widths = [max(3.0, INCHES_PER_RUN * runs), max(3.5, INCHES_PER_BAR * (runs + 1) * classes)]
    # not through pyplot, whose global state keeps figures open and picks a screen
    size = (sum(widths) + 0.8, ROW_INCHES * len(report.settings) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(report.settings), 2, squeeze=False, width_ratios=widths)
    palette = colormaps[COLOURS]
    colours = {name: palette(i % palette.N) for i, name in enumerate(report.labels)}
    for (dots, bars), result in zip(axes, report.settings, strict=True):
        labels = []
        for run in result.runs.itertuples():
            # a figure travels without the notes of the table
            lacking = f"\n({len(run.folds)} of {len(run.folds) + len(run.missing_folds)} folds)"
            labels.append(_shortened(report.labels[run.run]) + (lacking if run.missing_folds else ""))
        shades = [colours[run] for run in result.runs["run"]]
        _draw_cases(dots, report.values.loc[result.setting][MEAN], labels, shades, report.metric.largest)
        _finish(dots, f"{result.setting}\ncases, mean of classes", labels, report)
        _draw_classes(bars, result, labels, shades, report.metric.largest)
        names = [*map(_shortened, result.classes)]
        _finish(bars, f"{result.setting}\nclasses, mean ± std over cases", names, report)
    figure.suptitle(report.dataset, fontsize=11)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _setting(result: SettingResult, report: Report) -> list[str]:
    runs, tests, labels = result.runs.to_dict("records"), result.comparisons.to_dict("records"), report.labels
    decimals, of_nnunet = report.metric.decimals, "nnU-Net's mean" if report.metric == DICE else "mean of class means"
    head = ["run", "folds", "missing", "cases", of_nnunet, "over cases", "over folds"]
    head += [f"over the {result.common_cases} common", "rank"]
    overview = [
        [
            labels[run["run"]],
            _listed(run["folds"]),
            _listed(run["missing_folds"]) or "none",
            str(run["cases"]),
            _number(run["nnunet_foreground_mean"], f".{decimals}f"),
            _mean_std(run, "cases", run["cases"], decimals),
            _mean_std(run, "folds", len(run["folds"]), decimals),
            _number(run["mean_over_common_cases"], f".{decimals}f"),
            _number(run["mean_rank"], ".2f"),
        ]
        for run in runs
    ]
    per_class = [
        [name, *(_mean_std(run["per_class"][name], "cases", run["cases"], decimals) for run in runs)]
        for name in result.classes
    ]
    told = any(meaning != result.setting for meaning in result.folds.values())
    blocks = [
        "; ".join(f"fold {fold}: {meaning}" for fold, meaning in result.folds.items()) if told else "",
        table(head, overview),
        "Per class, over cases:",
        table(["class", *(labels[run["run"]] for run in runs)], per_class),
    ]
    if report.signed is not None:
        rows = [[name, *(_bias(run["per_class"][name], decimals) for run in runs)] for name in result.classes]
        blocks += [SIGNED_TITLE, table(["class", *(labels[run["run"]] for run in runs)], rows)]
    if tests:
        count = result.comparisons["p_wilcoxon"].count()
        holm = f"Holm's correction over the {count} tests of this table" if count else "not possible here"
        head = ["comparison", "folds", "pairs", "difference [95%]", "p", "p, Holm"]
        rows = [[f"{labels[test['first']]} − {labels[test['second']]}", *_test_cells(test, decimals)] for test in tests]
        blocks += [TESTS.format(resamples=RESAMPLES, seed=report.seed, holm=holm), table(head, rows)]
    return [*blocks, _list(result.notes)]


def _test_cells(test: Mapping[str, Any], decimals: int) -> list[str]:
    difference, low, high = (
        _number(value, f"+.{decimals}f") for value in (test["mean_difference"], *test["interval_95"])
    )
    p, p_holm = (_number(test[name], ".2g") for name in ("p_wilcoxon", "p_holm"))
    reason = f" ({test['reason']})" if test["reason"] else ""
    return [_listed(test["folds"]) or "none", str(test["pairs"]), f"{difference} [{low}, {high}]", p + reason, p_holm]


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
    return pd.concat([run.melt(var_name="class", value_name=name, ignore_index=False) for _, run in runs])


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
            low, high = test.pop("interval_95")
            yield {"setting": result.setting, **test, "folds": _listed(test["folds"]), "low_95": low, "high_95": high}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    # objects: counts stay whole where other rows have none
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown, from texts; a | in one of them becomes a /."""
    lines = (" | ".join(cell.replace("|", "/") for cell in row) for row in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {line} |" for line in lines)


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
    return f"{_number(values['mean_signed'], f'+.{decimals}f')} ± {_number(values['std_signed'], f'.{decimals}f')}"


def _draw_cases(axis, cases: pd.Series, labels: Sequence[str], colours: Sequence, largest: float | None) -> None:
    measured = [values.droplevel("run") for _, values in cases.groupby("run", sort=False)]
    for i, (left, right) in enumerate(pairwise(measured)):
        both = left.index[left.index.isin(right.index)]
        axis.plot([i, i + 1], [left[both], right[both]], color="0.85", linewidth=0.6, zorder=1)
    for i, (values, colour) in enumerate(zip(measured, colours, strict=True)):
        known = values.dropna().to_numpy()
        axis.scatter(np.full(known.size, i), known, s=14, color=colour, alpha=0.7, linewidth=0, zorder=2)
        if known.size:
            axis.hlines(known.mean(), i - 0.25, i + 0.25, color="black", linewidth=1.5, zorder=3)
    if largest is None:
        return
    low, high = axis.get_ylim()
    middle = min(max((low + high) / 2, SMALLEST_SPAN / 2), largest - SMALLEST_SPAN / 2)
    axis.set_ylim(min(low, middle - SMALLEST_SPAN / 2), max(high, middle + SMALLEST_SPAN / 2))


def _draw_classes(axis, result: SettingResult, labels: Sequence[str], colours: Sequence, largest: float | None) -> None:
    width = GROUP_WIDTH / len(labels)
    for i, (per_class, label, colour) in enumerate(zip(result.runs["per_class"], labels, colours, strict=True)):
        x = np.arange(len(result.classes)) - GROUP_WIDTH / 2 + (i + 0.5) * width
        means, spreads, *_ = pd.DataFrame(per_class).to_numpy()
        axis.bar(x, np.nan_to_num(means), width, color=colour, label=label)
        # Dice ends at 0 and 1, and so do the whiskers
        below = np.minimum(np.nan_to_num(spreads), np.nan_to_num(means))
        above = np.minimum(np.nan_to_num(spreads), (np.inf if largest is None else largest) - np.nan_to_num(means))
        axis.errorbar(x, means, [below, above], fmt="none", ecolor="0.25", elinewidth=0.8)
        for position in x[np.isnan(means)]:
            axis.text(position, 0.01, "n/a", rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
    # bars start at nothing; the dots beside them show what happens near the top
    if largest is not None:
        axis.set_ylim(0, largest)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _finish(axis, title: str, names: Sequence[str], report: Report) -> None:
    axis.set_title(title, fontsize=9)
    if report.metric.largest is None:
        # misses lie far above everything else
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, None)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylabel(report.metric.label, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _shortened(text: str) -> str:
    # the end tells plans apart: nnUNetPlans_HiEndMAE, nnUNetPlans_ViTUNETR
    return text if len(text) <= LONGEST_LABEL else "…" + text[1 - LONGEST_LABEL :]
