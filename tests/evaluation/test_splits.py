"""Few-shot folds: nested, disjoint from validation, recorded, and never at the cost of what was there."""

import json
import random
import re
from types import SimpleNamespace

import command_line
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import _maybe_copy_splits_file
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.draws import FRACTION, SHOTS, Subset, draw
from nnunetv2_hiendmae.evaluation.folds import (
    append_folds,
    digest_of,
    list_folds,
    read_splits,
    remove_folds,
)

NAME = "Dataset007_Toy"
CASES = [f"case_{i:03d}" for i in range(12)]


@pytest.fixture
def toy(nnunet):
    """A raw dataset of 12 cases; no image is ever read."""
    images = nnunet.raw / NAME / "imagesTr"
    images.mkdir(parents=True)
    for case in CASES:
        for channel in ("0000", "0001"):
            (images / f"{case}_{channel}.nii.gz").touch()
    (nnunet.raw / NAME / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    return nnunet


@pytest.fixture
def folder(toy):
    return toy.preprocessed / NAME


def preprocess(folder, cases=CASES):
    data = folder / "P_3d_fullres"
    data.mkdir(parents=True)
    for case in cases:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"{case}{ending}").touch()
    return data


def nnunet_split(folder, fold):
    """What a training of `fold` asks nnU-Net for; makes splits_final.json where there is none."""
    trainer = SimpleNamespace(
        dataset_class=nnUNetDatasetBlosc2,
        fold=fold,
        preprocessed_dataset_folder=str(folder / "P_3d_fullres"),
        preprocessed_dataset_folder_base=str(folder),
        folder_with_segs_from_previous_stage=None,
        print_to_log_file=lambda *_: None,
    )
    return nnUNetTrainer.do_split(trainer)


def shots(k, **kwargs):
    return Subset(SHOTS, k, **kwargs)


def run(capsys, *arguments):
    code, out, err = command_line.run(capsys, "splits", "-d", 7, *arguments)
    assert code == 0 or (not out and len(err.strip().splitlines()) == 1)
    return code, out, err


@st.composite
def folds(draw_):
    names = draw_(st.lists(st.text("abcXYZ_0189-", min_size=1, max_size=6), min_size=2, max_size=25, unique=True))
    cut = draw_(st.integers(1, len(names) - 1))
    return {"train": names[:cut], "val": names[cut:]}


@given(fold=folds(), seed=st.integers(0, 3), of_fold=st.integers(0, 4), data=st.data())
def test_more_holds_less_and_nothing_of_validation(fold, seed, of_fold, data):
    available = len(fold["train"])
    amounts = st.one_of(
        st.builds(Subset, st.just(SHOTS), st.integers(1, available), st.just(of_fold), st.just(seed)),
        st.builds(Subset, st.just(FRACTION), st.floats(0.001, 1), st.just(of_fold), st.just(seed)),
    )
    one, two = sorted(data.draw(st.tuples(amounts, amounts)), key=lambda s: s.num_cases(available))
    less, more = draw(fold, one), draw(fold, two)
    assert set(less["train"]) <= set(more["train"]) <= set(fold["train"])
    assert len(less["train"]) == len(set(less["train"])) == one.num_cases(available) >= 1
    assert less["val"] == more["val"] == fold["val"]
    assert not set(more["train"]) & set(more["val"])


@given(fold=folds(), seed=st.integers(0, 3), shuffle=st.integers(0, 99))
def test_the_order_in_the_file_does_not_matter(fold, seed, shuffle):
    shuffled = random.Random(shuffle).sample(fold["train"], len(fold["train"]))
    assert draw({**fold, "train": shuffled}, shots(1, seed=seed)) == draw(fold, shots(1, seed=seed))


@pytest.mark.parametrize(
    "fraction, available, wanted",
    [(0.01, 9, 1), (0.1, 24, 2), (0.1, 25, 3), (0.145, 100, 15), (0.29, 50, 15), (0.5, 3, 2), (1.0, 7, 7)],
)
def test_fractions_are_rounded_halves_up_and_never_to_nothing(fraction, available, wanted):
    assert Subset(FRACTION, fraction).num_cases(available) == wanted


def test_seed_and_fold_decide_which_cases():
    fold = {"train": CASES, "val": ["v"]}
    drawn = {tuple(draw(fold, shots(3, seed=s, of_fold=f))["train"]) for s in range(3) for f in range(3)}
    assert len(drawn) > 5


@pytest.mark.parametrize("preprocessed", [False, True])
def test_a_missing_file_is_made_as_nnunet_makes_it(toy, folder, preprocessed):
    if preprocessed:
        preprocess(folder)
    found, numbers = append_folds(7, [shots(1)])
    ours = json.loads(found.file.read_text())
    found.file.unlink()
    if not preprocessed:
        preprocess(folder)
    nnunet_split(folder, 0)
    assert numbers == [5] and ours[:5] == json.loads(found.file.read_text())


def test_folds_that_are_there_stay_and_nnunet_trains_the_new_one(folder):
    preprocess(folder)
    nnunet_split(folder, 0)
    file = folder / "splits_final.json"
    before = file.read_text()
    found, numbers = append_folds("7", [shots(1, of_fold=2), shots(3, of_fold=2), Subset(FRACTION, 0.5, 2)])
    assert numbers == [5, 6, 7]
    after = file.read_text()
    # nnU-Net's own text, byte for byte, with folds behind it
    assert after.startswith(before.rstrip("]\n ")) and json.loads(after)[:5] == json.loads(before)
    train, val = nnunet_split(folder, 6)
    assert len(train) == 3 and val == json.loads(before)[2]["val"] and not set(train) & set(val)
    record = json.loads((folder / "splits_hiendmae.json").read_text())["appended"]["6"]
    assert record["meaning"] == "3-shot of fold 2 (seed 0)" and record["train_cases"] == 3
    assert {k: record[k] for k in ("kind", "value", "of_fold", "seed")} == shots(3, of_fold=2).facts()
    assert read_splits(folder).appended == found.appended


def test_keys_that_others_put_into_the_file_stay(folder):
    folder.mkdir()
    own = [{"val": ["c"], "train": ["b", "a"], "test": ["d"]}]
    (folder / "splits_final.json").write_text(json.dumps(own))
    _, numbers = append_folds(7, [shots(1)])
    assert numbers == [1]
    assert json.dumps(json.loads((folder / "splits_final.json").read_text())[:1]) == json.dumps(own)


def test_twice_is_once(folder):
    append_folds(7, [shots(1), shots(3)])
    files = [folder / "splits_final.json", folder / "splits_hiendmae.json"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    _, numbers = append_folds(7, [shots(3), shots(1), shots(1)])
    assert numbers == [6, 5, 5]
    assert before == [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert append_folds(7, [shots(3, seed=1)])[1] == [7]


def test_planning_after_splits(toy, folder):
    """nnU-Net copies the raw dataset's splits when planning; appended folds survive that."""
    raw = toy.raw / NAME / "splits_final.json"
    raw.write_text(json.dumps([{"train": CASES[:8], "val": CASES[8:]}]))
    found, numbers = append_folds(7, [shots(2)])
    assert numbers == [1] and digest_of(found.folds[0]) == digest_of(json.loads(raw.read_text())[0])
    before = found.file.read_text()
    _maybe_copy_splits_file(str(raw), str(found.file))
    assert found.file.read_text() == before
    raw.write_text(json.dumps([{"train": CASES[4:], "val": CASES[:4]}]))
    with pytest.raises(UserError, match=rf"{re.escape(str(raw))} .*{re.escape(str(found.file))}"):
        append_folds(7, [shots(3)])
    assert found.file.read_text() == before


def test_only_the_last_folds_can_be_removed(toy, folder):
    append_folds(7, [shots(1), shots(2), shots(3)])
    with pytest.raises(UserError, match=r"--remove 6: .*\b7\b"):
        remove_folds(7, [6])
    with pytest.raises(UserError, match=r"--remove 4: .*\b5, 6, 7\b"):
        remove_folds(7, [4])
    result = toy.results / NAME / "T__P__C" / "fold_7"
    result.mkdir(parents=True)
    with pytest.raises(UserError, match=r"fold 7 in .*T__P__C/fold_7, .*'3-shot of fold 0 \(seed 0\)'"):
        remove_folds(7, [7, 6])
    result.rmdir()
    assert list(remove_folds(7, [7, 6]).appended) == [5]
    assert len(json.loads((folder / "splits_final.json").read_text())) == 6
    assert append_folds(7, [shots(3)])[1] == [6]


@pytest.mark.parametrize("removing", [False, True])
def test_an_interrupted_write_leaves_no_fold_without_a_meaning(folder, monkeypatch, removing):
    append_folds(7, [shots(1), shots(2)])
    written = []

    def write_one(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_text(text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nnunetv2_hiendmae.evaluation.folds.write_text", write_one)
        remove_folds(7, [6]) if removing else append_folds(7, [shots(3)])
    splits = read_splits(folder)
    assert splits.original == [0, 1, 2, 3, 4]
    assert append_folds(7, [shots(3)])[1] == [6 if removing else 7]


def test_results_without_a_meaning_do_not_get_one(toy, folder):
    """Before fold 5 exists, nnU-Net trains it on a random split of its own."""
    (toy.results / NAME / "T__P__C" / "fold_5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"fold 5 in .*T__P__C/fold_5, .*'1-shot of fold 0 \(seed 0\)'"):
        append_folds(7, [shots(1)])
    assert not (folder / "splits_final.json").exists()


def test_a_file_that_nnunet_made_anew_gets_its_folds_back(toy, folder, caplog):
    preprocess(folder)
    found, _ = append_folds(7, [shots(1), shots(2)])
    before = found.file.read_text()
    for number in (5, 6):
        (toy.results / NAME / "T__P__C" / f"fold_{number}").mkdir(parents=True)
    found.file.unlink()
    nnunet_split(folder, 0)
    assert list_folds(7).appended == {}
    assert "lacks fold 5, which was 1-shot of fold 0 (seed 0)" in caplog.text
    with pytest.raises(UserError, match=r"fold 5 in .*T__P__C/fold_5, .*'2-shot of fold 0 \(seed 0\)'"):
        append_folds(7, [shots(2)])
    # one after the other: the record of the second must outlive the first
    assert append_folds(7, [shots(1)])[1] + append_folds(7, [shots(2)])[1] == [5, 6]
    assert found.file.read_text() == before


@pytest.mark.parametrize("fold", [0, 5])
def test_a_foreign_edit_is_noticed(folder, fold):
    found, _ = append_folds(7, [shots(1)])
    content = json.loads(found.file.read_text())
    content[fold]["train"][0] = "other"
    found.file.write_text(json.dumps(content))
    for action in (lambda: append_folds(7, [shots(2)]), lambda: list_folds(7), lambda: remove_folds(7, [5])):
        with pytest.raises(UserError, match=rf"splits_final.json .*: fold {fold} .*splits_hiendmae.json"):
            action()


def test_folds_that_others_append_are_kept_apart(folder):
    found, _ = append_folds(7, [shots(1)])
    content = [*json.loads(found.file.read_text()), {"train": CASES[:1], "val": CASES[1:]}]
    found.file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--remove 5: .*\b6\b"):
        remove_folds(7, [5])
    assert append_folds(7, [shots(2)])[1] == [7]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '[{"train": ["a"]}]', '[{"train": [1], "val": []}]', '[{"train": "ab", "val": ["c"]}]', '["x"]'],
)
def test_damaged_files_are_refused_and_left_alone(folder, text):
    folder.mkdir()
    file = folder / "splits_final.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf'{re.escape(str(file))} .*"train" and "val"'):
        append_folds(7, [shots(1)])
    assert file.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        '{"sha256": {}}',
        '{"sha256": {}, "appended": {"5": {"kind": "x"}}}',
        '{"sha256": {}, "appended": {"9": {"kind": "shots", "value": 1, "of_fold": 0, "seed": 0}}}',
    ],
)
def test_a_damaged_record_is_refused(folder, text):
    append_folds(7, [shots(1)])
    (folder / "splits_hiendmae.json").write_text(text)
    with pytest.raises(UserError, match=r"splits_hiendmae.json .*splits_final.json"):
        list_folds(7)


def test_a_partly_preprocessed_dataset_gives_no_folds(folder):
    preprocess(folder, CASES[:7])
    with pytest.raises(UserError, match=r"P_3d_fullres .*\b7 cases, .*\b12, .*\bcase_007\b"):
        append_folds(7, [shots(1)])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--shots", 1, "--of-fold", 9], "--of-fold 9 .*splits_final.json, .*0, 1, 2, 3, 4"),
        (["--shots", 1, "--of-fold", -1], "--of-fold -1 "),
        (["--shots", 11], "fold 0 has 9 .*--shots 11"),
        (["--shots", 0], "--shots 0 "),
        (["--fraction", 0], "--fraction 0 "),
        (["--fraction", 1.5], "--fraction 1.5 "),
        (["--fraction", "nan"], "--fraction nan "),
        (["--shots", 1, "--seed", -3], "--seed -3 "),
        (["--list"], f"splits_final.json .*: hiendmae splits -d {NAME} --shots 1"),
        (["--remove", 0], "--remove 0: .*none"),
    ],
)
def test_bad_input(toy, folder, capsys, arguments, told):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and re.search(told, err)
    assert not (folder / "splits_final.json").exists()


def test_a_fold_of_a_few_shot_fold_is_refused(folder):
    append_folds(7, [shots(3)])
    with pytest.raises(UserError, match=r"--of-fold 5 .*\b0, 1, 2, 3, 4$"):
        append_folds(7, [shots(1, of_fold=5)])


def test_training_on_validation_cases_is_refused(folder):
    folder.mkdir()
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["b"]}]))
    with pytest.raises(UserError, match=r"fold 0 .*\(b\)"):
        append_folds(7, [shots(1)])


def test_too_few_cases_for_nnunets_folds(nnunet):
    images = nnunet.raw / NAME / "imagesTr"
    images.mkdir(parents=True)
    (images / "a_0000.nii.gz").touch()
    (nnunet.raw / NAME / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    with pytest.raises(UserError, match=rf"{NAME} has 1 .*\b5; .*splits_final.json"):
        append_folds(7, [shots(1)])


def test_command(folder, capsys):
    _, out, _ = run(capsys, "--shots", 1, 3, "--seed", 4)
    assert "fold 5: 1-shot of fold 0 (seed 4), 1 to train, 3 to validate" in out
    assert f"nnUNetv2_train {NAME} 3d_fullres 5 -p PLANS -tr TRAINER" in out
    _, out, _ = run(capsys, "--fraction", 0.5, "--json")
    [new] = json.loads(out)["folds"]
    assert new == {
        "fold": 7,
        "meaning": "50% of fold 0 (seed 0)",
        "kind": "fraction",
        "value": 0.5,
        "of_fold": 0,
        "seed": 0,
        "train": 5,
        "val": 3,
    }
    _, out, _ = run(capsys, "--list")
    assert "fold 0: 5-fold cross-validation" in out and len(out.splitlines()) == 9
    _, out, _ = run(capsys, "--remove", 7)
    assert "fold 7" not in out and "fold 6: 3-shot" in out


def test_an_unlabelled_dataset_has_no_folds(nnunet):
    folder = nnunet.raw / NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "labels": {"background": 0}}))
    (nnunet.preprocessed / NAME).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=rf"{NAME} has no labels .*labelsTr"):
        append_folds(NAME, [Subset("shots", 1, 0, 0)])
