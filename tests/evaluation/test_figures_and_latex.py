"""Critical-difference diagrams and LaTeX tables of `hiendmae compare`."""

import re
from itertools import combinations
from types import SimpleNamespace

import pandas as pd
import pytest
from test_compare import CASES, STOCK, random_dice, write_fold

from nnunetv2_hiendmae.evaluation.compare import compare
from nnunetv2_hiendmae.evaluation.critical_difference import draw_critical_difference, has_enough, not_told_apart
from nnunetv2_hiendmae.evaluation.latex import escaped, latex

RUNS = list("abcd")


def result_of(p_values, ranks=(1.2, 1.9, 3.0, 3.9), cases=20):
    """Four runs; pairs that are not named differ."""
    pairs = [*combinations(RUNS, 2)]
    tests = pd.DataFrame(pairs, columns=["first", "second"]).assign(pairs=cases, p_holm=0.001)
    for pair, p in p_values.items():
        tests.loc[pairs.index(tuple(pair)), "p_holm"] = p
    return SimpleNamespace(runs=pd.DataFrame({"run": RUNS, "mean_rank": ranks}), all_pairs=tests, common_cases=cases)


@pytest.mark.parametrize(
    "p_values, groups",
    [
        ({}, []),
        ({"ab": 0.05}, ["ab"]),
        ({"ab": 0.2, "bc": 0.3}, ["ab", "bc"]),
        ({"ab": 0.2, "bc": 0.3, "ac": 0.4}, ["abc"]),
        # runs in between differ: no bar goes over them
        ({"ac": 0.9}, []),
        # no test, no difference
        ({"cd": float("nan")}, ["cd"]),
        (dict.fromkeys(map("".join, combinations(RUNS, 2)), 1.0), ["abcd"]),
    ],
)
def test_bars_join_what_no_test_tells_apart(p_values, groups):
    assert ["".join(group) for group in not_told_apart(result_of(p_values))] == groups


def test_groups_follow_ranks_not_the_order_of_runs():
    assert not_told_apart(result_of({"ad": 0.5}, ranks=(2, 3, 4, 1))) == [["d", "a"]]


# six pairs: 6 · 2 / 2^8 = 0.047
@pytest.mark.parametrize("cases, enough", [(7, False), (8, True)])
def test_enough_cases(cases, enough):
    assert has_enough(result_of({}, cases=cases)) is enough


def test_a_diagram_for_three_runs(nnunet, tmp_path, drawn):
    path = tmp_path / "critical_difference.png"
    names = [f"T__{plans}__3d_fullres" for plans in ("Best", "Middle", "Same")]
    for seed, (name, mean) in enumerate(zip(names, (0.9, 0.5, 0.5), strict=True)):
        write_fold(nnunet, name, 0, random_dice(seed, CASES, mean))
    # a baseline leaves pairs out of the tables, not out of the diagram
    report = compare(7, baseline="Best")
    assert len(report.settings[0].comparisons) == 2 and len(report.settings[0].all_pairs) == 3
    draw_critical_difference(report, path)
    assert path.exists()
    [axis] = drawn[0].axes
    texts = [text.get_text().strip() for text in axis.texts]
    assert texts[0] == "Best 1.00" and re.fullmatch(r"\d\.\d\d (Middle|Same)", texts[2])
    assert "10 cases" in axis.get_title() and "Holm over 3 pairs" in axis.get_title()
    assert sum(line.get_linewidth() == 4 for line in axis.lines) == 1
    # one that is no longer true goes
    draw_critical_difference(compare(7, runs=["Best", "Middle"]), path)
    assert not path.exists()


def test_latex(nnunet):
    labels = {"background": 0, "left_lung": 1, "tumour & 50%": 2}
    names = [STOCK, "nnUNetTrainer_HiEndMAE__nnUNetPlans_HiEndMAE__3d_fullres"]
    for seed, name in enumerate(names):
        write_fold(nnunet, name, 0, random_dice(seed, CASES), labels)
    report = compare(7, baseline="Stock")
    text = latex(report)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert rows[0] == r"class & Stock & nnUNetPlans\_HiEndMAE \\"
    values = report.settings[0].runs["per_class"][0]["left_lung"]
    mean, std = values["mean_over_cases"], values["std_over_cases"]
    assert rows[1].startswith(rf"left\_lung & {mean:.4f} $\pm$ {std:.4f} &")
    assert rows[2].startswith(r"tumour \& 50\% &")
    p = report.settings[0].comparisons["p_holm"].item()
    assert rows[-1] == rf"$p$ (Holm) against Stock & -- & {p:.4f} \\"
    assert all(len(re.findall(r"(?<!\\)&", row)) == 2 for row in rows)
    # nothing is left that LaTeX takes for a command, and braces close
    outside = re.sub(r"\\[A-Za-z]+|\\[&%$#_{}\\]|\$[^$]*\$", "", text.split("\n", 1)[1])
    assert not re.search(r"[%#_~^−±]", outside) and outside.count("{") == outside.count("}")


def test_escaping():
    assert escaped(r"a_b%c\d~e^f{g}−1±2") == (
        r"a\_b\%c\textbackslash{}d\textasciitilde{}e\textasciicircum{}f\{g\}$-$1$\pm$2"
    )
    # other letters in pdflatex's fonts; options, at the start of a row
    assert escaped("[1]<*>|") == r"{[}1]{\textless}{*}{\textgreater}{\textbar}"
