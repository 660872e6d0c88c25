"""nnU-Net's own console scripts on plans and trainers of ours."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_data import IGNORE, LESION, ORGAN, make_dataset, make_folders, write_fingerprint
from stopped import run_until_killed
from workplace import EPOCHS, LR, SHAPE, WARMUP, make_workplace, prepare

from nnunetv2_hiendmae.trainers.schedule import learning_rate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("stock") / "nnunet")


@pytest.fixture(scope="module")
def spawning(workplace):
    """The same, but each command in a process of its own: one run of those that use our code is enough."""
    return replace(workplace, spawned=True)


@pytest.fixture(scope="module")
def planned(workplace):
    """Four cases with two channels and an ignore label, in two folds; preprocessed."""
    labels = {"background": 0, "organ": ORGAN, "lesion": LESION, "ignore": IGNORE}
    name = make_dataset(
        workplace.folders, 1, cases=4, shape=SHAPE, channels=("CT", "MR"), labels=labels, paint_ignore=True
    )
    splits = [
        {"train": ["case_000", "case_001", "case_002"], "val": ["case_003"]},
        {"train": ["case_001", "case_002", "case_003"], "val": ["case_000"]},
    ]
    (workplace.folders.raw / name / "splits_final.json").write_text(json.dumps(splits))
    return prepare(workplace, name)


@pytest.fixture(scope="module")
def fold_1(workplace, planned):
    """Output of a whole training, with probabilities."""
    return workplace.train(planned, 1, "--npz")


@pytest.fixture(scope="module")
def interrupted(workplace, planned, fold_1):
    """Fold 0, killed in its last epoch; afterwards the encoder file is gone."""
    folder = workplace.results(planned, 0)
    script, dataset, configuration, fold, *rest = planned.next_commands[-2].split()
    command = [script, dataset, configuration, fold, *rest, "-device", "cpu"]
    begins = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer.on_epoch_start"
    run_until_killed(begins, EPOCHS, command, workplace.environment)
    workplace.encoder_file.unlink()
    return folder


@pytest.fixture(scope="module")
def continued(workplace, planned, interrupted):
    """Output of continuing fold 0 to its end, without the encoder file."""
    return workplace.train(planned, 0, "--c")


def test_training_loads_the_encoder_and_validates(workplace, planned, fold_1):
    folder = workplace.results(planned, 1)
    assert fold_1.count("Encoder weights from") == 1
    assert "1 dropped" in fold_1 and "1 → 2 input channels" in fold_1 and "@a{b}" in fold_1
    assert (folder / "checkpoint_final.pth").is_file()
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert [Path(c["prediction_file"]).name for c in summary["metric_per_case"]] == ["case_000.nii.gz"]
    assert (folder / "validation" / "case_000.npz").is_file()


def test_continuing_needs_no_encoder_file_and_keeps_the_schedule(workplace, planned, interrupted, continued):
    assert "Encoder weights from" not in continued
    assert "Epoch 0" not in continued
    checkpoint = torch.load(interrupted / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == EPOCHS
    assert checkpoint["logging"]["lrs"] == [learning_rate(e, LR, EPOCHS, WARMUP) for e in range(EPOCHS)]


def test_validation_alone_then_the_best_configuration(workplace, planned, fold_1, continued):
    validation = workplace.results(planned, 0) / "validation"
    assert not list(validation.glob("*.npz"))
    workplace.train(planned, 0, "--val", "--npz")
    assert (validation / "case_003.npz").is_file()
    model = ["-p", planned.plans_name, "-tr", planned.trainer, "-f", 0, 1]
    said = workplace.run("nnUNetv2_find_best_configuration", planned.dataset_id, "-c", "3d_fullres", *model)
    assert f"nnUNetv2_predict -d {planned.dataset_name}" in said and planned.trainer in said


def test_prediction_needs_no_encoder_file(spawning, planned, fold_1, continued, tmp_path):
    assert not spawning.encoder_file.exists()
    segmentation = spawning.predict(planned, tmp_path, 0, 1)
    assert segmentation.shape == SHAPE
    # never the ignore label
    assert set(np.unique(segmentation)) <= {0, ORGAN, LESION}


def test_exported_model_predicts_the_same_elsewhere(workplace, spawning, planned, fold_1, interrupted, tmp_path):
    model = ["-d", planned.dataset_id, "-c", "3d_fullres", "-p", planned.plans_name, "-tr", planned.trainer]
    spawning.run("nnUNetv2_export_model_to_zip", *model, "-f", 1, "-o", tmp_path / "model.zip")
    # another machine: it has the archive and new images, and neither data, plans nor encoder
    folders = make_folders(tmp_path / "elsewhere")
    elsewhere = replace(workplace, environment={**workplace.environment, **folders.environment})
    replace(elsewhere, spawned=True).run("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip")
    assert not workplace.encoder_file.exists()
    assert [p.name for p in folders.results.iterdir()] == [planned.dataset_name]

    segmentations, probabilities = [], []
    for place, name in ((workplace, "here"), (elsewhere, "there")):
        more = ("--save_probabilities",)
        segmentations.append(place.predict(planned, tmp_path / name, 1, more=more, processes=int(place is workplace)))
        with np.load(tmp_path / name / "test_000.npz") as stored:
            probabilities.append(stored["probabilities"])
    assert np.array_equal(*segmentations)
    assert np.array_equal(*probabilities)
    assert np.ptp(probabilities[0]) > 0


def test_regions_from_scratch_on_all_cases(tmp_path):
    workplace = make_workplace(tmp_path / "nnunet")
    regions = {"background": 0, "whole": [ORGAN, LESION], "lesion": LESION}
    order = {"regions_class_order": [ORGAN, LESION]}
    name = make_dataset(workplace.folders, 2, cases=2, shape=SHAPE, labels=regions, extra_json=order)
    write_fingerprint(workplace.folders, name)
    planned = prepare(workplace, name, epochs=1, warmup_epochs=0, from_scratch=True)
    # in a process of its own, with all that the others are spared
    said = replace(workplace, spawned=True).train(planned, "all")
    assert "Encoder weights" not in said
    summary = json.loads((workplace.results(planned, "all") / "validation" / "summary.json").read_text())
    assert len(summary["mean"]) == 2 and len(summary["metric_per_case"]) == 2


def test_wrong_trainer_and_wrong_plans_end_with_one_line(workplace, planned):
    train = ["nnUNetv2_train", planned.dataset_id, "3d_fullres", 0, "-device", "cpu"]
    said = workplace.run(*train, "-p", planned.plans_name, "-tr", "nnUNetTrainer_MAE3D", fails=True)
    assert "use -tr nnUNetTrainer_HiEndMAE" in said.strip().splitlines()[-1]
    plans = json.loads(planned.path.read_text())
    del plans["hiendmae"]
    planned.path.with_name("Foreign.json").write_text(json.dumps({**plans, "plans_name": "Foreign"}))
    said = workplace.run(*train, "-p", "Foreign", "-tr", planned.trainer, fails=True)
    assert "have no 'hiendmae' section" in said.strip().splitlines()[-1] and "run: hiendmae plan" in said
