"""docs/evidence.md: numbers are those of the committed files, statistics are right, the protocol leaks nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "evidence"))
import arms  # noqa: E402
import datasets  # noqa: E402
import protocol  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

TASK, CT_TASK = protocol.TASKS[:2]
SCRATCH, PERSONS = protocol.SCRATCH, list(TASK.test)


def results(arms: dict[str, dict[int, float]]) -> pd.DataFrame:
    """`cases.csv`: 0.6 and what the arm's seed adds, the same for every case; one class is 0.1 above, one below."""
    rows = [
        {"task": TASK.number, "arm": arm, "seed": seed, "fold": "1-shot", "case": case, "class": name, "dice": dice}
        for arm, gains in arms.items()
        for seed, gain in gains.items()
        for cases in TASK.test.values()
        for case in cases
        for name, dice in (("CSF", 0.5 + gain), ("GM", 0.7 + gain))
    ]
    return pd.DataFrame(rows).assign(nsd=0.5)


def test_every_number_of_the_page_is_one_of_the_files():
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert report.with_results(page, ROOT / "docs" / "evidence", "evidence/") == page


def test_readme_quotes_the_files():
    """Mean Dice of scratch and of Hi-End-MAE, 1-shot, and that seeds differ by more."""
    cases = pd.read_csv(ROOT / "docs" / "evidence" / "cases.csv")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for task, words in zip(protocol.TASKS, ("brain tissues", "abdominal organs", "bone"), strict=True):
        values = report.by_seed(cases, task).mean(axis=1)
        scratch, ours = (values.loc[arm, "1-shot"] for arm in (SCRATCH, "hiendmae"))
        told = [f"{arm.mean():.3f}".lstrip("0") for arm in (scratch, ours)]
        assert f"{words} {told[0]} and {told[1]}" in text
        assert len(scratch) == len(ours) == len(protocol.SEEDS) and scratch.std() > abs(scratch.mean() - ours.mean())


def test_readme_quotes_the_best_random_encoder_beside_ours():
    """Frozen, tokens alone, 1-shot; and the whole network from scratch."""
    cases = pd.read_csv(ROOT / "docs" / "evidence" / "cases.csv")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    whole = []
    for task, words in ((TASK, "brain tissues"), (protocol.TASKS[2], "bone")):
        mean = report.by_seed(cases, task).mean(axis=1).xs("1-shot", level="fold").groupby("arm").mean()
        frozen = [name + protocol.FROZEN for name in (protocol.RANDOM + protocol.TOKENS, *arms.other_randoms(task))]
        assert len(frozen) == 5
        ours = "hiendmae" + protocol.TOKENS + protocol.FROZEN
        told = [f"{dice:.3f}".lstrip("0") for dice in (mean[frozen].max(), mean[ours])]
        assert f"{words} {told[0]} and {told[1]}" in text
        whole.append(f"{mean[SCRATCH + protocol.TOKENS]:.3f}".lstrip("0"))
    assert f"trained from scratch: {whole[0]} and {whole[1]}." in text


def test_differences_are_paired_by_seed_and_tested_over_seeds():
    base = {seed: 0.01 * seed for seed in range(5)}
    gains = np.array([0.02, 0.03, 0.04, 0.05, 0.06])
    cases = results({SCRATCH: base, "mim": {seed: base[seed] + gain for seed, gain in enumerate(gains)}})
    values = report.by_seed(cases, TASK)
    assert list(values.columns) == sorted(PERSONS)
    assert values.loc[SCRATCH, "1-shot", 3].tolist() == pytest.approx([0.63, 0.63])
    found = report.differences(values, "mim", SCRATCH, "1-shot")
    assert found.mean(axis=1).tolist() == pytest.approx(gains.tolist())
    [text] = report.comparison(cases, TASK, "1-shot", ["mim", "glmae"], SCRATCH)
    # by hand: mean .04, standard error .01581 / √5 = .00707, t(4, .975) = 2.7764
    assert "+0.0400 [+0.0204, +0.0596]" in text and "**helps**" in text and "glmae" not in text
    assert f"{stats.ttest_rel(gains + 0.1, [0.1] * 5).pvalue:.3f}" in text


def test_a_run_that_was_stopped_after_tuning_is_reported(tmp_path):
    """It has no fold to draw yet."""
    results({SCRATCH: {100: 0.0}}).assign(fold="tuning", case=TASK.tuning[1]).to_csv(tmp_path / "cases.csv")
    pd.DataFrame([{"task": TASK.number, "fold": "tuning"}]).to_csv(tmp_path / "curves.csv")
    rates = {str(TASK.number): {SCRATCH: {"lr": 0.01, "dice": {"0.01": 0.6}}}}
    runs = {"probes": [], "pretraining": [], "learning_rates": rates}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    report.draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert "| scratch | 0.6000 | 0.01 |" in report.with_results(f"{report.BEGIN}\n{report.END}", tmp_path)


def test_holm_counts_the_methods_of_a_table():
    noise = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])
    arms = {SCRATCH: dict.fromkeys(range(5), 0.0)}
    # alone, p = 0.016
    arms["mim"] = dict(enumerate(0.025 + noise * 0.9))
    arms |= {name: dict(enumerate(noise)) for name in ("hiendmae", "glmae", "mae3d")}
    [alone] = report.comparison(results({k: arms[k] for k in (SCRATCH, "mim")}), TASK, "1-shot", ["mim"], SCRATCH)
    [among] = report.comparison(results(arms), TASK, "1-shot", list(TASK.arms), SCRATCH)
    assert "**helps**" in alone and "**helps**" not in among


@pytest.mark.parametrize(
    ("gains", "other_person", "corrected_p", "said"),
    [
        ([0.02, 0.03, 0.02, 0.03, 0.02], 0.0, 0.01, "**helps**"),
        ([-0.02, -0.03, -0.02, -0.03, -0.02], 0.0, 0.01, "**harms**"),
        # one person loses
        ([0.02, 0.03, 0.02, 0.03, 0.02], -0.03, 0.01, "open"),
        ([0.001, -0.002, 0.001, -0.001, 0.002], 0.0, 0.9, "no difference"),
        ([0.05, -0.05, 0.04, -0.04, 0.01], 0.0, 0.9, "open"),
        ([0.02, 0.03, 0.02, 0.03], 0.0, 0.01, "seeds are missing"),
    ],
)
def test_verdicts_are_those_of_the_protocol(gains, other_person, corrected_p, said):
    per_person = pd.DataFrame({"a": np.array(gains), "b": np.array(gains) + other_person})
    assert report.verdict(per_person, corrected_p) == said


@pytest.mark.parametrize("task", protocol.TASKS, ids=lambda task: str(task.number))
def test_no_test_person_is_in_pretraining_tuning_or_training(task):
    tests = {case for cases in task.test.values() for case in cases}
    pools = [set(pool.cases) for pool in (task.pool, *task.pools.values())]
    assert not tests & {*task.train, *task.tuning}.union(*pools)
    # names by which a test person's images go elsewhere
    assert not {"SRI24", "abdomenB", "jointB", "lung2"}.intersection(*pools)
    assert set(task.arms) <= set(protocol.METHODS) and task.tuning[0] in task.train
    for budget in protocol.BUDGETS.values():
        assert {task.number} <= budget.spacing_mm.keys() & budget.learning_rates.keys() & budget.finetuning.keys()
        assert budget.steps[task.number] % budget.steps_per_epoch == 0
        assert set(protocol.METHODS) == set(budget.samples)


def test_datasets_are_links_with_folds_and_pools(tmp_path):
    source = tmp_path / "data" / "Dataset506_CTOrgansPseudo"
    for part, cases in (("Tr", CT_TASK.train), ("Ts", ("B",))):
        for kind in ("images", "labels"):
            (source / f"{kind}{part}").mkdir(parents=True)
            for case in cases:
                (source / f"{kind}{part}" / f"{case}{'_0000' * (kind == 'images')}.nii.gz").touch()
    (source / "dataset.json").write_text('{"file_ending": ".nii.gz", "labels": {"background": 0, "liver": 1}}')
    pool = tmp_path / "data" / "Dataset512_UnlabelledCT"
    (pool / "imagesTr").mkdir(parents=True)
    (pool / "dataset.json").write_text('{"file_ending": ".nii.gz", "labels": {"background": 0}}')
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    with pytest.raises(SystemExit, match="holds 0 files imagesTr/CTChest4"):
        datasets.make_task(CT_TASK, tmp_path / "data", raw, preprocessed)
    for case in CT_TASK.pool.cases:
        (pool / "imagesTr" / f"{case}_0000.nii.gz").touch()
    # again, over what is there
    datasets.make_task(CT_TASK, tmp_path / "data", raw, preprocessed)
    made = raw / source.name
    assert sorted(p.name for p in (made / "labelsTr").iterdir()) == [
        "A_z0.nii.gz",
        "A_z1.nii.gz",
        "A_z2.nii.gz",
        "B.nii.gz",
    ]
    folds = pd.read_json(preprocessed / source.name / "splits_final.json")
    assert folds["val"].tolist() == [["A_z1"], ["B"], ["B"]]
    assert folds["train"].tolist() == [["A_z2"], ["A_z2"], ["A_z2", "A_z1", "A_z0"]]
    assert len(list((raw / datasets.pool_name(CT_TASK.pool) / "imagesTr").iterdir())) == 5


def test_every_arm_has_its_turn_before_the_next_seed(tmp_path):
    evidence = run.Evidence(tmp_path, tmp_path, 1, protocol.BUDGETS["cpu"])
    assert evidence.trainings(TASK) == [] == evidence.remedy_trainings(TASK)
    rates = {name: {"lr": 0.001 * (1 + i)} for i, name in enumerate((SCRATCH, *TASK.arms, "hiendmae_frozen"))}
    (tmp_path / "503_learning_rates.json").write_text(json.dumps(rates))
    found = evidence.trainings(TASK)
    of_seed = [(t.arm.name, t.fold) for t in found if t.seed == 0]
    # two folds of five arms, one of the frozen arm and of three pools; arms without a rate are not ready
    assert len(found) == 5 * len(of_seed) == 5 * (2 * 5 + 1 + 3) and [t.seed for t in found] == sorted(
        t.seed for t in found
    )
    assert {t.lr for t in found if "pool" in t.arm.name} == {rates["hiendmae"]["lr"]}
    # plans and trainers as nnU-Net names them, one for each arm, rate and seed
    assert len({(t.plans, t.trainer, t.fold) for t in found}) == len(found)
    first = found[of_seed.index((SCRATCH, protocol.ALL))]
    assert (first.plans, first.trainer) == ("Evidence_scratch_lr0.001_seed0", "nnUNetTrainer_ViTUNETR")
    # a control that is trained from scratch with another arm's rate, on the 1-shot fold alone
    (tmp_path / "506_learning_rates.json").write_text(json.dumps({SCRATCH: {"lr": 0.03}, "hiendmae": {"lr": 0.01}}))
    control = [t for t in evidence.trainings(CT_TASK) if t.arm.name == SCRATCH + protocol.SAME_RATE]
    assert {(t.trainer, t.lr, t.fold) for t in control} == {("nnUNetTrainer_ViTUNETR", 0.01, protocol.ONE_SHOT)}
    tried = evidence.remedy_trainings(TASK)
    assert {t.fold for t in tried} == {protocol.TUNING} and len(tried) == 3 * (3 + len(protocol.REMEDIES))
    # a name of its own for each, or one would be taken for another's result
    assert len({(t.plans, t.seed) for t in tried}) == len(tried)


def test_arms_that_read_tokens_alone_have_their_own_network_encoder_and_rate():
    budget, found = protocol.BUDGETS["cpu"], {n: a for n, a in arms.arms(TASK).items() if protocol.TOKENS in n}
    # trained from scratch and from two encoders, and frozen: both and a random one
    others = arms.other_randoms(TASK)
    assert len(found) == 2 * len(TASK.tokens) + 2 + len(others)
    assert all(dict(arm.finetuning)["network"] == "primus" for arm in found.values())
    shared = {arm.encoder: arm.rate_of for arm in found.values() if arm.rate_of}
    assert shared == dict.fromkeys(others, protocol.RANDOM + protocol.TOKENS + protocol.FROZEN)
    made = {each.name: each for each in arms.pretrainings(TASK, budget)}
    assert {made[arm.encoder].preset for arm in found.values()} == {budget.token_encoder}
    assert {made[arm.encoder].method for arm in found.values() if arm.method} == set(TASK.tokens)
    assert {arm.encoder for arm in found.values() if arm.frozen} >= {protocol.RANDOM + protocol.TOKENS}
    randoms = [made[name] for name in (protocol.RANDOM + protocol.TOKENS, *others)]
    assert {each.steps for each in randoms} == {1} and len({each.seed for each in randoms}) == len(randoms)


def test_a_class_that_is_rightly_absent_spoils_no_mean(tmp_path):
    (tmp_path / "validation").mkdir()
    means = {"1": {"Dice": 0.4}, "2": {"Dice": float("nan")}, "3": {"Dice": 0.6}}
    (tmp_path / arms.FINISHED).write_text(json.dumps({"mean": means, "foreground_mean": {"Dice": float("nan")}}))
    assert run.mean_dice(tmp_path) == pytest.approx(0.5)


def test_a_folder_keeps_to_its_budget(tmp_path):
    evidence = run.Evidence(tmp_path, tmp_path, 1, protocol.BUDGETS["cpu"])
    evidence.keep_to("cpu")
    evidence.keep_to("cpu")
    with pytest.raises(SystemExit, match="runs of the budget cpu, got smoke"):
        evidence.keep_to("smoke")


def test_remedies_wait_for_their_pretraining(tmp_path, monkeypatch):
    """A stopped pretraining has an encoder file, too."""
    trained = []
    monkeypatch.setattr(run.Evidence, "train", lambda self, trainings: trained.append({t.arm.name for t in trainings}))
    monkeypatch.setattr(run.Evidence, "pretrain", lambda self, runs: None)
    evidence = run.Evidence(tmp_path, tmp_path, 1, protocol.BUDGETS["cpu"])
    rates = {name: {"lr": 0.01} for name in (SCRATCH, "hiendmae", "mae3d")}
    (tmp_path / "503_learning_rates.json").write_text(json.dumps(rates))
    for name in ("hiendmae", "mae3d", "half_masked"):
        file = evidence.encoder_file(TASK, name)
        file.parent.mkdir()
        file.touch()
        if name != "half_masked":
            (file.parent / run.PRETRAINED).touch()
    evidence.try_remedies(TASK)
    assert "half_masked" not in trained[0] and {SCRATCH, "hiendmae", "mae3d", "frozen"} <= trained[0]
    assert trained[1] > trained[0] and "half_masked" in trained[1]


def test_what_is_finished_is_not_run_again_and_what_was_interrupted_continues(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(run.Evidence, "_logged", lambda self, name, line: lines.append(line))
    evidence = run.Evidence(tmp_path, tmp_path, 1, protocol.BUDGETS["cpu"])
    [plain, *_] = [each for each in arms.pretrainings(TASK, evidence.budget) if each.name == "mae3d"]
    folder = evidence.encoder_file(TASK, "mae3d").parent
    folder.mkdir()
    evidence.pretrain([plain])
    evidence.pretrain([plain])
    assert len(lines) == 1 and "--c" not in lines[0] and lines[0][lines[0].index("--epochs") + 1] == "60"
    (folder / "finished").unlink()
    (folder / "run.json").touch()
    evidence.pretrain([replace(plain, options=("normalize_target=False",))])
    assert lines[1] == [*lines[0], "normalize_target=False", "--c"]
