"""JSON files that lie: each kind of file, by each reader of it, damaged in each way, gives one line that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from nnunet_data import Folders, make_dataset, write_fingerprint
from run_data import PLANS, write_preprocessed

from nnunetv2_hiendmae.classification.labels import SPLITS, Split
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import RECORD_FILE, SPLITS_FILE, read_splits
from nnunetv2_hiendmae.evaluation.patients import PATIENTS_FILE, read_patients
from nnunetv2_hiendmae.evaluation.results import collect_runs
from nnunetv2_hiendmae.planning.dataset import FINGERPRINT, read_fingerprint, read_raw_dataset
from nnunetv2_hiendmae.planning.plans import read_plans
from nnunetv2_hiendmae.training.volumes import find_cases

NAME = "Dataset001_Tiny"
FOLDS = [{"train": ["a"], "val": ["b"]}]
RECORD = {"appended": {"1": {"kind": "shots", "value": 1, "of_fold": 0, "seed": 0}}, "sha256": {"1": "0"}}
SUMMARY = {"metric_per_case": [{"prediction_file": "a.nii.gz", "metrics": {"1": {"Dice": 0.5}}}]}


def fold(folders: Folders) -> Path:
    return folders.results / NAME / "T__P__3d_fullres" / "fold_0" / "validation"


def good_files(folders: Folders) -> dict[Path, object]:
    """What the readers need, one file of each kind."""
    make_dataset(folders, 1, name="Tiny", cases=1)
    write_fingerprint(folders, NAME)
    write_preprocessed(folders.preprocessed, {"a": (16, 16, 16)})
    there = folders.preprocessed / NAME
    fold(folders).mkdir(parents=True)
    files = {
        there / SPLITS_FILE: FOLDS,
        there / RECORD_FILE: RECORD,
        there / PATIENTS_FILE: {"p": ["a"]},
        fold(folders) / "summary.json": SUMMARY,
        there / SPLITS: {"train": ["a"], "val": [], "test": []},
        folders.raw / NAME / "dataset.json": None,
        there / "dataset.json": {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"},
        there / FINGERPRINT: None,
        there / f"{PLANS}.json": None,
    }
    for path, content in files.items():
        if content is not None:
            path.write_text(json.dumps(content))
    return {path: json.loads(path.read_text()) for path in files}


# kind of file -> where it is, what reads it, and keys of it, each with a value of a wrong type
READERS: dict[str, tuple[Callable[[Folders], Path], Callable[[Folders], object], dict[str, object]]] = {
    "raw dataset.json": (
        lambda f: f.raw / NAME / "dataset.json",
        lambda f: read_raw_dataset(NAME),
        {"channel_names": ["CT"], "labels": None, "file_ending": 5},
    ),
    "preprocessed dataset.json": (
        lambda f: f.preprocessed / NAME / "dataset.json",
        lambda f: find_cases([NAME], PLANS, "3d_fullres"),
        {"channel_names": ["CT"], "file_ending": 5},
    ),
    "plans, to plan": (
        lambda f: f.preprocessed / NAME / f"{PLANS}.json",
        lambda f: read_plans(f.preprocessed / NAME / f"{PLANS}.json"),
        {"configurations": [], "plans_name": 1, "foreground_intensity_properties_per_channel": {"0": {"std": "1"}}},
    ),
    "plans, to pretrain": (
        lambda f: f.preprocessed / NAME / f"{PLANS}.json",
        lambda f: find_cases([NAME], PLANS, "3d_fullres"),
        {"configurations": {"3d_fullres": {"spacing": [0, 1, 1]}}, "transpose_forward": "012"},
    ),
    "fingerprint": (
        lambda f: f.preprocessed / NAME / FINGERPRINT,
        lambda f: read_fingerprint(NAME),
        {"spacings": [[1, 1, float("nan")]], "shapes_after_crop": [[1, 96.5, 3]]},
    ),
    "folds": (
        lambda f: f.preprocessed / NAME / SPLITS_FILE,
        lambda f: read_splits(f.preprocessed / NAME),
        {},
    ),
    "record of few-shot folds": (
        lambda f: f.preprocessed / NAME / RECORD_FILE,
        lambda f: read_splits(f.preprocessed / NAME),
        {"appended": {"1": {"kind": "x"}}, "sha256": []},
    ),
    "patients": (
        lambda f: f.preprocessed / NAME / PATIENTS_FILE,
        lambda f: read_patients(NAME, ["a"]),
        {"p": [1]},
    ),
    "summary": (
        lambda f: fold(f) / "summary.json",
        lambda f: collect_runs(f.results / NAME),
        {"metric_per_case": {}},
    ),
    "split of a classifier": (
        lambda f: f.preprocessed / NAME / SPLITS,
        lambda f: Split.read(f.preprocessed / NAME),
        {"train": "abc", "val": [1]},
    ),
}
NOT_JSON = {"empty": b"", "cut short": b'{"a": [1, ', "BOM": b"\xef\xbb\xbf{}", "deep": b"[" * 9999}
NOT_IT = {"a list": b"[1, 2]", "a text": b'"text"', "null": b"null", "a number": b"1e999"}


@pytest.fixture
def files(nnunet) -> Folders:
    good_files(nnunet)
    return nnunet


def refusal(kind: str, folders: Folders) -> str:
    where, read, _ = READERS[kind]
    with pytest.raises(UserError) as refused:
        read(folders)
    told = str(refused.value)
    assert str(where(folders)) in told, told
    assert "\n" not in told and len(told) < 1200
    return told


@pytest.mark.parametrize("content", [*NOT_JSON, *NOT_IT])
@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_such_file(files, kind, content):
    READERS[kind][0](files).write_bytes({**NOT_JSON, **NOT_IT}[content])
    if kind == "fingerprint" and content in NOT_JSON:
        # nnU-Net writes it in place: one that was cut short is made anew
        assert read_fingerprint(NAME) is None
        return
    refusal(kind, files)


@pytest.mark.parametrize("kind", READERS)
def test_no_file_but_a_pipe_or_a_folder(files, kind):
    path = READERS[kind][0](files)
    path.unlink()
    os.mkfifo(path)
    refusal(kind, files)
    path.unlink()
    path.mkdir()
    refusal(kind, files)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, (*_, wrong) in READERS.items() for key in wrong])
def test_a_wrong_value_is_told_with_its_key(files, kind, key):
    where, _, wrong = READERS[kind]
    content = json.loads(where(files).read_text())
    where(files).write_text(json.dumps({**content, key: wrong[key]}))
    assert key in refusal(kind, files)


def test_what_is_right_is_read(nnunet):
    for path, content in good_files(nnunet).items():
        assert json.loads(path.read_text()) == content
    # of these two files one appended fold is lost, which is told and no damage
    for _, read, _ in READERS.values():
        read(nnunet)
