"""Critical-difference diagrams (Demšar 2006): mean ranks of runs, and which of them no test tells apart."""

from pathlib import Path

from nnunetv2_hiendmae.evaluation.compare import Report, SettingResult
from nnunetv2_hiendmae.evaluation.figure import plain
from nnunetv2_hiendmae.figures import save_figure

MIN_RUNS = 3
LEVEL = 0.05
WIDTH_INCHES, ROW_INCHES, INCHES_PER_LINE = 11.0, 1.2, 0.2


def draw_critical_difference(report: Report, path: Path) -> None:
    """Writes a PNG with one row per setting that has enough runs and cases; where none has, no file is left at `path`.

    Runs are joined by a bar where no pair among them differs at the 5% level: Wilcoxon's signed-rank test with Holm's
    correction over all pairs, as in the tables, instead of the Nemenyi test of the original.
    """
    from matplotlib.figure import Figure

    results = [result for result in report.settings if has_enough(result)]
    if not results:
        path.unlink(missing_ok=True)
        return
    heights = [ROW_INCHES + INCHES_PER_LINE * len(result.runs) for result in results]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        _draw(axis, result, report)
    save_figure(figure, path, dpi=150)


def has_enough(result: SettingResult) -> bool:
    """Three runs, and so many cases that a test of one pair could differ: the smallest p of the exact signed-rank test,
    2 / 2^cases, times the number of pairs lies below 0.05. These are 7 cases for three runs and 9 for five."""
    if len(result.runs) < MIN_RUNS or result.runs["mean_rank"].isna().any():
        return False
    cases = min(result.common_cases, result.all_pairs["pairs"].min())
    return len(result.all_pairs) * 2.0 ** (1 - cases) < LEVEL


def not_told_apart(result: SettingResult) -> list[list[str]]:
    """The largest groups of runs that follow each other in rank and of which no pair differs."""
    runs = result.runs.sort_values("mean_rank")["run"].tolist()
    tests = result.all_pairs[result.all_pairs["p_holm"] < LEVEL]
    different = {frozenset(pair) for pair in zip(tests["first"], tests["second"], strict=True)}
    groups, end = [], 0
    for start in range(len(runs)):
        stop = start + 1
        while stop < len(runs) and not any(frozenset((runs[stop], run)) in different for run in runs[start:stop]):
            stop += 1
        # one that lies within another says nothing
        if stop > max(end, start + 1):
            groups.append(runs[start:stop])
            end = stop
    return groups


def _draw(axis, result: SettingResult, report: Report) -> None:
    runs = result.runs.sort_values("mean_rank")
    ranks, count = dict(zip(runs["run"], runs["mean_rank"], strict=True)), len(runs)
    groups = not_told_apart(result)
    lowest = len(groups) + 1
    for i, group in enumerate(groups, 1):
        axis.plot([ranks[group[0]] - 0.03, ranks[group[-1]] + 0.03], [i, i], color="black", linewidth=4)
    for place, (run, rank) in enumerate(ranks.items()):
        left = place < (count + 1) // 2
        depth = lowest + (place if left else count - 1 - place)
        end = 0.9 if left else count + 0.1
        axis.plot([rank, rank, end], [0, depth, depth], color="0.3", linewidth=0.8)
        label = plain(report.labels[run])
        text = f"{label} {rank:.2f}" if left else f"{rank:.2f} {label}"
        axis.text(end, depth, f" {text} ", ha="right" if left else "left", va="center", fontsize=8)
    axis.set_xlim(1, count)
    axis.set_ylim(lowest + (count + 1) // 2, 0)
    axis.set_xticks(range(1, count + 1))
    axis.xaxis.tick_top()
    axis.tick_params(labelsize=8)
    axis.set_yticks([])
    axis.spines[["left", "right", "bottom"]].set_visible(False)
    over = f"mean rank over {result.common_cases} cases, 1 is best"
    tests = f"Wilcoxon, Holm over {len(result.all_pairs)} pairs, {LEVEL:.0%}"
    title = f"{plain(report.dataset)}, {result.setting}: {report.metric.title}, {over}"
    axis.set_title(f"{title}\na bar joins runs that no test tells apart ({tests})", fontsize=8)
