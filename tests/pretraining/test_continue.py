"""Runs that were stopped by a signal, that start from an encoder file, or that get more epochs."""

import errno
import json
import os
import pkgutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import stopped
import torch
from nnunet_data import save_tiny_encoder
from run_data import PLANS, TINY_OPTIONS, write_preprocessed
from test_loop import environment, read_log, run

from nnunetv2_hiendmae import cli, load_encoder, pretrain
from nnunetv2_hiendmae.errors import Stopped, UserError
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, LOG, SETTINGS, STATE, STEP, telling_disk_errors
from nnunetv2_hiendmae.pretraining import METHODS, loop
from nnunetv2_hiendmae.pretraining.method import Method
from nnunetv2_hiendmae.pretraining.progress import StepLog
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.training.run import load_checkpoint
from nnunetv2_hiendmae.training.runlog import read_log as read_lines
from nnunetv2_hiendmae.training.stopping import noting_stop_signals
from nnunetv2_hiendmae.weights.checkpoint_io import tensors_in

pytestmark = pytest.mark.usefixtures("preprocessed")
COMMAND = ["pretrain", "-d", "1", "-p", PLANS, "-device", "cpu", "--workers", "0", "--batch-size", "2", "--lr", "1e-3"]
COMMAND += ["--method", "mae3d", "--encoder", "vit_nano_p8", "--crop-size", "16", "16", "16", "--steps-per-epoch", "3"]
COMMAND += ["--set", *(f"{k}={v}" for k, v in TINY_OPTIONS["mae3d"].items())]


def each_step(patch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Calls that within every step, with its number (0-based, in this process)."""
    original, calls = Method.after_step, []

    def after_step(self, progress):
        calls.append(progress)
        do(len(calls) - 1)
        original(self, progress)

    patch.setattr(Method, "after_step", after_step)


def asked_to_stop(patch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """A signal reaches this process within that step (0-based)."""
    each_step(patch, lambda now: os.kill(os.getpid(), number) if now == step else None)


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        (signal.SIGTERM, 0, 0),
        (signal.SIGTERM, 4, 2),
        (signal.SIGINT, 5, 0),
        (signal.SIGINT, 7, 2),
    ],
)
def test_a_signal_loses_no_step(tmp_path, number, step, workers):
    run(tmp_path / "whole", workers=workers)
    run_dir = tmp_path / "stopped"
    with pytest.raises(Stopped, match=rf"after step {step + 1} of 9.* --c") as e, pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, number, step)
        run(run_dir, workers=workers)
    assert e.value.exit_code == 128 + number
    assert torch.load(run_dir / CHECKPOINT, weights_only=True)["step"] == step + 1 == len(read_log(run_dir))
    run(run_dir, workers=workers, resume=True)
    assert (run_dir / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()
    assert [line["loss"] for line in read_log(run_dir)] == [line["loss"] for line in read_log(tmp_path / "whole")]


def test_the_command_ends_as_the_signal_ends_a_process(tmp_path, capsys, monkeypatch):
    asked_to_stop(monkeypatch, signal.SIGTERM, 1)
    assert cli.main([*COMMAND, "--epochs", "2", "-o", str(tmp_path / "run")]) == 143
    assert "after step 2 of 6" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_in_the_last_step_stops_nothing(tmp_path):
    run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 8)
        run(tmp_path / "stopped")
    assert (tmp_path / "stopped" / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()


@pytest.mark.parametrize("lost", [LOG, SETTINGS, "the folder"])
def test_what_is_removed_in_mid_run_is_noticed(tmp_path, capsys, lost):
    command = [*COMMAND, "--epochs", "2"]
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    run_dir, aside = tmp_path / "run", tmp_path / "aside"
    there = run_dir if lost == "the folder" else run_dir / lost

    def steal(step: int) -> None:
        if step == 1:
            there.rename(aside)

    with pytest.MonkeyPatch.context() as patch:
        each_step(patch, steal)
        assert cli.main([*command, "-o", str(run_dir)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{there} was removed" in told and "after step 2 of 6" in told and "--c" in told
    if lost == "the folder":
        assert not run_dir.exists() and "nothing is saved" in told
    else:
        assert torch.load(run_dir / CHECKPOINT, weights_only=True)["step"] == 2 and "weights are saved" in told
    if lost != LOG:
        aside.rename(there)
    assert cli.main([*command, "-o", str(run_dir), "--c"]) == 0
    assert (run_dir / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()


def test_a_folder_that_is_removed_after_the_last_step_is_noticed(tmp_path, capsys, monkeypatch):
    original = StepLog.end_epoch

    def end_epoch(self, last):
        original(self, last)
        (tmp_path / "run").rename(tmp_path / "aside")

    monkeypatch.setattr(StepLog, "end_epoch", end_epoch)
    assert cli.main([*COMMAND, "--epochs", "1", "-o", str(tmp_path / "run")]) == 2
    assert "run.json, or the folder with it, was removed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("full", "epoch", "advice"),
    [
        ("export_encoder", 1, "run the same command again"),
        ("run.save_state", 1, "continue with the same command and --c"),
        ("export_encoder", 2, "continue with the same command and --c"),
    ],
)
def test_what_helps_after_a_full_disk(tmp_path, capsys, full, epoch, advice):
    """The advice is followed, and leads to the same encoder."""
    command = [*COMMAND, "--epochs", "3", "--checkpoint-every", "1", "-o"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        disk_is_full(patch, f"nnunetv2_hiendmae.pretraining.loop.{full}", epoch)
        assert cli.main([*command, str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"and {advice}")
    more = ["--c"] if "--c" in advice else []
    with pytest.MonkeyPatch.context() as patch:
        disk_is_full(patch, f"nnunetv2_hiendmae.pretraining.loop.{full}", 1)
        assert cli.main([*command, str(tmp_path / "run"), *more]) == 2
    # which has --c by now where it is needed
    assert capsys.readouterr().err.splitlines()[-1].endswith("and run the same command again")
    assert cli.main([*command, str(tmp_path / "run"), *more]) == 0
    assert (tmp_path / "run" / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()


def disk_is_full(patch: pytest.MonkeyPatch, writer: str, call: int) -> None:
    """That call of a function (1-based) meets a full disk."""
    owner, _, name = writer.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), []

    def write(run_dir, *arguments, **more):
        calls.append(run_dir)
        if len(calls) == call:
            with telling_disk_errors(run_dir / "file"):
                raise OSError(errno.ENOSPC, "full")
        return original(run_dir, *arguments, **more)

    patch.setattr(owner, name, write)


@pytest.mark.slow
def test_several_processes_tell_once_where_they_stopped(nnunet, tmp_path):
    """The signal reaches one of them, and not the first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", forked.free_port()]
    driver = [stopped.__file__, "nnunetv2_hiendmae.pretraining.method:Method.after_step", "2", "hiendmae"]
    command = [*launcher, *driver, *COMMAND, "--epochs", "2", "-o", str(tmp_path / "run")]
    environ = {**environment(nnunet), stopped.STOPPED_BY: "SIGTERM"}
    done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8")
    # torchrun's own exit code, whatever that of the processes is
    assert done.returncode == 1 and "exitcode  : 143" in done.stderr
    assert done.stderr.count("stopped by SIGTERM after step 2 of 6") == 1 and "Traceback" not in done.stdout
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["step"] == 2


def test_a_second_signal_acts_at_once():
    # a shell that starts tests in the background has them ignore Ctrl-C
    inherited, before = signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), noting_stop_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("method", METHODS)
def test_from_an_encoder_file(nnunet, tmp_path, monkeypatch, caplog, method):
    """Of another method, with more channels and another crop than the file's."""
    write_preprocessed(nnunet.preprocessed, {"a": (26, 26, 26)}, "Dataset002_Two", channels=2)
    start = save_tiny_encoder(
        tmp_path / "start.safetensors", method="glmae", source="theirs.pth", source_sha256="0" * 64
    )
    begun = {}
    monkeypatch.setattr(loop, "_run", lambda _, settings, __, built, ___: begun.update(built=built, settings=settings))
    options = {"crop_size": (16, 16, 16), "method_options": TINY_OPTIONS[method], "device": "cpu", "epochs": 1}
    with caplog.at_level("INFO"):
        pretrain([2], plans_name=PLANS, method=method, encoder_file=start, output=tmp_path / "run", **options)
    built, settings = begun["built"], begun["settings"]
    source, _ = load_encoder(start)
    kernel = source.state_dict()["patch_embed.proj.weight"]
    assert torch.equal(built.encoder.state_dict()["patch_embed.proj.weight"], kernel.repeat(1, 2, 1, 1, 1) / 2)
    for name, tensor in source.state_dict().items():
        if name.startswith("blocks."):
            assert torch.equal(built.encoder.state_dict()[name], tensor)
    if method == "glmae":
        teacher = built.teacher_encoder.state_dict()
        assert all(torch.equal(teacher[name], tensor) for name, tensor in built.encoder.state_dict().items())
    assert "adapted" in caplog.text and str(start) in caplog.text
    assert settings.start.citations == ("@a{b}",) and settings.start.source == "theirs.pth"


def test_provenance_of_the_start_is_kept_and_checked(tmp_path):
    first = pretrain_tiny(tmp_path / "first", method="mae3d")
    second = pretrain_tiny(tmp_path / "second", method="hiendmae", encoder_file=first, encoder=None)
    _, metadata = load_encoder(second)
    assert metadata.citations == RECIPES["mae3d"].citations + RECIPES["hiendmae"].citations
    assert metadata.source == ENCODER and metadata.training["start"]["sha256"]
    other = pretrain_tiny(tmp_path / "other", method="mae3d", seed=5)
    with pytest.raises(UserError, match=r"start was .*, is .*sha256"):
        pretrain_tiny(tmp_path / "second", method="hiendmae", encoder_file=other, encoder=None, resume=True)
    with pytest.raises(UserError, match=r"depth 6 in the file, 12"):
        pretrain_tiny(
            tmp_path / "third", method="mae3d", encoder_file=first, encoder="vit_tiny_p16", patch_size=(8, 8, 8)
        )


def test_a_start_is_not_lost_where_a_run_ended_before_its_first_checkpoint(tmp_path):
    first = pretrain_tiny(tmp_path / "first")
    options = {"encoder_file": first, "encoder": None}
    whole = pretrain_tiny(tmp_path / "whole", **options).read_bytes()

    def end(step: int) -> None:
        raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"), pytest.MonkeyPatch.context() as patch:
        each_step(patch, end)
        pretrain_tiny(tmp_path / "ended", **options)
    assert not (tmp_path / "ended" / CHECKPOINT).exists()
    assert pretrain_tiny(tmp_path / "ended", **options, resume=True).read_bytes() == whole


def pretrain_tiny(output: Path, method: str = "mae3d", **changes) -> Path:
    options = {"encoder": "vit_nano_p8", "crop_size": (16, 16, 16), "epochs": 2, "steps_per_epoch": 3, "batch_size": 2}
    options |= {"method_options": TINY_OPTIONS[method], "workers": 0, "device": "cpu", "plans_name": PLANS, "lr": 1e-3}
    return pretrain([1], output=output, method=method, **{**options, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_more_epochs_extend_a_finished_run(tmp_path, monkeypatch, schedule):
    run_dir, again = tmp_path / "run", tmp_path / "again"
    for folder in (run_dir, again):
        pretrain_tiny(folder, warmup_epochs=1)
    finished = read_log(run_dir)
    longer = {"warmup_epochs": 1, "epochs": 6, "schedule": schedule, "resume": True}
    pretrain_tiny(run_dir, **longer)
    log = read_log(run_dir)
    assert log[:6] == finished and len(log) == 18
    rates = [line["lr"] for line in log]
    # a tenth of 12 steps of warm-up
    assert rates[6] == 0 and rates[7] == 1e-3
    if schedule == "constant":
        assert set(rates[7:]) == {1e-3}
    else:
        assert rates[7:] == sorted(rates[7:], reverse=True) and rates[-1] < 1e-4
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 3)
        pretrain_tiny(again, **longer)
    pretrain_tiny(again, **longer)
    assert (again / ENCODER).read_bytes() == (run_dir / ENCODER).read_bytes()
    assert json.loads((run_dir / SETTINGS).read_text())["extensions"] == [[2, schedule]]


def test_an_unfinished_run_is_not_extended(tmp_path):
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 3)
        pretrain_tiny(tmp_path / "run")
    with pytest.raises(UserError, match=r"epoch 2 comes before 4.*--epochs 2 first"):
        pretrain_tiny(tmp_path / "run", epochs=4, resume=True)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    """Heads of records and the archive's directory too; where no bit matters, the state is the same."""
    folder = tmp_path / "run"
    run(folder)
    path = folder / CHECKPOINT
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        heads = [record.header_offset for record in archive.infolist()]
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    intact = dict(tensors_in(load_checkpoint(folder, {STEP, STATE})))
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(data), size=25), *rng.integers(directory, len(data), size=40)]
    places += [int(rng.choice(heads)) + int(at) for at in rng.integers(80, size=25)]
    same = 0
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        try:
            state = dict(tensors_in(load_checkpoint(folder, {STEP, STATE})))
        except UserError as e:
            told = str(e)
            assert str(path) in told and "weights_only" not in told and "\n" not in told
            continue
        assert state.keys() == intact.keys() and all(torch.equal(state[k], intact[k]) for k in intact), at
        same += 1
    # dates, paddings and the like; all others were told
    assert 0 < same < len(places) / 2
    at = largest.header_offset + largest.file_size // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with pytest.raises(UserError, match="is not what was written"):
        run(folder, resume=True)


@pytest.mark.parametrize("lost", [ENCODER, SETTINGS])
def test_what_is_lost_of_a_finished_run(tmp_path, lost):
    run(tmp_path / "run")
    before = (tmp_path / "run" / ENCODER).read_bytes()
    (tmp_path / "run" / lost).unlink()
    if lost == ENCODER:
        run(tmp_path / "run", resume=True)
        assert (tmp_path / "run" / ENCODER).read_bytes() == before
        return
    for resume in (True, False):
        with pytest.raises(UserError, match=rf"lost its {SETTINGS}: put that back"):
            run(tmp_path / "run", resume=resume)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    run(tmp_path / "run")
    for name in (".checkpoint_latest.pth.123.tmp", ".encoder.safetensors.99999999.tmp"):
        (tmp_path / "run" / name).write_bytes(b"x")
    run(tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize(
    "bad", [b"{", b"\xa2\xff", b"[1]", b'{"epoch": 1}', b'{"step": "1", "loss": 0.5}', b'{"step": {}}']
)
def test_a_bad_line_of_the_log_is_dropped(tmp_path, caplog, bad):
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 4)
        run(tmp_path / "run")
    log = tmp_path / "run" / LOG
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([*lines[:2], bad, *lines[3:]]) + b"\n")
    run(tmp_path / "run", resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "run", "step")] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert "damaged line" in caplog.text


def test_where_it_goes_on_is_told(tmp_path, caplog):
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 4)
        run(tmp_path / "run")
    with caplog.at_level("INFO"):
        run(tmp_path / "run", resume=True)
    assert "goes on at step 5 of 9" in caplog.text
