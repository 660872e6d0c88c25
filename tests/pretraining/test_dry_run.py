"""`hiendmae pretrain --dry-run`: finds what a run would find, and leaves nothing."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from nnunet_data import save_tiny_encoder
from run_data import PLANS, TINY_OPTIONS, TINY_SPEC
from test_continue import asked_to_stop
from test_loop import cli_arguments, environment

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, LOCK, locked
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.dry_run import dry_run

pytestmark = pytest.mark.usefixtures("preprocessed")
LINES = ["encoder", "data", "step", "run", "speed", "time", "memory", "disk"]


def content(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def told(capsys: pytest.CaptureFixture, arguments: list[str], code: int = 0) -> str:
    """What the command says, on stdout or, if it fails, on stderr."""
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run"]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def by_name(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines())


@pytest.mark.parametrize("method", METHODS)
def test_says_what_the_run_takes_and_writes_nothing(nnunet, tmp_path, capsys, method):
    arguments = cli_arguments(method, tmp_path / "run")
    # into $nnUNet_results
    arguments = arguments[: arguments.index("-o")]
    before = content(nnunet.results)
    lines = by_name(told(capsys, arguments))
    assert list(lines) == LINES and content(nnunet.results) == before == {}
    assert re.match(r"vit_nano_p8, 0\.7 million parameters, crop 16 x 16 x 16", lines["encoder"])
    assert lines["data"].startswith("2 cases, 0.0 million voxels, Dataset001_Tiny")
    assert lines["step"].startswith("4 samples = ") and lines["step"].endswith("fp32 on cpu")
    assert lines["run"] == "3 steps per epoch, 9 in all"
    rate, per_step = map(
        float, re.match(r"([\d.e+-]+) samples/s, ([\d.e+-]+) s per step \(median of 2", lines["speed"]).groups()
    )
    assert rate == pytest.approx(4 / per_step, rel=0.02)
    hours = float(re.match(r"about ([\d.e+-]+) hours for 9 steps", lines["time"])[1])
    assert hours == pytest.approx(9 * per_step / 3600, rel=0.02)
    assert re.fullmatch(r"peak [\d.]+ GB in the process", lines["memory"])
    assert cli.main([*arguments]) == 0
    (checkpoint,) = nnunet.results.rglob(CHECKPOINT)
    size = float(re.search(r"checkpoint has ([\d.]+) GB", lines["disk"])[1]) * 1e9
    assert size == pytest.approx(checkpoint.stat().st_size, rel=0.01)


def test_loader_workers_are_said_apart(tmp_path, capsys):
    lines = by_name(told(capsys, [*cli_arguments("mae3d", tmp_path / "run"), "--workers", "2"]))
    assert re.search(r"GB in the process, up to [\d.]+ GB in each of 2 loader workers", lines["memory"])
    assert not (tmp_path / "run").exists()


def test_loaders_that_cannot_follow_decide_the_time(tmp_path):
    small = {
        "encoder": "vit_nano_p8",
        "crop_size": (16, 16, 16),
        "batch_size": 4,
        "method_options": TINY_OPTIONS["mae3d"],
    }
    where = {"plans_name": PLANS, "device": "cpu", "workers": 1, "output": tmp_path / "run"}
    found = replace(dry_run([1], method="mae3d", **small, **where), seconds=(9.0, 1.0, 3.0), draw_seconds=0.1)
    assert found.seconds_per_step == 2 and "at most" not in by_name(found.text())["speed"]
    found = replace(found, draw_seconds=1.5)
    assert found.seconds_per_step == 6 and "1 --workers make 0.667 samples/s at most" in by_name(found.text())["speed"]
    assert replace(found, settings=replace(found.settings, workers=0)).seconds_per_step == 2
    assert replace(found, processes=2, settings=replace(found.settings, workers=1)).seconds_per_step == 3
    # a run of one step has no step after the first
    assert replace(found, seconds=(9.0,), draw_seconds=0.1).seconds_per_step == 9


def test_a_run_that_is_continued(tmp_path, capsys):
    run, command = tmp_path / "run", cli_arguments("mae3d", tmp_path / "run")
    assert cli.main(cli_arguments("mae3d", tmp_path / "whole")) == 0
    with pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 6)
        assert cli.main(command) == 143
    before = content(run)
    lines = by_name(told(capsys, [*command, "--c"]))
    assert lines["run"].endswith("9 in all, from step 7") and "hours for 2 steps" in lines["time"]
    assert content(run) == before
    assert cli.main([*command, "--c"]) == 0
    assert (run / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()
    before = content(run)
    assert "is finished: nothing is left to do" in told(capsys, [*command, "--c"])
    assert content(run) == before


def test_finds_what_a_run_would_find(tmp_path, capsys, monkeypatch):
    run, command = tmp_path / "run", cli_arguments("mae3d", tmp_path / "run")
    assert "nothing to continue" in told(capsys, [*command, "--c"], 2)
    assert "cannot be split over 1 processes x 3" in told(capsys, [*command, "--accumulate", "3"], 2)
    with monkeypatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.training.run.free_disk", lambda _: 1000)
        assert "GB are free for" in told(capsys, command, 2)
    with monkeypatch.context() as patch:
        patch.setenv("nnUNet_wandb_enabled", "1")
        patch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", None)
        assert "pip install wandb" in told(capsys, command, 2)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        assert f"cannot write {run}" in told(capsys, command, 2)
    assert not run.exists()
    assert cli.main(command) == 0
    before = content(run)
    assert "already holds a run" in told(capsys, command, 2)
    assert "lr was 0.001, is 0.002" in told(capsys, [*command, "--lr", "2e-3", "--c"], 2)
    with locked(run / LOCK, "by this test"):
        assert "is in use" in told(capsys, [*command, "--c"], 2)
    assert content(run) == before
    (run / CHECKPOINT).write_bytes(b"garbage")
    assert "is damaged" in told(capsys, [*command, "--c"], 2)


def test_from_an_encoder_file(tmp_path, capsys):
    start = save_tiny_encoder(tmp_path / "start.safetensors", spec=TINY_SPEC)
    command = cli_arguments("mae3d", tmp_path / "run")
    at = command.index("--encoder")
    lines = by_name(told(capsys, [*command[:at], *command[at + 2 :], "-w", str(start)]))
    assert lines["encoder"].startswith("from_hiendmae, 0.0 million") and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_processes_tell_it_once(nnunet, tmp_path):
    said = forked.run_together(
        ["hiendmae", *cli_arguments("mae3d", tmp_path / "run"), "--dry-run"], environment(nnunet)
    )
    lines = [line for line in "".join(said).splitlines() if line.partition(":")[0] in LINES]
    assert [line.partition(":")[0] for line in lines] == LINES
    named = by_name("\n".join(lines))
    assert "4 samples = 1 micro-batch x 2 processes x 2" in named["step"] and "each of 2 proc" in named["memory"]
    assert not (tmp_path / "run").exists()
