"""The figure of a comparison: a dot per case, a bar per class."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.evaluation.compare import Report, SettingResult
from nnunetv2_hiendmae.evaluation.metrics import MEAN
from nnunetv2_hiendmae.figures import save_figure

COLOURS = "tab10"
ROW_INCHES = 3.4
INCHES_PER_RUN = 0.9
INCHES_PER_BAR = 0.22
GROUP_WIDTH = 0.8
LONGEST_LABEL = 28
# the dots' axis never shows less than this: differences in the fourth digit must not look like a gulf
SMALLEST_SPAN = 0.2
# mm or mL
SMALLEST_LOG = 10
# above the largest of these, whose dot would be cut
HEADROOM = 1.05


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
    figure.suptitle(plain(report.dataset), fontsize=11)
    save_figure(figure, path, dpi=150)


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
            of_axis = axis.get_xaxis_transform()
            style = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7, "color": colour}
            axis.text(position, 0.01, "n/a", transform=of_axis, **style)
    # bars start at nothing; the dots beside them show what happens near the top
    if largest is not None:
        axis.set_ylim(0, largest)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _finish(axis, title: str, names: Sequence[str], report: Report) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylabel(report.metric.label, fontsize=8)
    if report.metric.largest is None:
        # misses lie far above everything else; where nothing does, this scale would have no ticks
        if axis.get_ylim()[1] > SMALLEST_LOG:
            axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, HEADROOM * axis.get_ylim()[1])
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _shortened(text: str) -> str:
    # the end tells plans apart: nnUNetPlans_HiEndMAE, nnUNetPlans_ViTUNETR
    return plain(text if len(text) <= LONGEST_LABEL else "…" + text[1 - LONGEST_LABEL :])


def plain(text: str) -> str:
    """Text that matplotlib takes for text: between two dollars it reads formulas."""
    return text.replace("$", r"\$")
