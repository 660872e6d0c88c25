"""`hiendmae compare` on trees of summary.json with known answers."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import command_line
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy import stats

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.environment import device_words
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.compare import compare, short_names
from nnunetv2_hiendmae.evaluation.draws import SHOTS, Subset
from nnunetv2_hiendmae.evaluation.folds import append_folds
from nnunetv2_hiendmae.evaluation.metrics import HD95
from nnunetv2_hiendmae.evaluation.report import draw_comparison, write
from nnunetv2_hiendmae.evaluation.results import collect_runs, matching
from nnunetv2_hiendmae.evaluation.statistics import foreground_mean

NAN = math.nan
DATASET = "Dataset007_Toy"
LABELS = {"background": 0, "liver": 1, "spleen": 2}
OURS, STOCK, THIRD = (f"{t}__{p}__3d_fullres" for t, p in (("TrA", "Ours"), ("TrB", "Stock"), ("TrB", "Third")))
CASES = [f"case_{i:02d}" for i in range(10)]
# validation cases of two folds
FOLDS = [CASES[:5], CASES[5:]]


def write_fold(nnunet, run, fold, dice, labels=LABELS, dataset=DATASET):
    """One summary.json: case -> Dice of every foreground class, NaN where there is none."""
    folder = nnunet.results / dataset / run
    validation = folder / f"fold_{fold}" / "validation"
    validation.mkdir(parents=True)
    keys = [str(tuple(v) if isinstance(v, list) else v) for k, v in labels.items() if k != "background"]
    rows = [
        {
            "metrics": {key: {"Dice": float(value)} for key, value in zip(keys, values, strict=True)},
            "prediction_file": f"/somewhere/fold_{fold}/{case}.nii.gz",
        }
        for case, values in dice.items()
    ]
    (validation / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    return validation / "summary.json"


def random_dice(seed, cases, mean=0.6):
    values = np.clip(np.random.default_rng(seed).normal(mean, 0.1, (len(cases), 2)), 0, 1)
    return dict(zip(cases, values.tolist(), strict=True))


@pytest.fixture
def tree(nnunet):
    """Two runs on two folds, one run on the first only, and the splits they were trained with."""
    folder = nnunet.preprocessed / DATASET
    folder.mkdir()
    splits = [{"train": FOLDS[1 - i], "val": FOLDS[i]} for i in range(2)]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    for seed, (run, mean) in enumerate([(OURS, 0.75), (STOCK, 0.6)]):
        for fold in range(2):
            write_fold(nnunet, run, fold, random_dice(10 * seed + fold, FOLDS[fold], mean))
    write_fold(nnunet, THIRD, 0, random_dice(99, FOLDS[0], 0.65))
    return nnunet


def values(run, folds=(0, 1)):
    """(cases, classes) as the tree was written."""
    seed, mean = {OURS: (0, 0.75), STOCK: (10, 0.6), THIRD: (99, 0.65)}[run]
    return np.concatenate([list(random_dice(seed + f, FOLDS[f], mean).values()) for f in folds])


def rows(table):
    """Rows of a table by the names of its columns."""
    return list(table.itertuples(index=False))


def run_command(capsys, *arguments):
    code, out, err = command_line.run(capsys, "compare", "-d", 7, *arguments)
    assert code == 0 or (not out and len(err.strip().splitlines()) == 1)
    return code, out, err


def test_means_spreads_and_ranks(tree):
    report = compare(7, runs=["Ours", "Stock"])
    [result] = report.settings
    assert result.setting == "2-fold cross-validation" and result.classes == ["liver", "spleen"]
    assert report.notes == [] and result.notes == [] and result.common_cases == 10
    assert result.runs["run"].tolist() == [OURS, STOCK]
    for run in rows(result.runs):
        expected = values(run.run)
        assert run.folds == [0, 1] and run.missing_folds == []
        assert np.allclose(report.dice.xs(run.run, level="run")[["liver", "spleen"]], expected)
        assert run.nnunet_foreground_mean == pytest.approx(expected.mean(axis=0).mean())
        of_fold = {0: expected[:5].mean(), 1: expected[5:].mean()}
        assert run.nnunet_foreground_mean_of_fold == pytest.approx(of_fold)
        assert run.mean_over_common_cases == pytest.approx(expected.mean())
    better = (values(OURS).mean(axis=1) > values(STOCK).mean(axis=1)).mean()
    assert result.runs["mean_rank"].tolist() == pytest.approx([2 - better, 1 + better])


def test_paired_tests_are_scipys_with_holm_over_the_table(tree):
    [result] = compare(7).settings
    pairs = {(c.first, c.second): c for c in rows(result.comparisons)}
    assert list(pairs) == [(OURS, STOCK), (OURS, THIRD), (STOCK, THIRD)]
    difference = (values(OURS) - values(STOCK)).mean(axis=1)
    test = pairs[OURS, STOCK]
    assert test.pairs == 10 and test.mean_difference == pytest.approx(difference.mean())
    # the other two have five pairs and hence no p: a family of one
    assert test.p_wilcoxon == test.p_holm == pytest.approx(stats.wilcoxon(difference).pvalue)
    test = pairs[OURS, THIRD]
    assert test.folds == [0] and test.pairs == 5
    assert test.reason == "only 5 pairs that differ, needed 6"
    assert test.mean_difference == pytest.approx((values(OURS, [0]) - values(THIRD, [0])).mean())
    per_class = {(c.first, c.second, c.measure): c for c in rows(result.class_comparisons)}
    p = [stats.wilcoxon(values(OURS)[:, i] - values(STOCK)[:, i]).pvalue for i in range(2)]
    assert [per_class[OURS, STOCK, c].p_wilcoxon for c in ("liver", "spleen")] == pytest.approx(p)
    holm = [min(1, 2 * min(p)), max(2 * min(p), max(p))]
    assert sorted(per_class[OURS, STOCK, c].p_holm for c in ("liver", "spleen")) == pytest.approx(holm)


def test_missing_folds_are_named_and_not_averaged_over(tree):
    folder = tree.results / DATASET / THIRD / "fold_1"
    folder.mkdir()
    for checkpoint, option in (("", ""), ("checkpoint_best.pth", " --c"), ("checkpoint_final.pth", " --val")):
        (folder / checkpoint).touch()
        text = "\n".join(compare(7).settings[0].notes)
        command = f"nnUNetv2_train 7 3d_fullres 1 -p Third -tr TrB{option}{device_words()}"
        assert f"{THIRD}: no result of fold 1 (started, without validation/summary.json: 1; run: {command})" in text
    [result] = compare(7).settings
    ours, third = (next(run for run in rows(result.runs) if run.run == name) for name in (OURS, THIRD))
    assert third.missing_folds == [1] and third.nnunet_foreground_mean == pytest.approx(values(THIRD, [0]).mean())
    text = "\n".join(result.notes)
    assert "the runs stand on different folds" in text
    # what stands side by side is on the cases of fold 0 only
    assert result.common_cases == 5
    assert ours.mean_over_common_cases == pytest.approx(values(OURS, [0]).mean())


def test_results_of_a_training_before_the_one_that_was_stopped(tree):
    (tree.results / DATASET / OURS / "fold_1" / "checkpoint_latest.pth").touch()
    told = f"{OURS}: fold 1 is being trained, or was stopped (checkpoint_latest.pth is there): its results are of an"
    assert any(note.startswith(told) for note in compare(7).notes)
    assert compare(7, folds=[0]).notes == []


@pytest.mark.parametrize("text", ["", "[]", "{\"my_init_kwargs\": \"{'plans': {1: open}, 'configuration': '\"}"])
def test_a_debug_json_that_says_nothing(tree, text):
    (tree.results / DATASET / OURS / "fold_1" / "debug.json").write_text(text)
    assert compare(7).notes == []


def test_a_class_that_was_renamed_between_trainings(tree):
    about = {"labels": {"background": 0, "spleen": 1, "liver": 2}, "file_ending": ".nii.gz"}
    (tree.results / DATASET / STOCK / "dataset.json").write_text(json.dumps(about))
    told = f"class 1 is liver in {OURS} and spleen in {STOCK}: are they the same?"
    assert told in compare(7, runs=[OURS, STOCK]).notes
    assert compare(7, runs=[STOCK]).notes == []


def test_a_fold_that_trains_on_its_validation_cases(tree):
    splits = [{"train": FOLDS[0], "val": FOLDS[0]}, {"train": FOLDS[0], "val": FOLDS[1]}]
    (tree.preprocessed / DATASET / "splits_final.json").write_text(json.dumps(splits))
    [note] = compare(7).notes
    assert note.startswith("fold 0 trains on its validation cases (case_00, ")


def test_folds_choose(tree):
    # in the order of --runs
    report = compare(7, folds=[0], runs=["Third", "TrA", "TrB"])
    [result] = report.settings
    assert result.runs["run"].tolist() == list(report.labels) == [THIRD, OURS, STOCK]
    assert all(run.folds == [0] and run.missing_folds == [] for run in rows(result.runs)) and not result.notes
    with pytest.raises(UserError, match=r"--folds 3: .*: 0, 1$"):
        compare(7, folds=[0, 3])


def test_baseline(tree):
    [result] = compare(7, baseline="Stock").settings
    assert [(c.first, c.second) for c in rows(result.comparisons)] == [(OURS, STOCK), (THIRD, STOCK)]
    # given with --runs, it need not be named again
    assert len(compare(7, runs=["Ours"], baseline="Stock").settings[0].runs) == 2
    with pytest.raises(UserError, match=f"--baseline TrB .*: {STOCK}, {THIRD}"):
        compare(7, baseline="TrB")


FEW = ["TrA__Few_a__3d_fullres", "TrB__Few_b__3d_fullres", "TrB__Few_b2__3d_lowres", "TrB__Other__Few_b"]


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("Few_*", FEW),  # plans, and the last run's configuration
        ("Few_?", [FEW[0], FEW[1], FEW[3]]),
        ("Few_b", [FEW[1], FEW[3]]),
        ("Few_b2", [FEW[2]]),
        ("TrB__Few_*", FEW[1:3]),
        ("*_lowres", [FEW[2]]),
        (FEW[1], [FEW[1]]),
    ],
)
def test_runs_are_told_by_whole_names_parts_and_patterns_of_either(wanted, expected):
    assert matching(wanted, FEW) == expected


def test_a_literal_name_comes_before_a_pattern():
    names = ["T__p[1]__c", "T__p1__c"]
    assert matching("p[1]", names) == names[:1]
    assert matching("p[1]", names[1:]) == names[1:]


@pytest.mark.parametrize("wanted", ["Few", "few_*", "", "Few_c*"])
def test_a_name_that_fits_no_run_lists_all_of_them(wanted):
    with pytest.raises(UserError, match=rf"--runs {re.escape(wanted)} .*: {', '.join(FEW)}"):
        matching(wanted, FEW)


def test_patterns_of_plans_with_a_baseline(nnunet, capsys):
    """The last line of examples/few_shot.sh."""
    names = [f"nnUNetTrainer_{tr}__Few_{plans}__3d_fullres" for tr, plans in (("A", "a"), ("B", "b"), ("C", "scratch"))]
    for seed, name in enumerate([*names, STOCK]):
        write_fold(nnunet, name, 0, random_dice(seed, CASES))
    _, out, _ = run_command(capsys, "--runs", "Few_*", "--baseline", "Few_scratch")
    assert "| Few_a − Few_scratch | 0 | 10 |" in out and "| Few_b − Few_scratch | 0 | 10 |" in out
    assert "Stock" not in out
    code, _, err = run_command(capsys, "--runs", "Few_*", "--baseline", "Few_?")
    assert code == 2 and re.search(rf"--baseline Few_\? .*: {names[0]}, {names[1]}", err)


def test_fold_with_other_meanings_are_never_mixed(tree):
    """Folds 2 to 4 are few-shot folds: a setting for every amount and seed, folds of one setting together."""
    few = [Subset(SHOTS, 1, 0), Subset(SHOTS, 1, 1), Subset(SHOTS, 1, 0, seed=5)]
    _, numbers = append_folds(7, few)
    for number, subset in zip(numbers, few, strict=True):
        write_fold(tree, OURS, number, random_dice(number, FOLDS[subset.of_fold], 0.3))
    write_fold(tree, STOCK, 2, random_dice(77, FOLDS[0], 0.2))
    report = compare(7, baseline="Stock")
    names = [result.setting for result in report.settings]
    assert names == ["2-fold cross-validation", "1-shot (seed 0)", "1-shot (seed 5)"]
    cross, shot, other_seed = report.settings
    assert cross.runs["folds"].tolist() == [[0, 1], [0, 1], [0]]
    assert {r.run: r.folds for r in rows(shot.runs)} == {OURS: [2, 3], STOCK: [2]}
    assert shot.folds == {2: "1-shot of fold 0 (seed 0)", 3: "1-shot of fold 1 (seed 0)"}
    [comparison] = rows(shot.comparisons)
    assert comparison.folds == [2] and comparison.pairs == 5
    assert f"{THIRD}: no result of fold 2, 3" in shot.notes
    assert other_seed.runs["folds"].tolist() == [[4]] and other_seed.comparisons.empty
    assert f"the baseline {STOCK} has no result here, so nothing is tested" in other_seed.notes


def test_folds_that_are_not_in_the_splits(tree):
    write_fold(tree, OURS, 4, random_dice(4, CASES[:3]))
    (tree.results / DATASET / OURS / "fold_all").mkdir()
    report = compare(7)
    assert [r.setting for r in report.settings] == ["2-fold cross-validation", "fold 4, not in splits_final.json"]
    assert report.notes == [f"{OURS}: fold_all is left out, it validates on its training cases"]


def test_other_cases_than_those_of_the_splits(tree):
    write_fold(tree, "X__Y__Z", 0, random_dice(1, [*FOLDS[0][:3], "new"]))
    [result] = compare(7, runs=["Ours", "Y"], folds=[0]).settings
    assert result.common_cases == result.comparisons["pairs"].item() == 3
    text = "\n".join(result.notes)
    assert "the runs have different validation cases; only common ones are paired" in text
    assert "X__Y__Z: the 4 validation cases of fold 0 are not the 5 of splits_final.json" in text


def test_no_case_in_common(tree, tmp_path, capsys):
    write_fold(tree, "X__Y__Z", 0, random_dice(1, ["p", "q"]))
    _, out, _ = run_command(capsys, "--runs", "Ours", "Y", "--folds", 0, "-o", tmp_path)
    assert "n/a (no case in common)" in out and "over the 0 common" in out
    assert "signed-rank test, not possible here." in out and "Holm's" not in out


def test_without_splits(nnunet):
    write_fold(nnunet, OURS, 0, random_dice(0, CASES))
    report = compare(7)
    [result] = report.settings
    assert result.setting == "folds 0 to 4, no splits_final.json"
    assert report.notes == ["no splits_final.json: which cases belong to which fold was not checked"]
    assert result.comparisons.empty and math.isnan(result.runs["mean_rank"].item())


def test_cases_in_two_folds_are_told(nnunet):
    folder = nnunet.preprocessed / DATASET
    folder.mkdir()
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES[5:], "val": CASES[:5]}] * 2))
    for fold in range(2):
        write_fold(nnunet, OURS, fold, random_dice(fold, CASES[:5]))
    [result] = compare(7).settings
    assert result.setting == "2 overlapping splits, 5 training cases"
    assert "5 results are of cases that an earlier fold validated too" in result.notes[0]


def test_a_case_in_two_folds_is_one_pair(nnunet):
    """Seven cases validated twice are seven pairs of means, not fourteen; where a run has no value, the fold is out."""
    cases, dice = CASES[:7], {}
    for seed, run in enumerate((OURS, STOCK)):
        for fold in range(2):
            dice[run, fold] = random_dice(10 * seed + fold, cases, 0.6 + 0.1 * seed)
    dice[OURS, 0][cases[3]] = [NAN, NAN]
    for (run, fold), values_of in dice.items():
        write_fold(nnunet, run, fold, values_of)
    [test] = rows(compare(7).settings[0].comparisons)
    difference = np.array([[np.mean(dice[OURS, f][c]) - np.mean(dice[STOCK, f][c]) for f in range(2)] for c in cases])
    expected = np.nanmean(difference, axis=1)
    assert expected[3] == difference[3, 1] and test.pairs == 7
    assert test.mean_difference == pytest.approx(expected.mean())
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(expected).pvalue)
    within = stats.bootstrap((expected,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert test.interval_95 == pytest.approx(within.confidence_interval, abs=0.01)


def test_appended_folds_without_their_record_show_by_their_sizes(tree):
    append_folds(7, [Subset(SHOTS, 1, 0)])
    (tree.preprocessed / DATASET / "splits_hiendmae.json").unlink()
    write_fold(tree, OURS, 2, random_dice(2, FOLDS[0]))
    assert [result.setting for result in compare(7).settings] == ["3 overlapping splits, 1 to 5 training cases"]


def test_a_run_without_a_finished_fold_is_named(tree):
    """Trained on all cases only, or not at all: asked for or not, it does not vanish."""
    for name, folder in (("A__All__c", "fold_all"), ("A__Empty__c", "")):
        (tree.results / DATASET / name / folder).mkdir(parents=True)
    report = compare(7, runs=["Ours", "Empty", "All"])
    assert report.settings[0].runs["run"].tolist() == [OURS]
    assert "A__Empty__c, A__All__c: no result of fold 0, 1" in report.settings[0].notes
    assert "A__All__c: fold_all is left out, it validates on its training cases" in report.notes
    with pytest.raises(UserError, match=r"A__Empty__c, A__All__c in .*fold_\*/validation/summary.json"):
        compare(7, runs=["Empty", "All"])


def test_absent_classes_as_nnunet_treats_them(nnunet, tmp_path, capsys):
    """Spleen is in no case of the first run; the second sees one where there is none; one case holds nothing."""
    write_fold(nnunet, OURS, 0, {"a": [0.8, NAN], "b": [0.6, NAN], "c": [NAN, NAN]})
    write_fold(nnunet, STOCK, 0, {"a": [0.4, 0.0], "b": [0.2, NAN], "c": [NAN, NAN]})
    report = compare(7)
    [result] = report.settings
    ours, stock = rows(result.runs)
    assert math.isnan(ours.nnunet_foreground_mean) and stock.nnunet_foreground_mean == pytest.approx((0.3 + 0.0) / 2)
    means = {run: report.dice["mean"].xs(run, level="run").droplevel("setting").to_dict() for run in (OURS, STOCK)}
    assert means[OURS] == pytest.approx({(0, "a"): 0.8, (0, "b"): 0.6, (0, "c"): NAN}, nan_ok=True)
    assert means[STOCK] == pytest.approx({(0, "a"): 0.2, (0, "b"): 0.2, (0, "c"): NAN}, nan_ok=True)
    [test] = rows(result.comparisons)
    assert test.pairs == 2 and test.mean_difference == pytest.approx(0.5)
    assert ours.mean_over_common_cases == pytest.approx(0.7) and (ours.mean_rank, stock.mean_rank) == (1, 2)
    assert f"{OURS}: neither truth nor prediction holds spleen, so nnU-Net's foreground mean is n/a" in result.notes
    assert "all runs here: nothing to segment and nothing found in c; left out" in result.notes
    _, out, _ = run_command(capsys, "-o", tmp_path)
    assert "| spleen | n/a | 0.0000 ± n/a (n = 1) |" in out
    stored = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert stored["settings"][0]["runs"][0]["per_class"]["spleen"]["mean_over_cases"] is None


def test_a_class_that_one_fold_lacks(nnunet):
    write_fold(nnunet, OURS, 0, {"a": [0.8, NAN]})
    write_fold(nnunet, OURS, 1, {"b": [0.6, 0.4]})
    [result] = compare(7).settings
    [run] = rows(result.runs)
    assert run.nnunet_foreground_mean == pytest.approx((0.7 + 0.4) / 2)
    assert run.nnunet_foreground_mean_of_fold == pytest.approx({0: NAN, 1: 0.5}, nan_ok=True)
    assert f"{OURS}: a class does not occur in fold 0; left out of mean ± std over folds" in result.notes


def test_nnunets_own_evaluator(nnunet):
    """What nnU-Net writes is read, and its foreground mean is reproduced; the third case holds no label 2."""
    labels = {"background": 0, "first": [1, 2], "second": 2}
    reference, predicted = nnunet.raw / "truth", nnunet.results / DATASET / OURS / "fold_0" / "validation"
    rng = np.random.default_rng(0)
    for folder in (reference, predicted):
        folder.mkdir(parents=True)
        for i in range(3):
            volume = rng.integers(0, 3 if i < 2 else 2, (4, 5, 6)).astype(np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(volume), str(folder / f"case.v{i}.nii.gz"))
    (predicted.parents[1] / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    summary = predicted / "summary.json"
    arguments = (str(reference), str(predicted), str(summary), SimpleITKIO(), ".nii.gz", [(1, 2), 2])
    compute_metrics_on_folder(*arguments, num_processes=1)
    [run] = collect_runs(nnunet.results / DATASET)
    content = json.loads(summary.read_text())
    dice = run.folds[0]
    assert dice.index.tolist() == ["case.v0", "case.v1", "case.v2"]
    assert dice.columns.tolist() == ["(1, 2)", "2"] == sorted(content["mean"])
    assert np.isnan(dice.to_numpy()).sum() == 1
    assert foreground_mean(dice.to_numpy()) == content["foreground_mean"]["Dice"]
    assert compare(7).settings[0].classes == ["first", "second"]


def test_classes_are_in_the_order_of_their_labels(nnunet):
    """nnU-Net sorts keys as text, '10' before '2'."""
    write_fold(nnunet, OURS, 0, {"a": [0.1, 0.2, 0.3]}, labels={"background": 0, "x10": 10, "x2": 2, "x30": [3, 0]})
    assert compare(7).settings[0].classes == ["x2", "x30", "x10"]


def test_files_and_output(tree, tmp_path, capsys):
    output = tmp_path / "out"
    _, text, _ = run_command(capsys, "--baseline", "Stock", "-o", output)
    names = {"comparison.md", "comparison.json", "comparison.tex", "comparison.png"}
    names |= {"runs.csv", "tests.csv", "cases.csv"}
    assert {p.name for p in output.iterdir()} == names
    assert (output / "comparison.md").read_text(encoding="utf-8") in text
    assert "| Ours | TrA | Ours | 3d_fullres |" in text
    assert "| Third | 0 | 1 | 5 |" in text
    assert "Holm's correction over the 1 tests" in text
    with (output / "cases.csv").open() as f:
        cases = list(csv.DictReader(f))
    assert len(cases) == (10 + 10 + 5) * 3
    mean = [float(r["dice"]) for r in cases if r["run"] == OURS and r["class"] == "mean"]
    assert mean == pytest.approx(values(OURS).mean(axis=1).tolist())
    with (output / "runs.csv").open() as f:
        [row] = [r for r in csv.DictReader(f) if r["run"] == OURS and r["class"] == "spleen"]
    assert float(row["std_over_cases"]) == pytest.approx(values(OURS)[:, 1].std(ddof=1)) and row["mean_rank"] == ""
    with (output / "tests.csv").open() as f:
        assert len(list(csv.DictReader(f))) == 2 * 3
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    _, out, _ = run_command(capsys, "--baseline", "Stock", "--json")
    assert json.loads(out) == json.loads((output / "comparison.json").read_text())


def test_the_figure_says_who_lacks_folds(tree, tmp_path, drawn):
    draw_comparison(compare(7), tmp_path / "figure.png")
    dots, bars = drawn[0].axes
    told = ["Ours", "Stock", "Third\n(1 of 2 folds)"]
    assert [text.get_text() for text in dots.get_xticklabels()] == told
    assert [text.get_text() for text in bars.get_legend().get_texts()] == told


def test_short_names():
    assert list(short_names(["A__P__c", "B__P__c"]).values()) == ["A", "B"]
    assert list(short_names(["A__P__c", "B__Q__c"]).values()) == ["P", "Q"]
    assert list(short_names(["A__P__c", "B__P__c", "A__Q__c"]).values()) == ["A__P", "B__P", "A__Q"]
    assert short_names(["A__P__c", "B__P__d", "A__Q__c", "A__P__d"])["A__P__c"] == "A__P__c"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--runs", "Nothing"], f": {OURS}, {STOCK}, {THIRD}"),
        (["--baseline", "Nothing"], "--baseline Nothing "),
        (["--runs", "Ours", "--baseline", "Nothing"], "--baseline Nothing "),
        (["--folds", 9], "--folds 9: "),
        (["--seed", -1], "--seed is -1, "),
    ],
)
def test_bad_input(tree, capsys, arguments, told):
    code, _, err = run_command(capsys, *arguments)
    assert code == 2 and told in err


def test_no_results(nnunet):
    with pytest.raises(UserError, match=r"'7' in .*: nnUNetv2_train"):
        compare(7)
    (nnunet.results / DATASET / OURS / "fold_0").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{DATASET}, .*fold_\*/validation/summary.json.*: nnUNetv2_train"):
        compare(7)


@pytest.mark.parametrize(
    "text",
    ["{}", '{"metric_per_case": []}', '{"metric_per_case": [{"metrics": {"1": {}}, "prediction_file": "a"}]}'],
)
def test_damaged_summaries_are_named(tree, text):
    path = Path("fold_1/validation/summary.json")
    (tree.results / DATASET / OURS / path).write_text(text)
    with pytest.raises(
        UserError, match=rf"{OURS}/{path} .*{OURS} fold 1 .*: nnUNetv2_train 7 3d_fullres 1 -p Ours -tr TrA --val"
    ):
        compare(7)


def test_runs_with_other_classes(tree):
    write_fold(tree, "X__Y__Z", 0, {"a": [0.5]}, labels={"background": 0, "liver": 1})
    with pytest.raises(UserError, match=rf"X__Y__Z fold 0 .* 1, {OURS} fold 0 .* 1, 2: .*--runs"):
        compare(7)


def test_a_class_called_mean_is_told_by_its_label(nnunet):
    write_fold(nnunet, OURS, 0, {"a": [0.8, 0.4]}, labels={"background": 0, "mean": 1, "liver": 2})
    report = compare(7)
    assert report.settings[0].classes == ["label 1", "liver"]
    assert report.dice["mean"].item() == pytest.approx(0.6)


def test_classes_called_like_levels_metrics_and_formulas(nnunet, tmp_path, drawn):
    names = ["run", "fold", "case", "class", "dice", "$a$ $\\frac$"]
    labels = {name: i for i, name in enumerate(["background", *names])}
    for run in (OURS, STOCK, "T__Third__3d_fullres"):
        for fold in (0, 1):
            write_fold(nnunet, run, fold, {case: [0.1 * i for i in range(6)] for case in FOLDS[fold]}, labels)
    report = compare(7)
    assert report.settings[0].classes == ["label 1", "label 2", "label 3", "class", "dice", names[-1]]
    write(report, tmp_path)
    with (tmp_path / "cases.csv").open() as f:
        rows = [row for row in csv.DictReader(f) if row["class"] == "dice"]
    assert [float(row["dice"]) for row in rows] == [0.4] * 30
    # a formula would be an error
    drawn[0].draw_without_rendering()


@pytest.mark.parametrize("largest, scale", [(5, "linear"), (80, "symlog")])
def test_axes_of_metrics_without_a_bound_have_ticks(nnunet, tmp_path, drawn, largest, scale):
    write_fold(nnunet, OURS, 0, {"a": [largest, math.nan], "b": [0.001, math.nan]})
    draw_comparison(replace(compare(7), metric=HD95), tmp_path / "figure.png")
    for axis in drawn[0].axes:
        assert axis.get_yscale() == scale
        assert sum(0 <= tick <= axis.get_ylim()[1] for tick in axis.get_yticks()) > 2
    # beside the bar, however high the axis is
    [absent] = drawn[0].axes[1].texts
    drawn[0].draw_without_rendering()
    assert absent.get_window_extent().y0 < drawn[0].axes[1].get_window_extent().y1


def test_the_same_dice_give_the_same_files(nnunet, tmp_path):
    """docs/evidence, whose cases.csv holds all that the other files are made of."""
    evidence, name = Path(__file__).parents[2] / "docs" / "evidence" / "few_shot", "Dataset503_BrainTissue"
    halves = [["MNI09a_L", "MNI09a_R"], ["SRI24_L", "SRI24_R"]]
    (nnunet.preprocessed / name).mkdir()
    splits = [{"train": halves[1 - i], "val": halves[i]} for i in range(2)]
    (nnunet.preprocessed / name / "splits_final.json").write_text(json.dumps(splits))
    append_folds(503, [Subset(SHOTS, 1, 0), Subset(SHOTS, 1, 1)])
    with (evidence / "cases.csv").open() as f:
        cases = pd.DataFrame(csv.DictReader(f)).astype({"dice": float})
    cases = cases.pivot(index=["run", "fold", "case"], columns="class", values="dice")[["CSF", "GM", "WM"]]
    for (run, fold), table in cases.groupby(["run", "fold"]):
        dice = dict(zip(table.index.get_level_values("case"), table.to_numpy().tolist(), strict=True))
        write_fold(nnunet, run, fold, dice, {"background": 0, "CSF": 1, "GM": 2, "WM": 3}, name)
    arguments = ["--runs", "FewShot_*", "--baseline", "FewShot_scratch", "-o", str(tmp_path)]
    assert cli.main(["compare", "-d", "503", *arguments]) == 0
    for file in ("comparison.md", "cases.csv", "runs.csv"):
        assert (tmp_path / file).read_bytes() == (evidence / file).read_bytes(), file
    # but for the bootstrap's last digits, which may differ with scipy
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "tests.csv") for folder in (tmp_path, evidence)))
