"""Repeated draws and patients: which cases a repeat trains on, and what is made of its results."""

import csv
import json
import math
import re
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_compare import DATASET, OURS, STOCK, rows, write_fold
from test_splits import CASES, NAME, folder, run, shots, toy  # noqa: F401

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation import statistics
from nnunetv2_hiendmae.evaluation.compare import compare
from nnunetv2_hiendmae.evaluation.draws import FRACTION, SHOTS, Subset, draw
from nnunetv2_hiendmae.evaluation.folds import append_folds, list_folds
from nnunetv2_hiendmae.evaluation.statistics import equivalent, paired_test

HALVES = {f"p{i:02d}": [f"p{i:02d}_L", f"p{i:02d}_R"] for i in range(10)}


def patients_of(groups):
    return {case: min(cases) for cases in groups.values() for case in cases}


def trained(cases, value, repeats, patients=None, kind=SHOTS):
    """Training cases of each repeat."""
    subsets = [Subset(kind, value, of_fold=1, seed=3, repeat=r) for r in range(repeats)]
    return [set(draw({"train": cases, "val": ["v"]}, subset, patients or {})["train"]) for subset in subsets]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 16), data=st.data())
def test_repeats_are_disjoint_while_there_are_enough_cases(count, data):
    """For every number of shots with which they can be, whatever is asked for first or later."""
    cases = [f"c{i}" for i in range(count)]
    repeats = data.draw(st.integers(1, count))
    for k in range(1, count // repeats + 1):
        drawn = trained(cases, k, repeats)
        assert len(set.union(*drawn)) == k * repeats
        more = trained(cases, min(1, 1.7 * k / count), repeats, kind=FRACTION)
        assert all(less <= several for less, several in zip(drawn, more, strict=True))


@given(seed=st.integers(0, 5), of_fold=st.integers(0, 4), k=st.integers(1, 12))
def test_the_first_repeat_is_the_draw_without_repeats(seed, of_fold, k):
    order = np.random.default_rng([seed, of_fold]).permutation(12)
    drawn = draw({"train": CASES[::-1], "val": ["v"]}, Subset("shots", k, of_fold, seed))
    assert drawn == {"train": sorted(CASES[i] for i in order[:k]), "val": ["v"]}


def test_two_repeats_share_no_more_than_they_must():
    for k in range(1, 10):
        one, two = trained(CASES[:9], k, 2)
        assert len(one & two) == max(0, 2 * k - 9)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=9), data=st.data())
def test_a_draw_takes_other_patients_and_so_do_repeats(sizes, data):
    groups = {f"p{i}": [f"p{i}_{j}" for j in range(size)] for i, size in enumerate(sizes)}
    cases, patients = [*chain(*groups.values())], patients_of(groups)
    repeats = data.draw(st.integers(1, len(sizes)))
    for k in range(1, len(sizes) // repeats + 1):
        drawn = trained(cases, k, repeats, patients)
        assert len({patients[case] for case in chain(*drawn)}) == k * repeats


def test_a_patients_other_cases_come_before_the_same_ones():
    """Four patients of two cases: in the second repeat all patients are there again, but each with its other case."""
    groups = {f"p{i}": [f"p{i}_L", f"p{i}_R"] for i in range(4)}
    one, two = trained([*chain(*groups.values())], 4, 2, patients_of(groups))
    assert not one & two and {c[:2] for c in one} == {c[:2] for c in two} == set(groups)


def test_command_appends_what_is_missing(folder, capsys):  # noqa: F811
    run(capsys, "--shots", 1)
    _, out, _ = run(capsys, "--shots", 1, 3, "--repeats", 3, "--json")
    new = json.loads(out)["folds"]
    assert [fold["fold"] for fold in new] == [5, 6, 7, 8, 9, 10]
    assert [fold.get("repeat", 0) for fold in new] == [0, 1, 2] * 2 and "repeat" not in new[0]
    assert [fold["meaning"] for fold in new[:2]] == ["1-shot of fold 0 (seed 0)", "1-shot of fold 0 (seed 0, repeat 1)"]
    splits = list_folds(7)
    used = [set(splits.folds[number]["train"]) for number in range(5, 11)]
    assert len(set.union(*used[:3])) == 3 and len(set.union(*used[3:])) == 9
    assert all(few <= many for few, many in zip(used[:3], used[3:], strict=True))
    assert all(splits.folds[number]["val"] == splits.folds[0]["val"] for number in range(5, 11))
    before = (folder / "splits_hiendmae.json").read_bytes()
    assert json.loads(run(capsys, "--shots", 1, 3, "--repeats", 3, "--json")[1])["folds"] == new
    assert (folder / "splits_hiendmae.json").read_bytes() == before
    _, out, _ = run(capsys, "--shots", 1, "--repeats", 5)
    assert [int(n) for n in re.findall(r"fold (\d+): 1-shot", out)] == [5, 6, 7, 11, 12]
    run(capsys, "--fraction", 0.3, "--repeats", 2)
    _, out, _ = run(capsys, "--remove", 14)
    assert "fold 13: 30% of fold 0 (seed 0), 3 to train" in out and "fold 14" not in out


def test_what_could_not_be_kept_apart_is_told(folder, caplog):  # noqa: F811
    """Fold 0 has nine training cases: 2 x 4 are disjoint, 3 x 4 are not."""
    append_folds(7, [shots(4, repeat=r) for r in range(2)])
    assert not caplog.messages
    found, _ = append_folds(7, [shots(4, repeat=r) for r in range(3)])
    one, two, three = (set(found.folds[n]["train"]) for n in (5, 6, 7))
    shared = sorted(three & (one | two))
    assert len(shared) == 3
    [told] = caplog.messages
    assert told.startswith(f"4-shot of fold 0 (seed 0): the cases {', '.join(shared)} ") and " 3 repeats" in told


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--shots", 1, "--repeats", 10], r"'1-shot of fold 0 \(seed 0, repeat 9\)' .*fold 6; .*--repeats 9 "),
        (["--fraction", 1, "--repeats", 2], r"'100% of fold 0 \(seed 0, repeat 1\)' .*fold 5; .*--repeats 1 "),
        (["--shots", 1, "--repeats", 0], "--repeats is 0, "),
    ],
)
def test_repeats_that_would_be_none(folder, capsys, arguments, told):  # noqa: F811
    code, _, err = run(capsys, *arguments)
    assert code == 2 and re.search(told, err)
    assert not (folder / "splits_final.json").exists()


def write_patients(root, groups):
    root.mkdir(exist_ok=True)
    (root / "patients.json").write_text(json.dumps(groups))


def test_nnunets_own_folds_keep_patients_together(toy, folder):  # noqa: F811
    """Pairs of cases are six patients; patients of one case each give nnU-Net's folds."""

    def begin_anew(groups):
        (folder / "splits_final.json").unlink()
        (folder / "splits_hiendmae.json").unlink()
        write_patients(toy.raw / NAME, groups)

    plain = append_folds(7, [shots(1)])[0].folds
    begin_anew({case: [case] for case in CASES})
    assert append_folds(7, [shots(1)])[0].folds == plain
    groups = {f"p{i}": CASES[2 * i : 2 * i + 2] for i in range(6)}
    begin_anew(groups)
    patients = patients_of(groups)
    folds = append_folds(7, [shots(1)])[0].folds[:5]
    assert sorted(case for fold in folds for case in fold["val"]) == CASES
    for fold in folds:
        assert sorted([*fold["train"], *fold["val"]]) == CASES
        assert not {patients[c] for c in fold["train"]} & {patients[c] for c in fold["val"]}
    begin_anew({f"p{i}": CASES[3 * i : 3 * i + 3] for i in range(4)})
    with pytest.raises(UserError, match=r"has 4 patients, .*\b5; "):
        append_folds(7, [shots(1)])


def test_folds_that_tear_patients_are_refused_by_name(folder, caplog):  # noqa: F811
    found, _ = append_folds(7, [shots(1)])
    train, val = found.folds[0]["train"][0], found.folds[0]["val"][-1]
    write_patients(folder, {"one": [train, val]})
    with pytest.raises(UserError, match=rf"fold 0 .*\({train} and {val}\)"):
        append_folds(7, [shots(2)])
    assert list(list_folds(7).appended) == [5]
    assert any(m.startswith("fold 0 ") and f"({train} and {val})" in m for m in caplog.messages)
    assert any(m.startswith("10 cases are not in patients.json") for m in caplog.messages)


def test_a_draw_that_patients_json_changed_is_not_taken_for_nested(folder):  # noqa: F811
    found, _ = append_folds(7, [shots(2)])
    one, other = found.folds[5]["train"]
    write_patients(folder, {"both": [one, other]})
    with pytest.raises(UserError, match=r"'3-shot of fold 0 \(seed 0\)' .*fold 5, .*patients.json"):
        append_folds(7, [shots(3)])
    assert append_folds(7, [shots(3, seed=1)])[1] == [6]


@pytest.mark.parametrize(
    "groups, told",
    [
        ({}, r"patients.json is damaged"),
        ({"a": "case_000"}, r"patients.json is damaged: a: "),
        ({"a": []}, r"patients.json is damaged: a: "),
        ({"a": [1]}, r"patients.json is damaged: a.0: "),
        ({"a": CASES[:2], "b": CASES[1:3]}, r"'case_001' .*'a' and 'b'"),
        (
            {"a": ["case_000", "case_01"]},
            r"patients.json names case_01, .* lacks case_001, case_002, case_003 and 8 more",
        ),
    ],
)
def test_a_bad_patients_json(toy, folder, capsys, groups, told):  # noqa: F811
    write_patients(toy.raw / NAME, groups)
    code, _, err = run(capsys, "--shots", 1)
    assert code == 2 and re.search(told, err)
    assert not (folder / "splits_final.json").exists()


def test_two_files_must_agree_and_others_than_those_of_the_folds_may_stand_there(toy, folder):  # noqa: F811
    groups = {"a": CASES[:2], **{case: [case] for case in CASES[2:]}, "held out": ["x", "y"]}
    write_patients(toy.raw / NAME, groups)
    write_patients(folder, {**groups, "a": CASES[1::-1]})
    assert append_folds(7, [shots(1)])[1] == [5]
    write_patients(folder, {"a": CASES[:3]})
    with pytest.raises(UserError, match=r"raw.*patients.json and .*preprocessed.*patients.json contradict"):
        append_folds(7, [shots(2)])


@pytest.fixture
def repeated(nnunet):
    """Two folds of ten patients' halves, 1-shot of both in three repeats, and two runs of them: (run, fold) -> Dice.

    One run lacks a repeat of fold 1, one case has no value in one repeat; the repeats differ by far more than the runs.
    """
    cases = [case for halves in HALVES.values() for case in halves]
    there = nnunet.preprocessed / DATASET
    there.mkdir()
    splits = [{"train": cases[10:], "val": cases[:10]}, {"train": cases[:10], "val": cases[10:]}]
    (there / "splits_final.json").write_text(json.dumps(splits))
    found, numbers = append_folds(7, [shots(1, of_fold=f, repeat=r) for f in range(2) for r in range(3)])
    rng, dice = np.random.default_rng(0), {}
    for number in numbers:
        for name, better in ((OURS, 0.03), (STOCK, 0)):
            if (name, number) == (STOCK, numbers[-1]):
                continue
            patient = dict(zip(HALVES, rng.normal(0, 0.02, 10), strict=True))
            level = 0.4 + better + 0.2 * found.appended[number].repeat
            dice[name, number] = {
                c: (level + patient[c[:3]] + rng.normal(0, 0.01, 2)).tolist() for c in splits[number > 4]["val"]
            }
    dice[OURS, 3]["p00_L"] = [math.nan, math.nan]
    for (name, number), values in dice.items():
        write_fold(nnunet, name, number, values)
    return nnunet, found, dice


def paired(found, dice):
    """Case -> mean over repeats of the difference in the same repeat, by loops."""
    differences = {}
    for (name, number), values in dice.items():
        for case, value in values.items():
            if name == OURS and (STOCK, number) in dice:
                difference = np.mean(value) - np.mean(dice[STOCK, number][case])
                differences.setdefault(case, []).append(difference)
    return {case: np.nanmean(values) for case, values in differences.items()}


def test_repeats_are_one_setting_paired_by_case_and_repeat(repeated):
    _, found, dice = repeated
    [result] = compare(7).settings
    assert result.setting == "1-shot (seed 0)" and result.common_cases == 20
    [test] = rows(result.comparisons)
    expected = paired(found, dice)
    assert (test.pairs, test.cases, test.repeats, test.folds) == (20, 20, 3, [2, 3, 4, 5, 6])
    assert test.mean_difference == pytest.approx(np.mean(list(expected.values())))
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(list(expected.values())).pvalue)
    # the repeats differ by 0.2; had they been mixed, the difference would be of that size
    assert test.mean_difference == pytest.approx(0.03, abs=0.02)
    # within a repeat, over the cases that all repeats of both runs have: those of fold 0 but one
    of_repeat = [
        np.mean([np.mean(dice[OURS, n][c]) - np.mean(dice[STOCK, n][c]) for c in dice[OURS, 2] if c != "p00_L"])
        for n in (2, 3, 4)
    ]
    assert test.std_over_repeats == pytest.approx(np.std(of_repeat, ddof=1))
    ours, stock = rows(result.runs)
    once = {
        c: np.nanmean([np.mean(dice[OURS, n][c]) for n in numbers])
        for numbers in ((2, 3, 4), (5, 6, 7))
        for c in dice[OURS, numbers[0]]
    }
    assert ours.cases == 20 and ours.repeats == stock.repeats == 3 and stock.missing_folds == [7]
    assert ours.mean_over_cases == pytest.approx(np.mean(list(once.values())))
    assert ours.std_over_cases == pytest.approx(np.std(list(once.values()), ddof=1))
    # between repeats, over cases that have a value in all of them
    means = [
        np.mean([np.mean(dice[OURS, n][c]) for n in (2 + r, 5 + r) for c in dice[OURS, n] if c != "p00_L"])
        for r in range(3)
    ]
    assert ours.mean_over_repeats == pytest.approx(np.mean(means))
    assert ours.std_over_repeats == pytest.approx(np.std(means, ddof=1)) == pytest.approx(0.2, abs=0.03)
    assert not any("earlier fold validated" in note for note in result.notes)


def test_patients_are_the_unit_of_tests(repeated, tmp_path, capsys):
    nnunet, found, dice = repeated
    write_patients(nnunet.preprocessed / DATASET, HALVES)
    report = compare(7)
    [result], cases = report.settings, paired(found, dice)
    expected = np.array([np.mean([cases[c] for c in halves]) for halves in HALVES.values()])
    [test] = rows(result.comparisons)
    assert report.unit == "patient" and (test.pairs, test.cases) == (10, 20)
    assert test.mean_difference == pytest.approx(expected.mean())
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(expected).pvalue)
    assert [run.patients for run in rows(result.runs)] == [10, 10] and report.notes == []
    # written, with the numbers of patients, cases and repeats
    assert cli.main(["compare", "-d", "7", "-o", str(tmp_path), "--equivalence", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "| Ours | 2 3 4 5 6 7 | none | 10 | 20 | 3 | " in out
    assert "| comparison | folds | patients | cases | repeats | difference [95%] | over repeats | p | p, Holm |" in out
    assert "| Ours − Stock | 2 3 4 5 6 | 10 | 20 | 3 | " in out and "bootstrap samples of patients" in out
    with (tmp_path / "tests.csv").open() as f:
        row = next(csv.DictReader(f))
    counts = ("pairs", "cases", "repeats")
    assert [row[name] for name in counts] == ["10", "20", "3"] and float(row["high_90"]) == test.interval_90[1]
    with (tmp_path / "runs.csv").open() as f:
        row = next(csv.DictReader(f))
    assert (row["patients"], row["repeats"], float(row["std_over_repeats"])) == (
        "10",
        "3",
        result.runs["std_over_repeats"][0],
    )
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert (stored["unit"], stored["equivalence"]) == ("patient", 0.5)
    assert [stored["settings"][0]["comparisons"][0][name] for name in counts] == [10, 20, 3]


def test_what_is_wrong_with_patients_is_told(repeated):
    nnunet, _, _ = repeated
    write_patients(nnunet.preprocessed / DATASET, {"a": ["p00_L", "p09_R"], "b": ["p01_L"]})
    notes = compare(7, folds=[2, 3]).notes
    assert "8 cases are not in patients.json" in notes[0]
    [test] = rows(compare(7).settings[0].comparisons)
    assert test.pairs == 19
    write_patients(nnunet.preprocessed / DATASET, {"a": ["p00_L", "pO9_R"]})
    with pytest.raises(UserError, match=r"patients.json names pO9_R, .*p00_R"):
        compare(7)


def test_results_of_torn_patients_are_told(repeated):
    nnunet, found, _ = repeated
    case = found.folds[2]["train"][0]
    write_patients(nnunet.preprocessed / DATASET, {"a": ["p00_L", case]})
    assert any(f"fold 2 trains and validates on the same patients ({case} and p00_L)" in n for n in compare(7).notes)


def cluster_bootstrap(difference, clusters, level, resamples=4000):
    """Percentile interval, patient by patient and case by case."""
    rng, groups = np.random.default_rng(1), {}
    for value, cluster in zip(difference, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    groups = list(groups.values())
    means = [
        sum(sum(groups[i]) / len(groups[i]) for i in rng.choice(len(groups), len(groups))) / len(groups)
        for _ in range(resamples)
    ]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


def test_clusters_are_bootstrapped_as_a_whole():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 15, 40)
    difference = rng.normal(0, 0.05, 15)[clusters] + rng.normal(0.01, 0.01, 40)
    difference[3] = math.nan
    test = paired_test(difference, np.zeros(40), clusters)
    known = ~np.isnan(difference)
    means = [difference[known & (clusters == c)].mean() for c in np.unique(clusters)]
    assert (test["pairs"], test["cases"]) == (len(means), 39)
    assert test["mean_difference"] == pytest.approx(np.mean(means))
    assert test["p_wilcoxon"] == pytest.approx(stats.wilcoxon(means).pvalue)
    for name, level in (("interval_95", 0.95), ("interval_90", 0.9)):
        low, high = test[name]
        expected = cluster_bootstrap(difference[known], clusters[known], level)
        assert [low, high] == pytest.approx(expected.tolist(), abs=0.05 * (high - low))
    naive_low, naive_high = paired_test(difference, np.zeros(40))["interval_95"]
    assert naive_high - naive_low < 0.8 * (test["interval_95"][1] - test["interval_95"][0])
    # one case each is no cluster; names may be anything
    single = paired_test(difference, np.zeros(40), [f"c{i}" for i in range(40)])
    assert single == paired_test(difference, np.zeros(40))


def test_halves_of_patients_are_not_independent(monkeypatch):
    """Two equal runs on both halves of 12 patients, which differ by a tenth of what patients differ by.

    Of 400 such comparisons 5% ± 3.3% (three standard errors) may have p < 0.05. Cases taken for independent give 16%:
    the variance of the signed ranks' sum doubles, P(|z| > 1.96 / √2).
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    rng, patients, found = np.random.default_rng(0), np.repeat(np.arange(12), 2), []
    for _ in range(400):
        difference = rng.normal(0, 0.03, 12)[patients] + rng.normal(0, 0.003, 24)
        tests = (paired_test(difference, np.zeros(24), clusters) for clusters in (None, patients))
        found.append([test["p_wilcoxon"] < 0.05 for test in tests])
    naive, ours = np.mean(found, axis=0)
    assert naive > 0.12 and ours == pytest.approx(0.05, abs=0.033)


def test_the_narrower_interval_is_scipys():
    difference = np.random.default_rng(0).normal(0.002, 0.01, 20)
    options = {"method": "percentile", "n_resamples": statistics.RESAMPLES, "batch": 1000}
    test = paired_test(difference, np.zeros(20), seed=5)
    for level in (90, 95):
        rng = np.random.default_rng(5)
        expected = stats.bootstrap((difference,), np.mean, confidence_level=level / 100, rng=rng, **options)
        assert test[f"interval_{level}"] == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)


@pytest.mark.parametrize(
    "pairs, interval, verdict",
    [
        (6, (-0.009, 0.0099), True),
        (6, (-0.010, 0.005), False),
        (6, (-0.005, 0.010), False),
        (6, (0.002, 0.008), True),
        (6, (0.0, 0.0), True),
        (5, (0.0, 0.0), None),
        (0, (math.nan, math.nan), None),
    ],
)
def test_equivalence_is_inclusion(pairs, interval, verdict):
    assert equivalent(pairs, interval, 0.01) is verdict


def test_equivalence_of_runs(nnunet, tmp_path, capsys):
    """Differences of 0.4 ± 0.1 points are within half a point, not within 0.3; those of the spleen are twice that."""
    cases, rng = [f"c{i}" for i in range(30)], np.random.default_rng(0)
    spleen = 0.008 + rng.normal(0, 0.002, 30)
    write_fold(nnunet, OURS, 0, {c: [0.5, 0.7 + d] for c, d in zip(cases, spleen, strict=True)})
    write_fold(nnunet, STOCK, 0, {c: [0.5, 0.7] for c in cases})
    for margin, verdict in ((1.0, True), (0.5, True), (0.3, False)):
        [result] = compare(7, equivalence=margin).settings
        assert [test.equivalent for test in rows(result.comparisons)] == [verdict]
        assert [test.equivalent for test in rows(result.class_comparisons)] == [True, margin == 1]
    for margin, words in (("1", "within ±1 point [90%]"), ("0.3", "within ±0.3 points [90%]")):
        assert cli.main(["compare", "-d", "7", "--equivalence", margin]) == 0
        out = capsys.readouterr().out
        assert f"| {words} |" in out and f"| {'equivalent' if margin == '1' else 'not shown'} [+0.003" in out
    for margin in ("0", "-1", "nan", "inf", "101"):
        assert cli.main(["compare", "-d", "7", "--equivalence", margin]) == 2
        assert f"--equivalence is {margin}, " in capsys.readouterr().err
