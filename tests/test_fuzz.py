"""Files that lie, hundreds of them: no traceback, no run over 10 s or 1.5 GB, and no changed result that looks good."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import SERVER
from fuzz_world import damaged_bytes, json_variant, run_commands, with_header
from nnunet_data import make_dataset, make_folders, write_fingerprint
from run_data import PLANS, write_preprocessed

from nnunetv2_hiendmae import convert, pretrain
from nnunetv2_hiendmae.evaluation.draws import Subset
from nnunetv2_hiendmae.evaluation.folds import RECORD_FILE, SPLITS_FILE, append_folds
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, LOG, SETTINGS
from nnunetv2_hiendmae.pretraining.progress import PROGRESS
from nnunetv2_hiendmae.training import run as run_module

LONGEST_S, MOST_GB = 10.0, 1.5
# of a target whose commands train, and of the others
FEW, MANY = 18, 52
NAME, RAW = "Dataset001_Tiny", "nnUNet_raw/Dataset001_Tiny"
PREPROCESSED, RESULTS = "nnUNet_preprocessed/Dataset001_Tiny", "nnUNet_results/Dataset001_Tiny"
SUMMARY = f"{RESULTS}/T__P__3d_fullres/fold_0/validation/summary.json"
PRETRAIN = ["pretrain", "-d", "1", "--method", "mae3d", "--encoder", "vit_nano_p8", "--crop-size", "16", "16", "16"]
PRETRAIN += ["-device", "cpu", "--workers", "0"]
PRETRAIN += ["-p", PLANS, "--set", "decoder_dim=24", "decoder_depth=1", "decoder_heads=2", "--batch-size", "2"]
PRETRAIN += ["--epochs", "2", "--steps-per-epoch", "1", "--checkpoint-every", "1", "--pictures-every", "9"]
RUN_SETTINGS = {"epochs": 2, "steps_per_epoch": 1, "batch_size": 2, "checkpoint_epochs": 1, "picture_epochs": 9}


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and the commands that then read it.

    Args:
        damage: bytes and a generator -> damaged bytes.
        variants: how many are tried.
        result: file that the commands leave; where all of them succeed on a damaged file, it must be as without damage.
        drawn: the picture that what is damaged stands in.
    """

    path: str
    damage: Callable[[bytes, np.random.Generator], bytes]
    commands: tuple[list[str], ...]
    result: str = ""
    variants: int = MANY
    drawn: str = ""


def damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    """As JSON in four cases of five, else as bytes."""
    return damaged_bytes(data, rng) if rng.random() < 0.2 else json.dumps(json_variant(json.loads(data), rng)).encode()


def damaged_log(data: bytes, rng: np.random.Generator) -> bytes:
    """One line as JSON, or the whole as bytes."""
    lines = data.splitlines(keepends=True)
    number = int(rng.integers(len(lines)))
    lines[number] = damaged_json(lines[number], rng) + b"\n"
    return b"".join(lines)


PLAN = ["plan", "-d", "1", "-w", "encoder.safetensors", "-np", "1"]
EXPORT = ["convert", "encoder.safetensors", "-o", "out.safetensors", "--to", "timm"]
IMPORT = [*["convert", "foreign.pth", "-o", "out.safetensors", "--num-heads", "4", "--format", "timm"]]
FOLDS = (["splits", "-d", "1", "--list"], ["compare", "-d", "1"])
CONTINUE = [*PRETRAIN, "-o", "run", "--c"]
TARGETS = {
    "encoder header": Target("encoder.safetensors", with_header, (["inspect", "encoder.safetensors"], EXPORT, PLAN)),
    "encoder bytes": Target("encoder.safetensors", damaged_bytes, (PLAN, EXPORT), "out.safetensors"),
    "foreign checkpoint": Target("foreign.pth", damaged_bytes, (["inspect", "foreign.pth"], IMPORT)),
    "dataset.json to plan": Target(f"{RAW}/dataset.json", damaged_json, (PLAN, ["splits", "-d", "1", "--shots", "2"])),
    "dataset.json of the arrays": Target(
        f"{PREPROCESSED}/dataset.json", damaged_json, ([*PRETRAIN, "-o", "new"],), variants=FEW
    ),
    "plans": Target(f"{PREPROCESSED}/{PLANS}.json", damaged_json, ([*PRETRAIN, "-o", "new"],), variants=FEW),
    "fingerprint": Target(f"{PREPROCESSED}/dataset_fingerprint.json", damaged_json, (PLAN,)),
    "settings of a run": Target(f"run/{SETTINGS}", damaged_json, (["inspect", "run"], CONTINUE), f"run/{ENCODER}", FEW),
    "log of a run": Target(f"run/{LOG}", damaged_log, (CONTINUE,), f"run/{ENCODER}", FEW, PROGRESS),
    "checkpoint of a run": Target(f"run/{CHECKPOINT}", damaged_bytes, (CONTINUE,), f"run/{ENCODER}", FEW),
    "folds": Target(f"{PREPROCESSED}/{SPLITS_FILE}", damaged_json, FOLDS),
    "record of folds": Target(f"{PREPROCESSED}/{RECORD_FILE}", damaged_json, FOLDS),
    "summary": Target(SUMMARY, damaged_json, (["compare", "-d", "1", "-o", "compared"],)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One intact file of each kind, and nnU-Net's folders around them."""
    root = tmp_path_factory.mktemp("world")
    folders = make_folders(root)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in folders.environment.items():
            patch.setenv(variable, value)
        make_dataset(folders, 1, name="Tiny")
        write_fingerprint(folders, NAME)
        write_preprocessed(folders.preprocessed, {f"case_{i:03d}": (18, 18, 18) for i in range(5)})
        append_folds(1, [Subset("shots", 2)])
        common = {"method": "mae3d", "encoder": "vit_nano_p8", "crop_size": (16, 16, 16), "plans_name": PLANS}
        common |= {"method_options": {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}}
        save_state = run_module.save_state

        def interrupt(*arguments, **values):
            save_state(*arguments, **values)
            raise KeyboardInterrupt

        patch.setattr(run_module, "save_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain([1], output=root / "run", device="cpu", workers=0, **common, **RUN_SETTINGS)
        encoder = root / "run" / ENCODER
        shutil.copy(encoder, root / "encoder.safetensors")
        convert(encoder, root / "timm.safetensors", to="timm")
    from safetensors.torch import load_file

    torch.save({"epoch": 3, "model": load_file(root / "timm.safetensors")}, root / "foreign.pth")
    rows = [
        {"prediction_file": f"case_{i:03d}.nii.gz", "metrics": {"1": {"Dice": 0.5 + i / 10}, "2": {"Dice": 0.25}}}
        for i in range(3)
    ]
    (root / SUMMARY).parent.mkdir(parents=True)
    (root / SUMMARY).write_text(json.dumps({"metric_per_case": rows}))
    description = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz"}
    (root / SUMMARY).parents[2].joinpath("dataset.json").write_text(json.dumps(description))
    return root


def run(world: Path, folder: Path, target: Target, content: bytes | None) -> tuple[list[dict[str, Any]], str]:
    """What each command did in a copy of the world, and the digest of their result."""
    shutil.copytree(world, folder, copy_function=os.link)
    path, told = folder / target.path, folder / "told.json"
    if content is not None:
        path.unlink()
        path.write_bytes(content)
    environment = make_environment(folder)
    arguments = (list(target.commands), str(folder), environment, str(told), target.drawn)
    child = SERVER.Process(target=run_commands, args=arguments)
    child.start()
    child.join(LONGEST_S * len(target.commands) * 3)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode == 0 and told.is_file(), f"ended with {child.exitcode}"
    result = folder / target.result
    digest = hashlib.sha256(result.read_bytes()).hexdigest() if target.result and result.is_file() else ""
    return json.loads(told.read_text()), digest


def make_environment(folder: Path) -> dict[str, str]:
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return {name: str(folder / name) for name in names} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged(world, tmp_path, name):
    target = TARGETS[name]
    intact, expected = run(world, tmp_path / "intact", target, None)
    assert [line["code"] for line in intact] == [0] * len(intact), intact
    data = (world / target.path).read_bytes()
    faults = []
    for number in range(target.variants):
        rng = np.random.default_rng([list(TARGETS).index(name), number])
        content = target.damage(data, rng)
        folder = tmp_path / str(number)
        try:
            lines, digest = run(world, folder, target, content)
        except AssertionError as e:
            faults.append(f"variant {number}: {e}")
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for line in lines:
            told = (
                f"variant {number}: {line['command'][0]} → {line['code']}, {line['seconds']:.1f} s, {line['gb']:.2f} GB"
            )
            if line["code"] not in (0, 2) or line["seconds"] > LONGEST_S or line["gb"] > MOST_GB:
                faults.append(f"{told}\n{line['err'][-600:]}")
            elif line["code"] == 2 and len(line["err"].strip().splitlines()[-1:]) != 1:
                faults.append(f"{told}: no line\n{line['err']}")
        if digest != expected and all(line["code"] == 0 for line in lines):
            faults.append(f"variant {number}: accepted, with another result")
    assert not faults, f"{len(faults)} of {target.variants}\n" + "\n".join(faults)


def test_there_are_enough():
    assert sum(target.variants for target in TARGETS.values()) >= 500
