"""The demo from end to end, and what it says when something is in the way."""

import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
from nnunet_data import LESION, ORGAN, make_dataset, make_folders, save_tiny_encoder

from nnunetv2_hiendmae.cli import main
from nnunetv2_hiendmae.demo import RESULTS_FILE, SETTINGS_FILE, claim, datasets, process, run_demo
from nnunetv2_hiendmae.demo.process import Runner, console_script
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS as PRETRAINING_METHODS
from nnunetv2_hiendmae.recipes import MAIN_METHODS, RECIPES

# those that differ in what one sample is: the other methods run in the tests of a user's data and of the Python page
METHODS = ("mim", "glmae")
SMALLEST = {
    "device": "cpu",
    "pretrain_epochs": 2,
    "steps_per_epoch": 2,
    "views_per_step": 4,
    "finetune_epochs": 2,
    "iterations_per_epoch": 1,
    "decoder_width": 4,
    "spacing_mm": (8.0, 8.0, 8.0),
}


# montages that a method draws
VIEWS = {"mim": ["level1", "level2", "level3"], "glmae": ["global", "local"]}


def fork_commands(monkeypatch) -> None:
    """From here on the demo's commands are forked; what each takes of memory is said to be what this process took."""
    started = {}

    def start(command, stdout, **options):
        child = forked.Process(command, stdout=stdout, **options)
        started[child.pid] = child, stdout.name
        return child

    def wait4(pid, _):
        code = forked.wait(*started[pid])
        return pid, code << 8 if code >= 0 else -code, resource.getrusage(resource.RUSAGE_SELF)

    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(process.os, "wait4", wait4)


@pytest.mark.slow
def test_demo_of_several_methods_from_end_to_end(tmp_path, monkeypatch):
    """On embedded images, beside which an encoder file lies."""
    shutil.copytree(datasets.EMBEDDED_DATA / "brain", tmp_path / "data" / "brain")
    monkeypatch.setattr(datasets, "EMBEDDED_DATA", tmp_path / "data")
    mr = {"normalization_schemes": ("ZScoreNormalization",), "channel_names": ("MR",), "window_hu": None}
    file = tmp_path / "data" / "brain" / "encoder.safetensors"
    save_tiny_encoder(file, method="simclr", interpolation="linear", **mr)
    fork_commands(monkeypatch)
    output, said = tmp_path / "demo", []
    results = run_demo(output, methods=METHODS, num_processes=1, say=said.append, **SMALLEST)

    assert results == json.loads((output / RESULTS_FILE).read_text())
    assert sorted(results["pretraining"]) == sorted(METHODS)
    for run in results["pretraining"].values():
        assert run["steps"] == 4
        assert (run["samples_per_step"], run["views_per_sample"]) == (1, 4)
    runs = (*METHODS, "shipped", "scratch")
    assert {n: r["epochs"] for n, r in results["finetuning"].items()} == dict.fromkeys(runs, 2)
    for run in results["dice"].values():
        assert set(run["per_class"]) == {"CSF", "GM", "WM"}
        assert 0 <= run["mean"] <= 1
    assert results["seconds"].keys() == results["peak_gb_of_largest_process"].keys()
    # all four fine-tune on the same arrays
    assert len([line for line in said if ": done in" in line]) == len(results["seconds"]) == 1 + 2 + 1 + 4 * 4
    # a file that does not fit is told before anything is computed
    assert next(iter(results["seconds"])) == "plan_shipped"
    shipped = results["shipped_encoder"]
    assert (shipped["method"], shipped["encoder_file"]) == ("simclr", str(file))
    assert any("-tr nnUNetTrainer_SimCLR" in command for command in results["commands"])

    report = (output / "report.md").read_text(encoding="utf-8")
    pictures = {f"{m}_{view}.png" for m, views in VIEWS.items() for view in (*views, "progress")}
    pictures.add("segmentation.png")
    assert {p.name for p in (output / "pictures").iterdir()} == pictures
    for picture in pictures:
        assert (output / "pictures" / picture).stat().st_size > 5_000
        assert f"](pictures/{picture})" in report
    for words in ("they are not human truth", "| CSF |", "held-out", "One seed", shipped["encoder_sha256"]):
        assert words in report
    for name in runs:
        assert f"\n| {name} |" in report

    with pytest.raises(UserError, match=r"holds a finished demo.*report\.md"):
        run_demo(output, device="cpu")


@pytest.mark.slow
def test_demo_on_data_of_the_user(tmp_path, monkeypatch):
    """Two channels, regions that overlap, no test images, one method, and the command line."""
    mine = make_folders(tmp_path / "mine")
    channels = ("CT", "MR")
    unlabelled = make_dataset(mine, 11, cases=2, channels=channels, with_labels=False, name="NoLabels")
    regions = {"background": 0, "whole": [ORGAN, LESION], "lesion": LESION}
    order = {"regions_class_order": [ORGAN, LESION]}
    labelled = make_dataset(mine, 12, channels=channels, labels=regions, extra_json=order, name="Regions", seed=1)
    for name in (unlabelled, labelled):
        shutil.rmtree(mine.raw / name / "imagesTs")
    before = sorted(mine.raw.rglob("*"))

    output = tmp_path / "demo"
    fork_commands(monkeypatch)
    # the command sets it
    monkeypatch.setenv(EXT_TRAINER_VARIABLE, "")
    budget = ["--pretrain-epochs", 1, "--steps-per-epoch", 2, "--epochs", 1, "--iterations-per-epoch", 2]
    command = ["demo", "--data", mine.raw, "-o", output, "-device", "cpu", "--method", "mae3d", *budget, "-np", 1]
    assert main(list(map(str, command))) == 0

    assert sorted(mine.raw.rglob("*")) == before
    results = json.loads((output / RESULTS_FILE).read_text())
    assert results["data"]["dice_on"] == "validation cases of fold 0"
    assert results["pretraining"]["mae3d"]["steps"] == 2
    assert {n: r["epochs"] for n, r in results["finetuning"].items()} == {"mae3d": 1, "scratch": 1}
    for run in results["dice"].values():
        assert set(run["per_class"]) == {"whole", "lesion"}
        assert all(0 <= dice <= 1 for dice in (*run["per_class"].values(), run["mean"]))
    assert not any(phase.startswith(("predict", "evaluate")) for phase in results["seconds"])
    trained = [p.name for p in (output / "nnUNet_results" / labelled).iterdir()]
    assert sorted(trained) == [
        "nnUNetTrainer_MAE3D__Demo_mae3d__3d_fullres", "nnUNetTrainer_ViTUNETR__Demo_scratch__3d_fullres"
    ]  # fmt: skip
    (log,) = (output / "logs").glob("*_train_mae3d.log")
    assert "Encoder weights from" in log.read_text(encoding="utf-8")

    report = (output / "report.md").read_text(encoding="utf-8")
    for words in ("Dice on the validation cases of fold 0", "| whole |", "| lesion |", unlabelled, labelled):
        assert words in report
    assert "human truth" not in report  # that is said of the embedded labels only
    for picture in ("segmentation.png", "mae3d_crop.png", "mae3d_progress.png"):
        assert (output / "pictures" / picture).stat().st_size > 5_000
        assert f"](pictures/{picture})" in report


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a demo's"):
        run_demo(tmp_path, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_file_as_output_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run_demo(tmp_path / "file", device="cpu")


def test_interrupted_demo_starts_anew(tmp_path):
    (tmp_path / SETTINGS_FILE).write_text("{}")
    mine = tmp_path / "elsewhere" / "image.nii.gz"
    mine.parent.mkdir()
    mine.touch()
    (tmp_path / "nnUNet_raw").mkdir()
    (tmp_path / "nnUNet_raw" / "Dataset001_Mine").symlink_to(mine.parent)
    claim(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [SETTINGS_FILE, "elsewhere"]
    assert mine.exists()  # data is linked, and must outlive the link


def test_impossible_budget(tmp_path):
    with pytest.raises(UserError, match="finetune_epochs is 0"):
        run_demo(tmp_path / "demo", finetune_epochs=0)
    assert not (tmp_path / "demo").exists()


def test_budget_that_views_do_not_fill(tmp_path):
    with pytest.raises(UserError, match="views_per_step is 6, mim needs a multiple of 4"):
        run_demo(tmp_path / "demo", methods=("hiendmae", "mim"), views_per_step=6)
    assert not (tmp_path / "demo").exists()


def test_one_method_or_all(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--all", "--method", "hiendmae", "-o", str(tmp_path / "demo")])
    assert "not allowed with" in capsys.readouterr().err


def test_the_command_line_chooses_the_methods(tmp_path, monkeypatch):
    asked, parameters = [], inspect.signature(run_demo)

    def ask(**given):
        options = parameters.bind(**given)
        options.apply_defaults()
        asked.append(options.arguments["methods"])

    monkeypatch.setenv(EXT_TRAINER_VARIABLE, "")
    monkeypatch.setattr("nnunetv2_hiendmae.demo.run_demo", ask)
    for arguments in ([], ["--method", "glmae"], ["--all"]):
        assert main(["demo", "-o", str(tmp_path / "demo"), *arguments]) == 0
    assert [tuple(methods) for methods in asked] == [("hiendmae",), ("glmae",), MAIN_METHODS]
    assert set(MAIN_METHODS) < set(RECIPES) == set(PRETRAINING_METHODS)


def test_unknown_method(tmp_path):
    with pytest.raises(UserError, match="unknown method 'byol'"):
        run_demo(tmp_path / "demo", methods=("mae3d", "byol"))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_commands_are_processes_of_their_own(tmp_path):
    """As a user's demo starts them: a command of ours, and console scripts of nnU-Net's."""
    runner = Runner(tmp_path / "logs", dict(os.environ), say=lambda _: None)
    runner.run("methods", "hiendmae", "methods")
    runner.run("plan", "nnUNetv2_plan_experiment", "-h")
    runner.run("train", "nnUNetv2_train", "-h")
    logs = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "logs").iterdir())]
    assert "mae3d" in logs[0] and "usage: nnUNetv2_plan_experiment" in logs[1] and "dataset_name_or_id" in logs[2]
    assert all(gb > 0.1 for gb in runner.peak_gb.values())


@pytest.mark.slow
def test_failing_phase_names_its_log(tmp_path, monkeypatch):
    runner = Runner(tmp_path / "logs", dict(os.environ), say=lambda _: None)
    with pytest.raises(UserError, match=r"phase 'look'.*encoder\.safetensors.*01_look\.log"):
        runner.run("look", "hiendmae", "inspect", tmp_path / "encoder.safetensors")
    fork_commands(monkeypatch)
    with pytest.raises(RuntimeError, match=r"(?s)exit code 2: nnUNetv2_train.*01_train\.log.*required"):
        runner.run("train", "nnUNetv2_train")
    assert not runner.commands and not runner.seconds


def test_missing_console_script():
    with pytest.raises(UserError, match="no command nnUNetv2_dance"):
        console_script("nnUNetv2_dance")
    assert console_script("nnUNetv2_train").startswith(os.path.dirname(sys.executable))  # noqa: PTH120
