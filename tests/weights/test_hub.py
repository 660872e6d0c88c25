"""hf:// names: what they stand for, through every command and without a network, and what is told where that fails."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from classification_data import Bench
from command_line import run
from foreign_files import write_checkpoint
from hub_data import COMMIT, HubCache
from huggingface_hub import errors
from nnunet_data import make_dataset, save_tiny_encoder, write_fingerprint
from oblique_data import MARKED, write_oblique
from run_data import PLANS, TINY_OPTIONS, TINY_SPEC, write_preprocessed

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.preprocessing import preprocess
from nnunetv2_hiendmae.trainers import nnUNetTrainer_HiEndMAE
from nnunetv2_hiendmae.weights import load_encoder, read_metadata
from nnunetv2_hiendmae.weights.hub import hub_name, lasting_path, local_file, source_name

REPO = "lab/ct-vit"
NAMED = f"hf://{REPO}@{COMMIT}"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubCache:
    return HubCache(tmp_path / "hf", monkeypatch)


@pytest.fixture
def shared(hub, tmp_path) -> Path:
    """An encoder file in the cache."""
    file = save_tiny_encoder(tmp_path / "made.safetensors", spec=TINY_SPEC, spacing_mm=(3.0, 3.0, 3.0))
    return hub.add(REPO, "encoder.safetensors", file.read_bytes())


# ---- what a name stands for ---------------------------------------------------------------------------------------


def test_a_name_is_a_file_of_the_cache(hub, caplog):
    file = hub.add(REPO, "encoder.safetensors", b"one")
    nested = hub.add(REPO, "more/other.pth", b"two")
    digest = hashlib.sha256(b"one").hexdigest()
    with caplog.at_level(logging.INFO):
        assert local_file(f"hf://{REPO}") == file
    assert f"{NAMED}/encoder.safetensors" in caplog.text and digest in caplog.text
    # pathlib folds slashes
    assert local_file(Path(f"hf://{REPO}/encoder.safetensors")) == file
    assert (
        local_file(f"hf://{REPO}@{COMMIT}/more/other.pth") == local_file(f"hf://{REPO}@main/more/other.pth") == nested
    )
    later = hub.add(REPO, "encoder.safetensors", b"three", commit="f" * 40, ref="refs/pr/1")
    assert local_file(f"hf://{REPO}@refs%2Fpr%2F1") == later
    assert local_file(f"hf://{REPO}//more//other.pth/") == nested
    assert local_file("some/where.pth") == Path("some/where.pth")


def test_without_file_the_only_weights_are_taken(hub):
    hub.add(REPO, "README.md", b"#")
    weights = hub.add(REPO, "vit/model.pth", b"w")
    assert local_file(f"hf://{REPO}/") == weights
    hub.add(REPO, "vit/second.ckpt", b"v")
    with pytest.raises(UserError, match=r"encoder\.safetensors is not .*vit/model\.pth, vit/second\.ckpt"):
        local_file(f"hf://{REPO}")


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://a",
        "hf://a/",
        "hf://a/b@",
        "hf://a@b",
        "hf://datasets/a/b/c.pth",
        "hf://a/b c",
        "hf://a/b/c/../d.pth",
        "https://hub/a/b",
    ],
)
def test_other_names_are_refused_with_the_form(capsys, name):
    code, out, err = run(capsys, "inspect", name)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert "hf://ORG/REPO@REVISION/FILE" in err


def test_what_is_not_in_the_cache_is_told_offline(hub, shared):
    for name, there in ((f"hf://{REPO}/x.pth", "encoder.safetensors"), ("hf://lab/none", "nothing")):
        with pytest.raises(UserError, match=f"{there}.* HF_HUB_OFFLINE") as told:
            local_file(name)
        assert str(hub.folder) in str(told.value)
    with pytest.raises(UserError, match=r"hf://lab/ct-vit@v%2F1/encoder\.safetensors is not"):
        local_file(f"hf://{REPO}@v%2F1")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.GatedRepoError, r"https://\S+/lab/ct-vit, .*hf auth login"),
        (errors.RepositoryNotFoundError, r"no model lab/ct-vit, .*hf auth login"),
        (errors.RevisionNotFoundError, r"revision; see https://\S+/lab/ct-vit/commits/main"),
        (errors.LocalEntryNotFoundError, r"not in the cache .*cannot be reached"),
        (errors.RemoteEntryNotFoundError, r"lab/ct-vit has no x\.pth, .*: a\.pth, b\.pt$"),
        (errors.HFValidationError, r"names no file of a model .*hf://ORG/REPO"),
        (ConnectionResetError, r"could not be downloaded \(ConnectionResetError"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, monkeypatch, capsys, error, told):
    def refuse(*_, **__):
        # without the answer of a server, which most of them ask for
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["b.pt", "README.md", "a.pth"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    code, out, err = run(capsys, "inspect", f"hf://{REPO}/x.pth")
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert re.search(told, err.strip()), err


def test_a_damaged_file_of_the_cache_is_refused(shared):
    shared.resolve().write_bytes(shared.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"damaged.* remove {shared.resolve()} and run"):
        local_file(f"hf://{REPO}")


def test_a_path_of_the_cache_tells_its_name(hub, shared, tmp_path):
    assert hub_name(shared) == source_name(shared) == f"{NAMED}/encoder.safetensors"
    assert lasting_path(shared) == shared != shared.resolve()
    other = tmp_path / "e.safetensors"
    assert hub_name(other) is None and source_name(other) == "e.safetensors"


# ---- every command --------------------------------------------------------------------------------------------------


def test_inspect_finds_the_cache_by_its_variables(hub, shared):
    """In a process of its own, as a user sets them; without torch."""
    code = "import sys; from nnunetv2_hiendmae.cli import main; main(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", f"hf://{REPO}"],
        env={**os.environ, **hub.environment},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    digest = hashlib.sha256(shared.read_bytes()).hexdigest()
    assert f"sha256: {digest}" in done.stdout and done.stdout.splitlines()[-1] == "False"
    assert f"{NAMED}/encoder.safetensors: {shared}, sha256 {digest}" in done.stderr


def test_convert_keeps_name_and_commit(hub, tmp_path, capsys):
    content = write_checkpoint(tmp_path / "c.pth", "hiendmae").read_bytes()
    hub.add(REPO, "c.pth", content)
    output = tmp_path / "out.safetensors"
    output.touch()
    command = ("convert", f"hf://{REPO}/c.pth", "--num-heads", 2, "-o", output)
    code, _, err = run(capsys, *command)
    # before anything is downloaded
    assert code == 2 and "--force" in err and NAMED not in err
    assert run(capsys, *command, "--force")[0] == 0
    metadata = read_metadata(output)
    assert metadata.source == f"{NAMED}/c.pth" and metadata.source_sha256 == hashlib.sha256(content).hexdigest()
    _, out, _ = run(capsys, "inspect", f"hf://{REPO}/c.pth", "--num-heads", 2)
    assert f"next: hiendmae convert {NAMED}/c.pth" in out


def test_python_takes_names_too(shared):
    encoder, metadata = load_encoder(f"hf://{REPO}")
    assert encoder.spec == metadata.spec == TINY_SPEC


def test_plans_name_the_file_of_the_commit(hub, shared, nnunet, capsys, monkeypatch):
    name = make_dataset(nnunet, 1, cases=1)
    write_fingerprint(nnunet, name)
    assert run(capsys, "plan", "-d", 1, "-w", f"hf://{REPO}", "-np", 1)[0] == 0
    plans = json.loads((nnunet.preprocessed / name / "nnUNetPlans_HiEndMAE.json").read_text())
    assert plans["hiendmae"]["encoder_file"] == str(shared)
    assert plans["hiendmae"]["encoder_sha256"] == hashlib.sha256(shared.read_bytes()).hexdigest()
    # what training says when the cache was emptied
    shared.unlink()
    section = type("Section", (), {"encoder_file": str(shared)})
    trainer = nnUNetTrainer_HiEndMAE.__new__(nnUNetTrainer_HiEndMAE)
    trainer.section, trainer._fresh_kernel = section, torch.zeros(1)
    monkeypatch.setattr(trainer, "_plain_network", lambda: type("Network", (), {"encoder": None}))
    monkeypatch.setattr(trainer, "_input_kernel", lambda: torch.zeros(1))
    with pytest.raises(RuntimeError, match=rf"does not exist; .*hiendmae inspect {NAMED}/encoder\.safetensors, or run"):
        trainer._load_encoder()


def test_plan_asks_to_convert_a_checkpoint_by_its_name(hub, nnunet, tmp_path, capsys):
    make_dataset(nnunet, 1, cases=1)
    hub.add(REPO, "c.pth", write_checkpoint(tmp_path / "c.pth", "hiendmae").read_bytes())
    code, _, err = run(capsys, "plan", "-d", 1, "-w", f"hf://{REPO}")
    assert code == 2 and f"run: hiendmae convert {NAMED}/c.pth -o encoder.safetensors" in err


def test_preprocess_like_a_name(shared, nnunet, capsys, monkeypatch):
    name = make_dataset(nnunet, 1, cases=1)
    fingerprint = json.loads(write_fingerprint(nnunet, name, cases=1).read_text())
    # what starts processes, before and after the plans
    monkeypatch.setattr(preprocess, "ensure_fingerprint", lambda *_: (fingerprint, []))
    monkeypatch.setattr(preprocess, "_preprocess", lambda *_: preprocess.PreprocessSummary(1, 0, ()))
    assert run(capsys, "preprocess", "-d", 1, "-p", "Like", "--like", f"hf://{REPO}", "-np", 1)[0] == 0
    plans = json.loads((nnunet.preprocessed / name / "Like.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 3.0, 3.0]


def test_pretrain_starts_from_a_name(shared, nnunet, tmp_path, capsys):
    write_preprocessed(nnunet.preprocessed, {"a": (20, 20, 20)})
    options = [f"{k}={v}" for k, v in TINY_OPTIONS["mae3d"].items()]
    short = ("--epochs", 1, "--steps-per-epoch", 1, "--batch-size", 1, "--workers", 0, "-device", "cpu")
    command = ("pretrain", "-d", 1, "-p", PLANS, "--method", "mae3d", "-w", f"hf://{REPO}", *short, "--set", *options)
    assert run(capsys, *command, "-o", tmp_path / "run")[0] == 0
    metadata = read_metadata(tmp_path / "run" / "encoder.safetensors")
    assert metadata.source == f"{NAMED}/encoder.safetensors"
    assert metadata.source_sha256 == hashlib.sha256(shared.read_bytes()).hexdigest()
    assert str(shared.parent) not in (tmp_path / "run" / "run.json").read_text()


def test_classify_starts_from_a_name(shared, nnunet, tmp_path):
    bench = Bench(tmp_path, nnunet.preprocessed, count=10)
    bench.encoder = f"hf://{REPO}"
    settings = bench.task().settings
    assert settings.encoder_file == str(shared)
    assert settings.encoder_sha256 == hashlib.sha256(shared.read_bytes()).hexdigest()


def test_attention_of_a_name(shared, tmp_path, capsys):
    image, out = write_oblique(tmp_path / "image.nii.gz"), tmp_path / "out"
    told = run(capsys, "attention", "-w", f"hf://{REPO}", "--image", image, "--voxel", *MARKED, "-o", out)
    assert told[0] == 0 and len(list(out.glob("*.png"))) == 1
