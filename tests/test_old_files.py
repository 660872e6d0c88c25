"""What version 0.1 left on disk is still read: encoder files, interrupted runs, plans, classifiers, splits.

tests/fixtures/v0_1/make.py says how the files and the numbers beside them were made.
"""

import csv
import json
import math
import shlex
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from safetensors.torch import load_file

from nnunetv2_hiendmae import cli, load_encoder, load_report
from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.options import commands as options
from nnunetv2_hiendmae.options import declared

ARCHIVE = Path(__file__).parent / "fixtures" / "v0_1" / "files.tar.xz"
METHODS = ("hiendmae", "mim", "glmae", "mae3d")
PLANNED = {"hiendmae": "HiEndMAE", "mim": "MiM"}


class Old:
    """A copy of 0.1's files to work on, below `root`."""

    def __init__(self, root: Path):
        self.root = root
        shutil.unpack_archive(ARCHIVE, root)
        for path in root.rglob("*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace("ROOT", str(root)), encoding="utf-8")
        self.recorded = self.read_json("recorded.json")
        self.dataset = root / "nnUNet_preprocessed" / "Dataset001_Old"

    def read_json(self, name: str | Path) -> Any:
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def read_log(self, name: str) -> list[dict[str, float]]:
        """Lines of a log.jsonl without the speed."""
        lines = [json.loads(line) for line in (self.root / name).read_text(encoding="utf-8").splitlines()]
        return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]

    def read_probabilities(self, name: str) -> dict[str, list[float]]:
        """The rows of a table of predictions."""
        with (self.root / name).open(encoding="utf-8", newline="") as f:
            header, *rows = csv.reader(f)
        assert header[:4] == ["case", "label", "p_healthy", "p_ill"]
        return {case: [float(p) for p in probabilities[:2]] for case, _, *probabilities in rows}

    def encoder_file(self, method: str) -> Path:
        """Of the interrupted run, after its first epoch."""
        return self.root / "runs" / method / "encoder.safetensors"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Old:
    """0.1's files; nnU-Net's variables point into them, and the two encoders that are no presets are some."""
    old = Old(tmp_path / "old")
    monkeypatch.chdir(old.root)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (old.root / variable).mkdir(exist_ok=True)
        monkeypatch.setenv(variable, str(old.root / variable))
    known, about = declared(options.PretrainOptions)["encoder"]
    choices = (*about.choices, "tiny", "tiny_hybrid")
    monkeypatch.setattr(known, "metadata", {key: replace(about, choices=choices) for key in known.metadata})
    for preset, method in (("tiny", "hiendmae"), ("tiny_hybrid", "mim")):
        spec = load_encoder(old.encoder_file(method))[1].spec
        monkeypatch.setitem(PRESETS, preset, spec)
    return old


def run(capsys, *arguments: object) -> str:
    """What a command printed; it must succeed."""
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.parametrize("method", METHODS)
def test_encoder_files_give_the_recorded_tokens_and_maps(old, method):
    encoder, metadata = load_encoder(old.encoder_file(method))
    assert metadata.method == method and metadata.version.startswith("0.1")
    report = load_report(old.encoder_file(method))
    assert {r.status for r in report.records} == {"loaded"} and len(report.records) == len(encoder.state_dict())
    size = metadata.spec.img_size
    image = torch.linspace(0, 1, math.prod(size)).reshape(1, 1, *size)
    with torch.no_grad():
        tokens, _ = encoder(image, torch.arange(0, 64, 3)[None])
        maps = encoder.feature_maps(image)
    outputs = {"tokens": tokens, **{f"map{i}": m[..., ::2, ::2, ::2] for i, m in enumerate(maps)}}
    recorded = load_file(old.root / "continued" / f"{method}_outputs.safetensors")
    assert outputs.keys() == recorded.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(output, recorded[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_inspect_says_the_same(old, capsys, method):
    recorded = old.recorded["runs"][method]
    file = old.encoder_file(method)
    # what 0.1 did without saying it, and what nobody knows of it
    resampled = {"interpolation": "nnunet", "use_mask_for_norm": []}
    assert json.loads(run(capsys, "inspect", file, "--json")) == recorded["inspect"] | resampled
    about = recorded["inspect_run"]
    expected = {**about, **{part: about[part] | resampled for part in ("checkpoint", "encoder")}}
    assert json.loads(run(capsys, "inspect", file.parent, "--json")) == expected


@pytest.mark.parametrize("method", [m for m in METHODS if m != "mim"])
def test_encoder_files_are_exported_to_the_same_tensors(old, capsys, tmp_path, method):
    run(capsys, "convert", old.encoder_file(method), "-o", tmp_path / "timm.safetensors", "--to", "timm")
    exported = load_file(tmp_path / "timm.safetensors")
    digests = {k: [list(v.shape), sha256(v.numpy().tobytes()).hexdigest()] for k, v in exported.items()}
    assert digests == old.recorded["runs"][method]["timm"]


@pytest.mark.parametrize("method", METHODS)
def test_a_pretraining_continues_as_0_1_continued_it(old, capsys, method):
    """From the checkpoint after step 2 of 4. Weights may be off by 5% of the way they went since: other instructions
    of the processor make that up to 0.6%, a lost count of AdamW's steps 15%, lost moments 48%."""
    before = load_file(old.encoder_file(method))
    run(capsys, *old.recorded["runs"][method]["command"], "--c")
    log, expected = old.read_log(f"runs/{method}/log.jsonl"), old.read_log(f"continued/{method}.jsonl")
    assert len(log) == len(expected) == 4
    for line, recorded in zip(log, expected, strict=True):
        assert line == pytest.approx(recorded, rel=1e-4, abs=1e-6)
    _, metadata = load_encoder(old.encoder_file(method))
    continued = old.root / "continued" / f"{method}.safetensors"
    assert {**vars(metadata), "version": ""} == {**vars(load_encoder(continued)[1]), "version": ""}
    after, recorded = load_file(old.encoder_file(method)), load_file(continued)
    assert after.keys() == recorded.keys()
    error, moved = (
        torch.cat([(recorded[k] - other[k]).flatten() for k in sorted(recorded)]).norm() for other in (after, before)
    )
    assert moved > 0 and error < 0.05 * moved


@pytest.mark.parametrize("method", PLANNED)
def test_planning_from_an_old_encoder_file_gives_the_plans_of_0_1(old, capsys, method):
    plans = old.dataset / f"nnUNetPlans_{PLANNED[method]}.json"
    recorded = json.loads(plans.read_text(encoding="utf-8"))
    plans.unlink()
    run(capsys, "plan", "-d", 1, "-w", old.encoder_file(method), "--decoder-width", 4)
    made = json.loads(plans.read_text(encoding="utf-8"))
    # arrays that several plans may share; where the plans of 0.1 are still there, they keep theirs
    shared = made["configurations"]["3d_fullres"]["data_identifier"]
    assert shared.startswith("hiendmae_3d_fullres_")
    recorded["configurations"]["3d_fullres"]["data_identifier"] = shared
    # options that came later, at what 0.1 did; what is recorded of training from scratch does not count here
    recorded["hiendmae"]["recipe"] |= {"encoder_lr_scale": 1, "decoder_warmup": 0, "scratch_lr": 3e-4, "seed": None}
    assert made == recorded


@pytest.mark.parametrize("method", PLANNED)
def test_trainers_read_old_plans_and_load_the_encoder(old, capsys, monkeypatch, method):
    variable, value = shlex.split(run(capsys, "env"))[1].split("=", 1)
    monkeypatch.setenv(variable, value)
    # data loading is nnU-Net's
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    plans = {**old.read_json(old.dataset / f"nnUNetPlans_{PLANNED[method]}.json"), "continue_training": False}
    data = old.dataset / plans["configurations"]["3d_fullres"]["data_identifier"]
    data.mkdir()
    (data / "case0.b2nd").touch()
    trainer_class = recursive_find_trainer_class_by_name(f"nnUNetTrainer_{PLANNED[method]}")
    dataset_json = old.read_json(old.dataset / "dataset.json")
    trainer = trainer_class(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.on_train_start()
    stored, inside = load_file(old.encoder_file(method)), trainer.network.encoder.state_dict()
    shared = [k for k in inside if k in stored and k != "pos_embed"]
    assert {k for k in stored if k.startswith("blocks.")} < set(shared)
    assert all(torch.equal(inside[k], stored[k]) for k in shared)


def test_an_old_classifier_predicts_the_recorded_probabilities(old, capsys):
    data = ("-d", 1, "--workers", 0, "-device", "cpu")
    run(capsys, "classify", "predict", *data, "-m", "classifier", "-o", "predicted.csv")
    predicted, recorded = (old.read_probabilities(n) for n in ("predicted.csv", "continued/probabilities.csv"))
    assert predicted.keys() == recorded.keys()
    for case, probabilities in predicted.items():
        assert probabilities == pytest.approx(recorded[case], abs=1e-5)


def test_an_old_classifier_continues(old, capsys):
    recorded = old.recorded["classifier"]
    run(capsys, *recorded["command"], "--c")
    metrics = old.read_json("classifier/metrics.json")
    assert len(metrics["validation"].pop("auc_interval_95")) == 2
    for part in ("validation", "last"):
        ours, theirs = metrics.pop(part), recorded["metrics"].pop(part)
        if part == "last":
            assert len(ours["validation"].pop("auc_interval_95")) == 2
            assert ours.pop("validation") == pytest.approx(theirs.pop("validation"), abs=1e-4)
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert metrics == recorded["metrics"]


def test_an_old_record_of_splits_is_read_and_continued(old, capsys):
    listed = json.loads(run(capsys, "splits", "-d", 1, "--list", "--json"))
    assert listed == old.recorded["splits"]
    # known ones are found again, a new one comes behind them
    again = json.loads(run(capsys, "splits", "-d", 1, "--shots", 2, 3, "--seed", 4, "--json"))["folds"]
    assert again[0] == listed["folds"][-1] and again[1]["fold"] == len(listed["folds"])
    assert json.loads(run(capsys, "splits", "-d", 1, "--list", "--json"))["folds"][:-1] == listed["folds"]
