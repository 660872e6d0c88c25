"""Tables of a comparison for a paper."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nnunetv2_hiendmae.evaluation.compare import Report, SettingResult

_NAMED = {"<": r"\textless", ">": r"\textgreater", "|": r"\textbar", "[": "[", "*": "*"}
# − is not set up in pdflatex
_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "−": "$-$",
        "±": r"$\pm$",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        # pdflatex's own fonts have others in their places, and the last two would be options of the row before
        **{character: f"{{{command}}}" for character, command in _NAMED.items()},
    }
)


def latex(report: Report) -> str:
    """A table for each metric and setting: a row for each class, a column for each run. Needs the package booktabs."""
    tables = (
        _table(of_metric, result) for of_metric in (report, *report.others.values()) for result in of_metric.settings
    )
    return "\n".join(["% needs \\usepackage{booktabs}; letters that pdflatex lacks need LuaLaTeX", *tables])


def escaped(text: str) -> str:
    """As LaTeX shows it."""
    return text.translate(_ESCAPED)


def _table(report: Report, result: SettingResult) -> str:
    metric, runs = report.metric, result.runs.to_dict("records")
    caption = f"{metric.label} on {report.dataset}, {result.setting}: mean ± standard deviation over cases."
    head = ["class", *(report.labels[run["run"]] for run in runs)]
    per_class = [
        [escaped(name), *(_mean_std(run["per_class"][name], metric.decimals) for run in runs)]
        for name in result.classes
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'c' * len(runs)}}}",
        r"\toprule",
        _row(map(escaped, head)),
        r"\midrule",
        *map(_row, per_class),
        r"\midrule",
        *map(_row, _summary(report, result, runs)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _summary(report: Report, result: SettingResult, runs: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    yield ["mean of classes", *(_mean_std(run, report.metric.decimals) for run in runs)]
    yield [f"rank on {result.common_cases} common cases", *(_number(run["mean_rank"], 2) for run in runs)]
    if report.baseline is not None and len(result.comparisons):
        p = dict(zip(result.comparisons["first"], result.comparisons["p_holm"], strict=True))
        against = escaped(report.labels[report.baseline])
        yield [f"$p$ (Holm) against {against}", *(_number(p.get(run["run"], np.nan), 4) for run in runs)]


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _mean_std(values: Mapping[str, Any], decimals: int) -> str:
    mean, std = (_number(values[f"{name}_over_cases"], decimals) for name in ("mean", "std"))
    return rf"{mean} $\pm$ {std}"


def _number(value: float, decimals: int) -> str:
    return "--" if np.isnan(value) else f"{value:.{decimals}f}"
