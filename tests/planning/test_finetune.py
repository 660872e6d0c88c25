"""From an encoder file to plans: defaults, overrides, and refusals that come before anything is written."""

import errno
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nnunet_data import TINY, make_dataset, save_tiny_encoder, write_fingerprint
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_hiendmae import trainers
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.options.commands import PlanOptions
from nnunetv2_hiendmae.planning import finetune, labels
from nnunetv2_hiendmae.planning.dataset import read_raw_dataset
from nnunetv2_hiendmae.planning.finetune import plan_finetuning
from nnunetv2_hiendmae.planning.plans import CASE_FILES
from nnunetv2_hiendmae.planning.readers import choose_reader, find_reader
from nnunetv2_hiendmae.plans_section import PlansSection
from nnunetv2_hiendmae.recipes import RECIPES, TRAINERS
from nnunetv2_hiendmae.weights import load_encoder, save_encoder


@pytest.fixture
def toy(nnunet):
    """A labelled CT dataset of five cases with a fingerprint."""
    name = make_dataset(nnunet, 1)
    write_fingerprint(nnunet, name)
    return name


@pytest.fixture
def encoder_file(tmp_path):
    return save_tiny_encoder(tmp_path / "encoder.safetensors", spacing_mm=(2.0, 1.0, 1.0))


def read(planned):
    plans = json.loads(planned.path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    return plans, configuration, PlansSection.from_dict(plans["hiendmae"])


def test_every_method_has_a_trainer_of_its_own():
    assert set(TRAINERS) == {*RECIPES, None}
    assert set(trainers.__all__) == {*TRAINERS.values(), "nnUNetTrainer_Pretrained"}
    for method, trainer in TRAINERS.items():
        assert getattr(trainers, trainer).method == method


def test_intensities_of_stock_plans_are_carried_over(nnunet, toy, tmp_path):
    """An encoder pretrained on stock nnU-Net data saw clipped z-scores; fine-tuning must show it the same."""
    file = save_tiny_encoder(tmp_path / "stock.safetensors", intensity_offset=40.0, intensity_scale=120.0)
    stats = read(plan_finetuning("1", file))[0]["foreground_intensity_properties_per_channel"]["0"]
    assert (stats["mean"], stats["std"]) == (40, 120)
    plans = read(plan_finetuning("1", file, window_hu=(-100, 300)))[0]
    stats = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (stats["mean"], stats["std"], stats["percentile_99_5"]) == (-100, 400, 300)


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        (24, None),
        # nearer to 24 than to 16
        (21, None),
        (13, r"median of 13 x 34 x 30 voxels, the crop 24 x 24 x 24: .* --patch-size 16 24 24 would"),
        (3, r"--patch-size 8 24 24 would"),
    ],
)
def test_thin_images_are_told_of_padding(nnunet, toy, tmp_path, caplog, slices, told):
    write_fingerprint(nnunet, toy, shape=(slices, 34, 30))
    file = save_tiny_encoder(tmp_path / "encoder.safetensors", spacing_mm=(1.5, 1.5, 1.5))
    plan_finetuning("1", file)
    assert ("padding" in caplog.text) == bool(told) and re.search(told or "", caplog.text)
    # what it says to do is taken, and leaves nothing to say
    caplog.clear()
    plan_finetuning("1", file, patch_size=(max(8, min(24, 8 * round(slices / 8))), 24, 24))
    assert "padding" not in caplog.text


def test_channels_must_be_those_of_pretraining(nnunet, tmp_path, caplog):
    swapped = make_dataset(nnunet, 3, cases=3, channels=("MR", "CT"))
    write_fingerprint(nnunet, swapped, channels=2)
    both = {"spec": TINY.with_(in_channels=2), "channel_names": ("CT", "MR")}
    schemes = ("CTNormalization", "ZScoreNormalization")
    file = save_tiny_encoder(tmp_path / "both.safetensors", **both, normalization_schemes=schemes)
    with pytest.raises(UserError, match=r"channels CT, MR, .* MR, CT:"):
        plan_finetuning("3", file)
    assert "spread" not in caplog.text
    one = save_tiny_encoder(tmp_path / "one.safetensors")
    plan_finetuning("3", one)
    assert "MR: normalised otherwise" in caplog.text and "the dataset has 2: its kernel is spread" in caplog.text


def test_a_cut_short_fingerprint_is_made_again(nnunet, toy, encoder_file):
    path = nnunet.preprocessed / toy / "dataset_fingerprint.json"
    path.write_text(path.read_text()[:40])
    plan_finetuning("1", encoder_file, num_processes=1)
    assert len(json.loads(path.read_text())["spacings"]) == 5


class Killed(BaseException):
    """Nothing cleans up after it, as after kill -9."""


@pytest.mark.parametrize("where", ["fingerprint", "dataset.json"])
def test_killed_while_nnunet_writes(nnunet, toy, encoder_file, monkeypatch, where):
    """nnU-Net writes both in place; what stood there stays, and the next run takes away what was left."""
    folder = nnunet.preprocessed / toy
    plan_finetuning("1", encoder_file, num_processes=1)
    if where == "fingerprint":
        write_fingerprint(nnunet, toy, extra={"hiendmae_label_free": True})
    before = {name: (folder / name).read_bytes() for name in ("dataset.json", "dataset_fingerprint.json")}
    halves = []

    def half(*arguments):
        path = next(Path(a) for a in arguments[::-1] if isinstance(a, str))
        path.write_text('{"chan')
        halves.append(path)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        module = "nnunetv2.experiment_planning."
        patch.setattr(f"{module}dataset_fingerprint.fingerprint_extractor.save_json", half)
        patch.setattr(f"{module}experiment_planners.default_experiment_planner.shutil.copy", half)
        with pytest.raises(Killed):
            plan_finetuning("1", encoder_file, num_processes=1)
    assert [p.name for p in halves] == ["dataset_fingerprint.json" if where == "fingerprint" else where]
    assert halves[0].exists() and {name: (folder / name).read_bytes() for name in before} == before
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    halves[0].parent.rename(halves[0].parent.with_name(f".scratch.{platform.node()}.{dead.pid}.tmp"))
    assert read(plan_finetuning("1", encoder_file, num_processes=1))[0]["dataset_name"] == toy
    assert (
        not list(folder.glob(".scratch*")) and len(json.loads((folder / "dataset_fingerprint.json").read_text())) == 4
    )


def test_cut_short_splits_are_told(nnunet, toy, encoder_file):
    """As nnU-Net leaves them when it is killed: it copies them in place."""
    splits = [{"train": ["case_000"], "val": ["case_001"]}]
    (nnunet.raw / toy / "splits_final.json").write_text(json.dumps(splits))
    (nnunet.preprocessed / toy / "splits_final.json").write_text('[{"train": ["ca')
    with pytest.raises(UserError, match=rf"{toy}/splits_final\.json .*remove it") as e:
        plan_finetuning("1", encoder_file)
    assert "\n" not in str(e.value)


def test_defaults_come_from_the_file_and_the_recipe(nnunet, toy, encoder_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    planned = plan_finetuning("1", encoder_file, num_processes=2)
    plans, configuration, section = read(planned)
    assert (planned.plans_name, planned.dataset_id, planned.dataset_name) == ("nnUNetPlans_HiEndMAE", 1, toy)
    assert planned.trainer == "nnUNetTrainer_HiEndMAE"
    assert configuration["spacing"] == [2, 1, 1] and configuration["batch_size"] == 4
    assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == -175
    arch_kwargs = configuration["architecture"]["arch_kwargs"]
    assert arch_kwargs["cls_token"] is False and arch_kwargs["pos_embed"] == "learned"
    assert arch_kwargs["embed_dim"] == 48 and arch_kwargs["decoder_width"] == 32
    assert section.method == "hiendmae" and section.encoder_file == str(encoder_file)
    assert section.encoder_sha256 == sha256(encoder_file) and section.citations == ("@a{b}",)
    assert (section.recipe.epochs, section.recipe.warmup_epochs, section.recipe.lr) == (300, 30, 1e-4)
    assert planned.next_commands == (
        "nnUNetv2_preprocess -d 1 -plans_name nnUNetPlans_HiEndMAE -c 3d_fullres -np 2",
        "nnUNetv2_train 1 3d_fullres 0 -p nnUNetPlans_HiEndMAE -tr nnUNetTrainer_HiEndMAE -device cpu",
        "nnUNetv2_predict -d 1 -c 3d_fullres -p nnUNetPlans_HiEndMAE -tr nnUNetTrainer_HiEndMAE -f 0 "
        f"-i {nnunet.raw / toy / 'imagesTs'} -o OUTPUT_FOLDER -device cpu",
    )
    assert any(str(encoder_file) in m for m in planned.messages)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "-device" not in " ".join(plan_finetuning("1", encoder_file).next_commands)


def test_arguments_win(toy, encoder_file):
    planned = plan_finetuning(
        toy,
        encoder_file,
        plans_name="Mine",
        epochs=50,
        lr=3e-4,
        weight_decay=0.05,
        batch_size=1,
        patch_size=(32, 24, 40),
        spacing_mm=(1, 2, 3),
        window_hu=(-1000, 1000),
        iterations_per_epoch=2,
        val_iterations_per_epoch=1,
        decoder_width=8,
    )
    plans, configuration, section = read(planned)
    assert planned.path.name == "Mine.json"
    assert configuration["patch_size"] == configuration["architecture"]["arch_kwargs"]["img_size"] == [32, 24, 40]
    assert configuration["spacing"] == [1, 2, 3]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["std"] == 2000
    recipe = section.recipe
    # warm-up follows the epochs
    assert (recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.weight_decay) == (50, 5, 3e-4, 0.05)
    assert (recipe.iterations_per_epoch, recipe.val_iterations_per_epoch) == (2, 1)


def test_options_may_be_an_object_with_changes_over_it(toy, encoder_file):
    options = PlanOptions(plans_name="Mine", epochs=50, batch_size=1)
    recipe = read(plan_finetuning(1, str(encoder_file), options, epochs=20))[2].recipe
    assert (recipe.epochs, recipe.warmup_epochs) == (20, 2)
    planned = plan_finetuning(1, encoder_file, options)
    assert planned.path.name == "Mine.json" and read(planned)[1]["batch_size"] == 1


def test_from_scratch_has_the_same_network_and_no_weights(toy, encoder_file):
    pretrained = read(plan_finetuning(toy, encoder_file))
    planned = plan_finetuning(toy, encoder_file, from_scratch=True)
    scratch = read(planned)
    assert planned.trainer == "nnUNetTrainer_ViTUNETR" and planned.plans_name == "nnUNetPlans_ViTUNETR"
    assert scratch[1]["architecture"] == pretrained[1]["architecture"]
    assert (scratch[2].method, scratch[2].encoder_file) == (None, None)
    assert scratch[2].recipe == pretrained[2].recipe


@pytest.mark.parametrize(
    "given, rates",
    [
        ({}, (1e-4, 3e-4)),
        ({"scratch_lr": 5e-4}, (1e-4, 5e-4)),
        ({"lr": 2e-5, "scratch_lr": 5e-4}, (2e-5, 5e-4)),
        # alone, it is that of the plans at hand
        ({"lr": 2e-5}, (2e-5, 3e-4)),
    ],
)
def test_each_arm_has_a_learning_rate_and_plan_tells_both(toy, encoder_file, given, rates):
    for from_scratch in (False, True):
        if from_scratch and given == {"lr": 2e-5}:
            rates = (2e-5, 2e-5)
        planned = plan_finetuning(toy, encoder_file, from_scratch=from_scratch, **given)
        section = read(planned)[2]
        assert (section.recipe.lr, section.recipe.scratch_lr) == rates and section.lr == rates[from_scratch]
        told = " ".join(planned.messages)
        assert f"lr {rates[0]:g} with weights" in told and f"lr {rates[1]:g} from scratch" in told
        assert all(f"lr {value:g} " in planned.messages[0] for value in given.values())


def test_schedules_and_the_seed_are_kept_and_told(toy, encoder_file):
    fair = {"encoder_lr_scale": 0.1, "decoder_warmup": 20, "seed": 0}
    planned = plan_finetuning(toy, encoder_file, epochs=100, **fair)
    recipe = read(planned)[2].recipe
    assert {name: getattr(recipe, name) for name in fair} == fair
    assert all(told in planned.messages[0] for told in ("encoder x 0.1", "20 epochs of decoder warm-up", "seed 0"))
    with pytest.raises(UserError, match=r"--from-scratch and --freeze-encoder and --decoder-warmup"):
        plan_finetuning(toy, encoder_file, from_scratch=True, freeze_encoder=True, decoder_warmup=20)


def test_other_modalities_ignore_the_window_with_a_warning(nnunet, encoder_file, caplog):
    name = make_dataset(nnunet, 2, cases=2, channels=("T1", "T2"))
    write_fingerprint(nnunet, name, channels=2)
    with caplog.at_level(logging.WARNING):
        plans, _, _ = read(plan_finetuning(name, encoder_file))
    assert "window is ignored" in caplog.text
    assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == 1


def test_reader_of_the_file_is_used_where_it_can_read(toy, tmp_path, caplog):
    reorienting = save_tiny_encoder(tmp_path / "a.safetensors", image_reader_writer="NibabelIOWithReorient")
    assert read(plan_finetuning(toy, reorienting))[0]["image_reader_writer"] == "NibabelIOWithReorient"
    tif = save_tiny_encoder(tmp_path / "b.safetensors", image_reader_writer="Tiff3DIO")
    with caplog.at_level(logging.WARNING):
        assert read(plan_finetuning(toy, tif))[0]["image_reader_writer"] == "SimpleITKIO"
    assert "Tiff3DIO cannot read .nii.gz" in caplog.text


def test_a_reader_that_nnunet_does_not_have_is_warned_about(toy, tmp_path, caplog):
    """Other programs have readers of their own; what they call them goes to no terminal as it is."""
    file = save_tiny_encoder(tmp_path / "a.safetensors", image_reader_writer="BloscIO\x1b[31m")
    with caplog.at_level(logging.WARNING):
        assert read(plan_finetuning(toy, file))[0]["image_reader_writer"] == "SimpleITKIO"
    assert r"nnU-Net has no reader BloscIO\x1b[31m: nnU-Net's own reader is used" in caplog.text
    with pytest.raises(UserError, match=r"no image reader 'No\\x1bthing'"):
        find_reader("No\x1bthing")


def test_an_orientation_is_kept_by_whichever_reader_can(nnunet, tmp_path, caplog):
    """Both reorienting readers give the same array; only the second reads .mha."""
    file = save_tiny_encoder(tmp_path / "a.safetensors", image_reader_writer="NibabelIOWithReorient")
    name = make_dataset(nnunet, 2, cases=1, extra_json={"overwrite_image_reader_writer": "SimpleITKIO"})
    write_fingerprint(nnunet, name)
    with caplog.at_level(logging.WARNING):
        assert read(plan_finetuning(name, file))[0]["image_reader_writer"] == "SimpleITKIO"
    assert "overwrite_image_reader_writer in dataset.json be NibabelIOWithReorient" in caplog.text
    given = plan_finetuning(name, file, reader="NibabelIOWithReorient")
    assert read(given)[0]["image_reader_writer"] == "NibabelIOWithReorient"
    mha = replace(read_raw_dataset(name), dataset_json={"file_ending": ".mha"})
    assert choose_reader(mha, "NibabelIOWithReorient").__name__ == "SimpleITKIOWithReorient"
    assert choose_reader(mha, "NibabelIOWithReorient", "auto").__name__ == "SimpleITKIO"
    with pytest.raises(UserError, match=r"reader 'Nothing'.*--reader"):
        plan_finetuning(name, file, reader="Nothing")
    with pytest.raises(UserError, match=r"reader Tiff3DIO cannot read \.nii\.gz"):
        plan_finetuning(name, file, reader="Tiff3DIO")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASL", "IPR"])
def test_reorienting_readers_give_d_h_w_towards_superior_anterior_right(tmp_path, orientation):
    """What the authors' arrays are, their axes reversed; a marked voxel at the patient's right, back and bottom."""
    marked = np.zeros((4, 5, 6), np.float32)
    marked[3, 0, 0] = 1
    image = nibabel.Nifti1Image(marked, np.diag([1.0, 2.0, 3.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(orientation)
    )
    nibabel.save(image.as_reoriented(turn), tmp_path / "x.nii.gz")
    for reader in ("NibabelIOWithReorient", "SimpleITKIOWithReorient"):
        array, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(tmp_path / "x.nii.gz")])
        assert np.array_equal(array[0], marked.transpose(2, 1, 0)), reader
        assert properties["spacing"] == [3, 2, 1]


def test_what_came_from_where_is_told(toy, encoder_file):
    planned = plan_finetuning(toy, encoder_file, spacing_mm=(3, 2, 1), lr=1e-3)
    told = dict(line.split(": ", 1) for line in planned.messages)
    assert "spacing (3.0, 2.0, 1.0) mm" in told["given"] and "lr 0.001" in told["given"]
    assert (
        str(encoder_file) in told["from the encoder file"] and "window (-175.0, 250.0)" in told["from the encoder file"]
    )
    assert "channels CT" in told["from the dataset"] and "reader SimpleITKIO" in told["from the dataset"]
    assert "batch size 4" in told["from the recipe of hiendmae"]


def test_frozen_plans_have_a_name_and_a_rate_of_their_own(toy, tmp_path):
    file = save_tiny_encoder(tmp_path / "g.safetensors", method="glmae")
    end_to_end, frozen = plan_finetuning(toy, file), plan_finetuning(toy, file, freeze_encoder=True)
    assert (end_to_end.plans_name, frozen.plans_name) == ("nnUNetPlans_GLMAE", "nnUNetPlans_GLMAE_frozen")
    assert read(end_to_end)[2].recipe.lr == 3e-4 and read(frozen)[2].recipe.lr == 1e-2
    assert read(frozen)[2].recipe.freeze_encoder and not read(end_to_end)[2].recipe.freeze_encoder
    assert any(m.startswith("given") and "encoder frozen" in m for m in frozen.messages)
    assert read(plan_finetuning(toy, file, freeze_encoder=True, lr=0.5))[2].recipe.lr == 0.5


def test_glmae_files_of_global_views_get_a_crop_that_fits(toy, tmp_path):
    """The authors' position table may be that of 160³."""
    spec = TINY.with_(img_size=(160, 64, 160), patch_size=(16, 16, 16))
    file = save_tiny_encoder(tmp_path / "g.safetensors", method="glmae", spec=spec, spacing_mm=None)
    planned = plan_finetuning(toy, file)
    _, configuration, section = read(planned)
    assert configuration["patch_size"] == [96, 64, 96] and configuration["spacing"] == [1.5, 1.5, 1.5]
    assert planned.trainer == "nnUNetTrainer_GLMAE" and section.recipe.lr == 3e-4
    assert any(m.startswith("from the recipe of glmae") and "crop (96, 64, 96)" in m for m in planned.messages)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"patch_size": (30, 24, 24)}, r"e.g. \(32, 24, 24\)"),
        ({"patch_size": (24, 24)}, r"\(24, 24\) .*D, H, W"),
        ({"patch_size": (8, 8, 8)}, r"patch size \(8, 8, 8\)"),
        ({"epochs": 0}, r"epochs, .* 1\b"),
        ({"epochs": 5, "warmup_epochs": 5}, r"warmup_epochs 5 .*\(4\)"),
        *(({"lr": lr}, rf"lr is {re.escape(str(lr))}\b") for lr in (-1.0, 0.0, 1e39, math.nan, math.inf)),
        *(({"weight_decay": w}, rf"decay is {re.escape(str(w))}\b") for w in (-1.0, 1e39, math.nan, math.inf)),
        ({"layer_decay": 0.0}, r"layer_decay 0\.0 .*\(0, 1\]"),
        ({"layer_decay": 0.9, "freeze_encoder": True}, r"layer_decay 0\.9 .* 1\b"),
        (
            {"layer_decay": 0.9, "encoder_lr_scale": 0.5, "decoder_warmup": 3, "freeze_encoder": True, "lr": 2.0},
            r"lr is 2\.0.*layer_decay 0\.9 .* 1; encoder_lr_scale 0\.5 .* 1; decoder_warmup 3 .* 0\b",
        ),
        *(({"encoder_lr_scale": f}, rf"encoder_lr_scale {f} .*\(0, 1\]") for f in (0.0, 1.5)),
        ({"epochs": 5, "decoder_warmup": 4, "warmup_epochs": 1}, r"warmup_epochs 1 after decoder_warmup 4 .*\(0\)"),
        *(({"decoder_warmup": w}, rf"decoder_warmup {w} .*\(299\); change") for w in (-1, 300)),
        ({"scratch_lr": 2.0}, r"scratch_lr is 2\.0.* 1\b"),
        *(({"seed": seed}, rf"seed {seed} .*0\.\.2\^63-1") for seed in (-1, 2**63)),
        ({"spacing_mm": (0, 1, 1)}, r"spacing_mm is \(0, 1, 1\)"),
        ({"window_hu": (250, -175)}, r"window_hu is \(250, -175\)"),
        ({"plans_name": "a__b"}, "'a__b'.*--name"),
    ],
)
def test_bad_values_are_refused_before_anything_is_done(nnunet, encoder_file, arguments, told, monkeypatch):
    name = make_dataset(nnunet, 1, cases=1)
    monkeypatch.setattr(finetune, "extract_fingerprint", lambda *_: pytest.fail("long work began"))
    with pytest.raises(UserError, match=told) as e:
        plan_finetuning(name, encoder_file, **arguments)
    assert "\n" not in str(e.value)
    assert not list(nnunet.preprocessed.rglob("*"))


def test_datasets_that_do_not_fit_are_refused(nnunet, encoder_file, tmp_path):
    no_labels = make_dataset(nnunet, 1, cases=2, with_labels=False)
    with pytest.raises(UserError, match=r"Dataset001_Toy .*2 of 2 .*labelsTr/case_000\.nii\.gz"):
        plan_finetuning(no_labels, encoder_file)
    background = make_dataset(nnunet, 2, cases=1, labels={"background": 0})
    with pytest.raises(UserError, match=r"Dataset002_Toy/dataset\.json .*background"):
        plan_finetuning(background, encoder_file)
    three_channels = save_tiny_encoder(tmp_path / "x.safetensors", spec=TINY.with_(in_channels=3))
    with pytest.raises(UserError, match=r"\b3 input channels, .* 1:"):
        plan_finetuning(make_dataset(nnunet, 3, cases=1), three_channels)
    with pytest.raises(UserError, match=r"'9'.*Dataset001_Toy"):
        plan_finetuning("9", encoder_file)
    with pytest.raises(UserError, match=str(tmp_path / "nothing")):
        plan_finetuning("3", tmp_path / "nothing")


def test_an_unreadable_dataset_names_the_command_that_tells_more(nnunet, encoder_file, monkeypatch):
    name = make_dataset(nnunet, 1, cases=1)

    def fail(self, overwrite_existing):
        raise EOFError("somewhere in nnU-Net\ncase_000 ends early")

    monkeypatch.setattr("nnunetv2_hiendmae.planning.labels.DatasetFingerprintExtractor.run", fail)
    told = rf"{name} .*case_000 ends early.*nnUNetv2_extract_fingerprint -d 1 --verify_dataset_integrity"
    with pytest.raises(UserError, match=told):
        plan_finetuning(name, encoder_file)


@pytest.mark.parametrize("before", ["none", "label-free", "nnunet"])
def test_fingerprint_is_nnunets_own(nnunet, encoder_file, before, monkeypatch):
    name = make_dataset(nnunet, 1, cases=1)
    ran = []
    monkeypatch.setattr(
        "nnunetv2_hiendmae.planning.labels.DatasetFingerprintExtractor.run",
        lambda self, overwrite_existing: ran.append(overwrite_existing) or write_fingerprint(nnunet, self.dataset_name),
    )
    if before != "none":
        write_fingerprint(nnunet, name, extra={"hiendmae_label_free": True} if before == "label-free" else None)
    plan_finetuning(name, encoder_file)
    assert ran == ([] if before == "nnunet" else [True])


def test_files_that_are_no_sound_encoder_are_refused(toy, tmp_path):
    checkpoint = tmp_path / "my weights.pth"
    torch.save({"state_dict": {"x": torch.zeros(1)}}, checkpoint)
    with pytest.raises(UserError, match=r"run: hiendmae convert '.*my weights\.pth'"):
        plan_finetuning(toy, checkpoint)
    file = save_tiny_encoder(tmp_path / "e.safetensors")
    encoder, metadata = load_encoder(file)
    broken = {**encoder.state_dict(), "norm.weight": torch.full((48,), torch.nan)}
    save_encoder(file, broken, metadata)
    with pytest.raises(UserError, match=r"norm\.weight"):
        plan_finetuning(toy, file)


class KilledReader:
    """Its process is killed while it reads, as for want of memory."""

    def read_seg(self, _):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_that_reads_labels_ends_the_command(nnunet, toy):
    raw = read_raw_dataset(toy)
    many = replace(raw, labels={str(i): next(iter(raw.labels.values())) for i in range(32)})
    with pytest.raises(UserError, match=r"a background process was killed.*-np 2"):
        labels.check_label_files(many, KilledReader, 2)


def test_digits_are_labels_as_for_nnunet(nnunet, encoder_file):
    name = make_dataset(nnunet, 1, labels={"background": 0, "organ": "1", "lesion": "2"})
    plan_finetuning(name, encoder_file, num_processes=1)
    assert (nnunet.preprocessed / name / "dataset_fingerprint.json").exists()


@pytest.mark.parametrize("named_values", [{"background": 0, "organ": 2, "lesion": 5}, {"organ": 1, "lesion": 2}])
def test_labels_with_gaps_are_refused_before_work(nnunet, encoder_file, monkeypatch, named_values):
    name = make_dataset(nnunet, 1, labels=named_values)
    monkeypatch.setattr(finetune, "extract_fingerprint", lambda *_: pytest.fail("long work began"))
    with pytest.raises(UserError, match=rf"{name}/dataset.json has the labels .*0 to .*renumber"):
        plan_finetuning(name, encoder_file)


@pytest.mark.parametrize(
    "named_values", [{"background": 0, "organ": 1}, {"background": 0, "whole": [1, 3], "other": [3, 4, 2]}]
)
def test_label_values_that_dataset_json_lacks(nnunet, encoder_file, named_values):
    name = make_dataset(nnunet, 1, labels=named_values, extra_json={"regions_class_order": [1, 4]})
    path = nnunet.raw / name / "labelsTr" / "case_003.nii.gz"
    seg = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.where(seg.get_fdata() == 2, 7, 1).astype(np.uint8), seg.affine), path)
    for case in (0, 1, 2, 4):
        (nnunet.raw / name / "labelsTr" / f"case_{case:03d}.nii.gz").write_bytes(path.read_bytes())
    named = ", ".join(rf"case_00{i}\.nii\.gz" for i in range(5))
    with pytest.raises(UserError, match=rf"{named}: unknown 7; relabel"):
        plan_finetuning(name, encoder_file, num_processes=1)
    assert not list(nnunet.preprocessed.rglob("*.json"))


def test_label_values_are_checked_where_stock_nnunet_made_the_fingerprint(nnunet, toy, encoder_file, monkeypatch):
    """All bad files in one line; good ones are not read again until one of them changes."""
    folder = nnunet.raw / toy / "labelsTr"
    intact = {i: (folder / f"case_00{i}.nii.gz").read_bytes() for i in (1, 3, 4)}
    for case, value in ((1, 7), (3, 7)):
        seg = nibabel.load(folder / f"case_00{case}.nii.gz")
        changed = np.where(seg.get_fdata() == 2, value, 1).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(changed, seg.affine), seg.get_filename())
    (folder / "case_004.nii.gz").write_bytes(intact[4][:-400])
    told = rf"labels of {toy} .*case_001\.nii\.gz, case_003\.nii\.gz: unknown 7; case_004\.nii\.gz: unreadable \("
    with pytest.raises(UserError, match=told) as e:
        plan_finetuning(toy, encoder_file)
    assert "\n" not in str(e.value) and not list(nnunet.preprocessed.rglob("nnUNetPlans*"))
    for case, content in intact.items():
        (folder / f"case_00{case}.nii.gz").write_bytes(content)
    plan_finetuning(toy, encoder_file)

    read_seg = labels._label_fault
    monkeypatch.setattr(labels, "_label_fault", lambda *_: pytest.fail("read again"))
    plan_finetuning(toy, encoder_file, from_scratch=True)
    files = []
    monkeypatch.setattr(labels, "_label_fault", lambda *a: files.append(a[-1]) or read_seg(*a))
    (folder / "case_003.nii.gz").write_bytes(intact[1])
    plan_finetuning(toy, encoder_file)
    assert len(files) == 5


@pytest.mark.parametrize(("cases", "splits", "fold"), [(5, False, "0"), (4, False, "all"), (4, True, "0")])
def test_what_to_train_where_nnunet_cannot_make_folds(nnunet, encoder_file, caplog, cases, splits, fold):
    name = make_dataset(nnunet, 1, cases=cases)
    write_fingerprint(nnunet, name, cases=cases)
    if splits:
        (nnunet.raw / name / "splits_final.json").write_text(json.dumps([{"train": ["case_000"], "val": ["case_001"]}]))
    commands = plan_finetuning(name, encoder_file).next_commands
    assert f"3d_fullres {fold} -p" in commands[1] and f"-f {fold} " in commands[2]
    assert ("fold 'all'" in caplog.text) == (fold == "all")


def test_the_encoders_reader_makes_the_fingerprint(nnunet, tmp_path):
    """Sheared, as gantry tilt leaves it: nnU-Net's own choice cannot read one of five."""
    name = make_dataset(nnunet, 1)
    for folder, file in (("imagesTr", "case_002_0000.nii.gz"), ("labelsTr", "case_002.nii.gz")):
        stored = nibabel.load(nnunet.raw / name / folder / file)
        affine = stored.affine + np.eye(4, k=1) * [[0.03], [0], [0], [0]]
        nibabel.save(nibabel.Nifti1Image(stored.get_fdata(dtype=np.float32), affine), stored.get_filename())
    reorienting = save_tiny_encoder(tmp_path / "a.safetensors", image_reader_writer="NibabelIOWithReorient")
    plans, _, _ = read(plan_finetuning(name, reorienting, num_processes=1))
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    (nnunet.preprocessed / name / "dataset_fingerprint.json").unlink()
    as_stored = save_tiny_encoder(tmp_path / "b.safetensors", image_reader_writer="SimpleITKIO")
    told = r"case_002.*NibabelIO reads it"
    with pytest.raises(UserError, match=told):
        plan_finetuning(name, as_stored, reader="SimpleITKIO", num_processes=1)


def test_a_full_disk_while_nnunet_writes_its_fingerprint(nnunet, encoder_file, monkeypatch):
    name = make_dataset(nnunet, 1)

    def full(self, overwrite_existing):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nnunetv2_hiendmae.planning.labels.DatasetFingerprintExtractor.run", full)
    with pytest.raises(UserError, match=rf"no space left on the disk for .*{name}"):
        plan_finetuning(name, encoder_file)


def test_an_id_of_more_than_three_digits_is_kept_whole(nnunet, encoder_file):
    name = make_dataset(nnunet, 1001)
    write_fingerprint(nnunet, name)
    planned = plan_finetuning(1001, encoder_file)
    assert planned.dataset_id == 1001
    assert all(re.search(r"(-d|train) 1001 ", command) for command in planned.next_commands)


# ---- arrays that several plans share


def identifier(planned):
    return json.loads(planned.path.read_text())["configurations"]["3d_fullres"]["data_identifier"]


def finish(nnunet, planned):
    """As nnUNetv2_preprocess leaves it, for what looks at names only."""
    folder = planned.path.parent / identifier(planned)
    folder.mkdir()
    for case in read_raw_dataset(planned.dataset_name).cases:
        for end in CASE_FILES:
            (folder / f"{case}{end}").touch()
    return folder


def test_plans_with_the_same_arrays_share_them(nnunet, toy, encoder_file, tmp_path):
    """Pretrained, from scratch, frozen and of another method: one preprocessing for all."""
    first = plan_finetuning(toy, encoder_file)
    assert "nnUNetv2_preprocess" in first.next_commands[0]
    folder = finish(nnunet, first)
    other = save_tiny_encoder(tmp_path / "mae3d.safetensors", method="mae3d", spacing_mm=(2, 1, 1), seed=1)
    for file, settings in (
        (encoder_file, {"from_scratch": True}),
        (encoder_file, {"freeze_encoder": True}),
        (encoder_file, {"plans_name": "Longer", "epochs": 7, "patch_size": (32, 24, 40)}),
        (other, {}),
    ):
        planned = plan_finetuning(toy, file, **settings)
        assert identifier(planned) == folder.name
        assert planned.next_commands[0].startswith("nnUNetv2_train")
        (told,) = [m for m in planned.messages if m.startswith("arrays: ")]
        assert folder.name in told and f"nnUNetv2_preprocess -d 1 -plans_name {planned.plans_name}" in told


@pytest.mark.parametrize("file", ["imagesTr/case_002_0000.nii.gz", "labelsTr/case_002.nii.gz"])
def test_images_and_labels_that_changed_since_ask_for_preprocessing(nnunet, toy, encoder_file, caplog, file):
    folder = finish(nnunet, plan_finetuning(toy, encoder_file))
    stamp = 10**9 + (folder / "case_002.b2nd").stat().st_mtime_ns
    os.utime(nnunet.raw / toy / file, ns=(stamp, stamp))
    planned = plan_finetuning(toy, encoder_file)
    assert f"images or labels of case_002 are newer than their arrays in {folder.name}" in caplog.text
    assert planned.next_commands[0].startswith("nnUNetv2_preprocess")
    assert not [m for m in planned.messages if m.startswith("arrays: ")]


@pytest.mark.parametrize(
    "other",
    [
        {"spacing_mm": (2, 2, 2)},
        {"window_hu": (-1, 1)},
        {"interpolation": "cubic"},
        {"reader": "NibabelIOWithReorient"},
    ],
)
def test_other_arrays_get_a_folder_of_their_own(nnunet, toy, encoder_file, other, caplog):
    first = plan_finetuning(toy, encoder_file)
    folder = finish(nnunet, first)
    second = plan_finetuning(toy, encoder_file, plans_name="Other", **other)
    assert identifier(second) != folder.name and second.next_commands[0].startswith("nnUNetv2_preprocess")
    # the same name with other settings: the old arrays stay, and are told
    with caplog.at_level(logging.WARNING):
        again = plan_finetuning(toy, encoder_file, **other)
    assert identifier(again) == identifier(second)
    assert f"{folder} was preprocessed with other settings" in caplog.text and "delete it" in caplog.text


def test_a_case_without_arrays_asks_for_preprocessing(nnunet, toy, encoder_file):
    first = plan_finetuning(toy, encoder_file)
    (finish(nnunet, first) / "case_001.b2nd").unlink()
    again = plan_finetuning(toy, encoder_file)
    assert again.next_commands[0].startswith("nnUNetv2_preprocess")


def test_plans_of_0_1_keep_their_folder(nnunet, toy, encoder_file):
    """They had one of their own; made anew with the same arrays, it stays theirs."""
    first = plan_finetuning(toy, encoder_file)
    content = json.loads(first.path.read_text())
    content["configurations"]["3d_fullres"]["data_identifier"] = "nnUNetPlans_HiEndMAE_3d_fullres"
    first.path.write_text(json.dumps(content))
    assert identifier(plan_finetuning(toy, encoder_file, epochs=3)) == "nnUNetPlans_HiEndMAE_3d_fullres"
    assert identifier(plan_finetuning(toy, encoder_file, spacing_mm=(3, 3, 3))).startswith("hiendmae_3d_fullres_")
