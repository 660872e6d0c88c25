"""A comparison as files: Markdown, CSV, JSON and a figure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.evaluation.compare import MEAN, PATIENT, Report, SettingResult
from nnunetv2_hiendmae.evaluation.statistics import MIN_DIFFERENCES, RESAMPLES
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
TESTS = (
    "Mean difference over the pairs, one per {unit}, with the 95% percentile interval of {resamples} bootstrap samples "
    "of {unit}s (seed {seed}), which is too narrow where pairs are few; two-sided Wilcoxon signed-rank test, {holm}. "
    "Equivalent: the 90% interval of the same samples lies within {margin} (two one-sided tests at 5%; a point is a "
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
    """The whole report for a reader."""
    names = [[short, *name.split("__")] for name, short in report.labels.items()]
    blocks = [
        f"# Comparison on {report.dataset}",
        CONVENTIONS,
        table(["run", "trainer", "plans", "configuration"], names),
        _list(report.notes),
    ]
    for result in report.settings:
        blocks += [f"## {result.setting}", *_setting(result, report)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Everything but the Dice of single cases, as plain values; what is not available is None."""
    content = {name: value for name, value in vars(report).items() if name not in ("labels", "dice")}
    text = json.dumps(content, default=lambda v: v.to_dict("records") if isinstance(v, pd.DataFrame) else vars(v))
    # JSON has no NaN
    return json.loads(text, parse_constant=lambda _: None)


def write(report: Report, folder: Path) -> list[Path]:
    """Writes comparison.md, comparison.json, comparison.png, runs.csv, tests.csv and cases.csv; gives their paths."""
    cases = [
        dice.melt(var_name="class", value_name="dice", ignore_index=False)
        for _, dice in report.dice.groupby(["setting", "run"], sort=False)
    ]
    texts = {
        "comparison.md": markdown(report),
        "comparison.json": json.dumps(as_json(report), indent=2) + "\n",
        "runs.csv": _csv(_run_rows(report)),
        "tests.csv": _csv(_test_rows(report)),
        "cases.csv": pd.concat(cases).to_csv(lineterminator="\n"),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    draw_comparison(report, folder / "comparison.png")
    return [folder / name for name in (*texts, "comparison.png")]


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
        _draw_cases(dots, report.dice.loc[result.setting][MEAN], labels, shades)
        _finish(dots, f"{result.setting}\ncases, mean of classes", labels)
        _draw_classes(bars, result, labels, shades)
        _finish(bars, f"{result.setting}\nclasses, mean ± std over cases", [*map(_shortened, result.classes)])
    figure.suptitle(report.dataset, fontsize=11)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _setting(result: SettingResult, report: Report) -> list[str]:
    runs, tests, labels = result.runs.to_dict("records"), result.comparisons.to_dict("records"), report.labels
    overview = [_run_cells(run, result, report) for run in runs]
    per_class = [
        [name, *(_mean_std(run["per_class"][name], "cases", run["cases"]) for run in runs)] for name in result.classes
    ]
    told = any(meaning != result.setting for meaning in result.folds.values())
    blocks = [
        "; ".join(f"fold {fold}: {meaning}" for fold, meaning in result.folds.items()) if told else "",
        _table_of(overview),
        "Per class, over cases:",
        table(["class", *(labels[run["run"]] for run in runs)], per_class),
        REPEATS if _repeated(result) else "",
    ]
    if tests:
        count = result.comparisons["p_wilcoxon"].count()
        holm = f"Holm's correction over the {count} tests of this table" if count else "not possible here"
        words = {"unit": report.unit, "margin": _margin(report), "least": MIN_DIFFERENCES, "resamples": RESAMPLES}
        blocks += [
            TESTS.format(seed=report.seed, holm=holm, **words),
            _table_of([_test_cells(test, result, report) for test in tests]),
        ]
    return [*blocks, _list(result.notes)]


def _run_cells(run: Mapping[str, Any], result: SettingResult, report: Report) -> dict[str, str]:
    by_patient, repeated = report.unit == PATIENT, _repeated(result)
    return {
        "run": report.labels[run["run"]],
        "folds": _listed(run["folds"]),
        "missing": _listed(run["missing_folds"]) or "none",
        **({"patients": str(run["patients"])} if by_patient else {}),
        "cases": str(run["cases"]),
        **({"repeats": str(run["repeats"])} if repeated else {}),
        "nnU-Net's mean": _number(run["nnunet_foreground_mean"]),
        "over cases": _mean_std(run, "cases", run["cases"]),
        "over folds": _mean_std(run, "folds", len(run["folds"])),
        **({"over repeats": _mean_std(run, "repeats", run["repeats"])} if repeated else {}),
        f"over the {result.common_cases} common": _number(run["mean_over_common_cases"]),
        "rank": _number(run["mean_rank"], ".2f"),
    }


def _test_cells(test: Mapping[str, Any], result: SettingResult, report: Report) -> dict[str, str]:
    units = {"patients": test["pairs"], "cases": test["cases"]} if report.unit == PATIENT else {"pairs": test["pairs"]}
    units |= {"repeats": test["repeats"]} if _repeated(result) else {}
    reason = f" ({test['reason']})" if test["reason"] else ""
    verdict = "n/a"
    if test["equivalent"] is not None:
        verdict = f"{'equivalent' if test['equivalent'] else 'not shown'} {_interval(test['interval_90'])}"
    return {
        "comparison": f"{report.labels[test['first']]} − {report.labels[test['second']]}",
        "folds": _listed(test["folds"]) or "none",
        **{name: str(count) for name, count in units.items()},
        "difference [95%]": f"{_number(test['mean_difference'], '+.4f')} {_interval(test['interval_95'])}",
        **({"over repeats": f"± {_number(test['std_over_repeats'])}"} if _repeated(result) else {}),
        "p": _number(test["p_wilcoxon"], ".2g") + reason,
        "p, Holm": _number(test["p_holm"], ".2g"),
        f"within {_margin(report)} [90%]": verdict,
    }


def _repeated(result: SettingResult) -> bool:
    return result.runs["repeats"].max() > 1


def _interval(bounds: Sequence[float]) -> str:
    low, high = (_number(value, "+.4f") for value in bounds)
    return f"[{low}, {high}]"


def _margin(report: Report) -> str:
    return f"±{report.equivalence:g} point{'' if report.equivalence == 1 else 's'}"


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


def _number(value: float, form: str = ".4f") -> str:
    return "n/a" if math.isnan(value) else f"{value:{form}}"


def _mean_std(values: Mapping[str, Any], over: str, total: int) -> str:
    mean, std, known = (values[name] for name in (f"mean_over_{over}", f"std_over_{over}", f"{over}_with_value"))
    left_out = f" (n = {known})" if known < total else ""
    return f"{_number(mean)} ± {_number(std)}{left_out}" if known else _number(mean)


def _draw_cases(axis, dice: pd.Series, labels: Sequence[str], colours: Sequence) -> None:
    measured = [values.droplevel("run") for _, values in dice.groupby("run", sort=False)]
    for i, (left, right) in enumerate(pairwise(measured)):
        both = left.index[left.index.isin(right.index)]
        axis.plot([i, i + 1], [left[both], right[both]], color="0.85", linewidth=0.6, zorder=1)
    for i, (values, colour) in enumerate(zip(measured, colours, strict=True)):
        known = values.dropna().to_numpy()
        axis.scatter(np.full(known.size, i), known, s=14, color=colour, alpha=0.7, linewidth=0, zorder=2)
        if known.size:
            axis.hlines(known.mean(), i - 0.25, i + 0.25, color="black", linewidth=1.5, zorder=3)
    low, high = axis.get_ylim()
    middle = min(max((low + high) / 2, SMALLEST_SPAN / 2), 1 - SMALLEST_SPAN / 2)
    axis.set_ylim(min(low, middle - SMALLEST_SPAN / 2), max(high, middle + SMALLEST_SPAN / 2))


def _draw_classes(axis, result: SettingResult, labels: Sequence[str], colours: Sequence) -> None:
    width = GROUP_WIDTH / len(labels)
    for i, (per_class, label, colour) in enumerate(zip(result.runs["per_class"], labels, colours, strict=True)):
        x = np.arange(len(result.classes)) - GROUP_WIDTH / 2 + (i + 0.5) * width
        means, spreads, _ = pd.DataFrame(per_class).to_numpy()
        axis.bar(x, np.nan_to_num(means), width, color=colour, label=label)
        # Dice ends at 0 and 1, and so do the whiskers
        below = np.minimum(np.nan_to_num(spreads), np.nan_to_num(means))
        above = np.minimum(np.nan_to_num(spreads), 1 - np.nan_to_num(means))
        axis.errorbar(x, means, [below, above], fmt="none", ecolor="0.25", elinewidth=0.8)
        for position in x[np.isnan(means)]:
            axis.text(position, 0.01, "n/a", rotation=90, ha="center", va="bottom", fontsize=7, color=colour)
    # bars start at nothing; the dots beside them show what happens near the top
    axis.set_ylim(0, 1)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _finish(axis, title: str, names: Sequence[str]) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylabel("Dice", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _shortened(text: str) -> str:
    # the end tells plans apart: nnUNetPlans_HiEndMAE, nnUNetPlans_ViTUNETR
    return text if len(text) <= LONGEST_LABEL else "…" + text[1 - LONGEST_LABEL :]
