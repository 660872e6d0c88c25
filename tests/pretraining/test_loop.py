"""The pretraining loop: reproducible, resumable to the bit, and never half-way through."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from run_data import PLANS, SHAPES, TINY_OPTIONS, tiny_settings, write_labelled, write_preprocessed
from stopped import run_and_kill, run_until_killed

from nnunetv2_hiendmae import cli, load_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, LOCK, locked
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining import METHODS, progress, steps
from nnunetv2_hiendmae.pretraining.loop import PICTURE_SAMPLES, _picture_samples, prepare, pretrain, run_pretraining
from nnunetv2_hiendmae.pretraining.progress import StepLog, draw_progress, running_mean
from nnunetv2_hiendmae.pretraining.steps import Learner
from nnunetv2_hiendmae.recipes import MAIN_METHODS
from nnunetv2_hiendmae.training.run import save_state
from nnunetv2_hiendmae.training.views import unresized
from nnunetv2_hiendmae.training.volumes import find_cases

# the baseline computes as Hi-End-MAE does, with another decoder: slow tests do without one of the two
APART = [method for method in MAIN_METHODS if method != "mae3d"]

# of methods that see more than one masked crop
PICTURES = {"mim": ["level1", "level2", "level3"], "glmae": ["global", "local"], "simclr": []}
methods = pytest.mark.parametrize("method", list(METHODS))


def run(
    run_dir: Path, settings=None, workers: int = 0, resume: bool = False, save_figure=lambda _, path, **__: path.touch()
) -> list[dict]:
    """The log of a run. Its pictures are empty files, unless it gets `Figure.savefig`: they would take most of it."""
    settings = replace(settings or tiny_settings(), workers=workers, resume=resume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_figure)
        run_pretraining(settings, find_cases(settings.datasets, PLANS, "3d_fullres"), run_dir)
    return read_log(run_dir)


def read_log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log]


@methods
@pytest.mark.parametrize("cases", [1, 3, 6])
def test_pictures_show_other_cases_while_there_are_some_and_nothing_mirrored(nnunet, method, cases):
    write_preprocessed(nnunet.preprocessed, {f"case{i}": (24, 24, 24) for i in range(cases)})
    settings = tiny_settings(method)
    data = find_cases(settings.datasets, PLANS, "3d_fullres")
    made, augmented = settings.build_method(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.training.views.Augmentation.apply", lambda *_: augmented.append(1))
        batch, edges = _picture_samples(data, made, settings)
    assert len(batch["case"]) == len(edges) == PICTURE_SAMPLES and not augmented
    assert len(set(batch["case"])) == min(cases, PICTURE_SAMPLES)


@methods
def test_leaves_everything_behind(preprocessed, tmp_path, method):
    log = run(tmp_path / "run", tiny_settings(method), save_figure=Figure.savefig)
    assert [(line["step"], line["epoch"]) for line in log] == [(s, s // 3) for s in range(9)]
    # warm-up from 0 over 3 steps, then down
    lrs = [line["lr"] for line in log]
    assert lrs[0] == 0 and max(lrs) == lrs[3] == 1e-3 and lrs[3:] == sorted(lrs[3:], reverse=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {CHECKPOINT, ENCODER, "run.json", "progress.png"}
    pictures = {p.name for p in (tmp_path / "run").glob("reconstructions/*")}
    views = PICTURES.get(method, ["crop"])
    assert pictures == {f"epoch_{epoch}_{view}.png" for epoch in ("0002", "0003") for view in views}
    encoder, metadata = load_encoder(tmp_path / "run" / ENCODER)
    assert metadata.method == method and metadata.spec == tiny_settings().spec == encoder.spec
    assert metadata.volume.spacing_mm == (3.0, 3.0, 3.0) and metadata.volume.window_hu == (-175.0, 250.0)
    assert metadata.citations and metadata.training["step"] == 9 and metadata.training["cases"] == 2
    trained = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["method"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, trained[f"encoder.{name}"])
    # others may read it: safetensors alone would leave 0600
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "run" / ENCODER).stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("method", MAIN_METHODS)
def test_same_seed_same_losses_for_any_number_of_workers(preprocessed, tmp_path, method):
    expected = losses(run(tmp_path / "0", tiny_settings(method)))
    for workers in (1, 2):
        assert losses(run(tmp_path / str(workers), tiny_settings(method), workers)) == expected
    assert losses(run(tmp_path / "other", tiny_settings(method, seed=4))) != expected
    files = [(tmp_path / n / ENCODER).read_bytes() for n in ("0", "1", "2")]
    assert files[0] == files[1] == files[2]


def test_training_lowers_the_loss(preprocessed, tmp_path):
    """The tiny cases are smooth waves: within 60 steps the mean loss of ten falls below 0.9 of the first ten's."""
    log = losses(run(tmp_path / "run", tiny_settings(steps_per_epoch=20, lr=5e-3, batch_size=8, picture_epochs=3)))
    assert np.mean(log[-10:]) < 0.9 * np.mean(log[:10])


@pytest.mark.parametrize("method", MAIN_METHODS)
def test_accumulation_gives_the_same_losses(preprocessed, tmp_path, method):
    """Means of two halves instead of one mean: float32 rounding (1e-7 relative), amplified over nine steps."""
    whole = losses(run(tmp_path / "whole", tiny_settings(method)))
    halves = losses(run(tmp_path / "halves", tiny_settings(method, accumulate=2)))
    assert halves == pytest.approx(whole, abs=1e-5)


def cli_arguments(method: str, run_dir: Path, *more: str) -> list[str]:
    settings = tiny_settings(method)
    crop = [str(s) for s in settings.spec.img_size]
    options = [f"{k}={v}" for k, v in TINY_OPTIONS[method].items()]
    return [
        *("pretrain", "-d", "1", "-p", PLANS, "--method", method, "--encoder", "vit_nano_p8", "--crop-size", *crop),
        *("--epochs", "3", "--steps-per-epoch", "3", "--batch-size", "4", "--lr", "1e-3", "--checkpoint-every", "1"),
        *("--workers", "0", "-device", "cpu", "--set", *options, "-o", str(run_dir), *more),
    ]


def environment(nnunet) -> dict[str, str]:
    return {**os.environ, **nnunet.environment, forked.UNDRAWN: "1"}


def two_machines(arguments: list[str], env: dict[str, str]) -> None:
    """By torchrun, one process on each."""
    launcher = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", forked.free_port()]
    module = ["--nnodes", "2", "-m", "nnunetv2_hiendmae.cli", *arguments]
    launches = [[sys.executable, *launcher, "--node-rank", rank, *module] for rank in "01"]
    running = [subprocess.Popen(launch, env=env) for launch in launches]
    assert [process.wait(timeout=300) for process in running] == [0, 0]


def one_machine(arguments: list[str], env: dict[str, str]) -> None:
    forked.run_together(["hiendmae", *arguments], env)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "launch"),
    [*((pytest.param(name, one_machine, id=name)) for name in APART), pytest.param("mae3d", two_machines, id="mae3d")],
)
def test_two_processes_agree_with_one(preprocessed, nnunet, tmp_path, method, launch):
    """Same global batch: gradients are averaged in another order, losses agree to 1e-6 (relative to about 1). The first
    process probes while the others wait."""
    write_labelled(nnunet.preprocessed, SHAPES, [{"train": ["a"], "val": ["b"]}])
    one, two, probe = tmp_path / "one", tmp_path / "two", ("--probe", "2", "--probe-every", "1")
    forked.run(["hiendmae", *cli_arguments(method, one, *probe)], environment(nnunet))
    launch(cli_arguments(method, two, *probe), environment(nnunet))
    starts, steps = zip(*((start, steps) for start, *steps in map(read_log, (one, two))), strict=True)
    assert losses(steps[1]) == pytest.approx(losses(steps[0]), abs=1e-6)
    assert starts[0]["probe_dice"] == starts[1]["probe_dice"] and len(steps[1]) == 9
    assert [line["step"] for line in steps[1] if "probe_dice" in line] == [2, 5, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kill", "start"),
    [
        ("hiendmae", run_and_kill, forked.spawn),
        *((method, run_until_killed, forked.Process) for method in APART if method != "hiendmae"),
    ],
)
def test_kill_and_continue_gives_the_same_encoder_to_the_bit(preprocessed, nnunet, tmp_path, method, kill, start):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    long = ("--epochs", "4", "--steps-per-epoch", "4")
    forked.run(["hiendmae", *cli_arguments(method, undisturbed, *long)], environment(nnunet))
    # between checkpoints: after the first one, with some steps of the next epoch done
    steps = "nnunetv2_hiendmae.pretraining.progress:StepLog.step"
    kill(steps, 6, ["hiendmae", *cli_arguments(method, killed, *long)], environment(nnunet))
    assert torch.load(killed / CHECKPOINT, weights_only=True)["step"] == 4 < len(read_log(killed)) < 16
    forked.run(["hiendmae", *cli_arguments(method, killed, *long, "--c")], environment(nnunet), start=start)
    assert (killed / ENCODER).read_bytes() == (undisturbed / ENCODER).read_bytes()
    without_speed = [[{**line, "samples_per_second": 0} for line in read_log(d)] for d in (killed, undisturbed)]
    assert without_speed[0] == without_speed[1]


def test_the_function_does_what_the_command_does(preprocessed, tmp_path):
    assert cli.main(cli_arguments("mae3d", tmp_path / "command")) == 0
    options = PretrainOptions(plans_name=PLANS, method="mae3d", encoder="vit_nano_p8", crop_size=(16, 16, 16))
    sizes = {"epochs": 3, "steps_per_epoch": 3, "batch_size": 4, "lr": 1e-3, "method_options": TINY_OPTIONS["mae3d"]}
    encoder = pretrain([1], options, **sizes, workers=0, device="cpu", output=tmp_path / "function")
    assert encoder == tmp_path / "function" / ENCODER
    assert encoder.read_bytes() == (tmp_path / "command" / ENCODER).read_bytes()
    with pytest.raises(UserError, match=r"--epochs is 0, needed at least 1"):
        pretrain([1], options, epochs=0)


def test_what_does_not_decide_the_result_may_change_when_continuing(preprocessed, tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.loop.draw_reconstruction", _interrupt)
        run(tmp_path / "stopped", tiny_settings(checkpoint_epochs=1))
    assert torch.load(tmp_path / "stopped" / CHECKPOINT, weights_only=True)["step"] == 3
    log = run(tmp_path / "stopped", tiny_settings(checkpoint_epochs=2, picture_epochs=1), resume=True)
    assert losses(log) == losses(read_log(tmp_path / "whole"))
    assert (tmp_path / "stopped" / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("writer", ["training.run.save_state", "pretraining.loop.export_encoder"])
def test_a_stop_while_the_last_files_are_written(preprocessed, tmp_path, writer):
    run(tmp_path / "whole")
    module, _, name = f"nnunetv2_hiendmae.{writer}".rpartition(".")
    original, calls = getattr(sys.modules[module], name), []

    def interrupted(*arguments, **more):
        calls.append(writer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments, **more)

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.{name}", interrupted)
        run(tmp_path / "stopped")
    run(tmp_path / "stopped", resume=True)
    assert (tmp_path / "stopped" / ENCODER).read_bytes() == (tmp_path / "whole" / ENCODER).read_bytes()


def test_other_cases_than_at_the_start_are_refused(nnunet, preprocessed, tmp_path):
    run(tmp_path / "run")
    write_preprocessed(nnunet.preprocessed, {**SHAPES, "late": (16, 16, 16)})
    with pytest.raises(UserError, match=rf"cannot continue {tmp_path / 'run'}: .*cases.*--name"):
        run(tmp_path / "run", resume=True)


def test_bf16_on_the_cpu_runs_and_continues(preprocessed, tmp_path):
    expected = losses(run(tmp_path / "whole", tiny_settings(precision="bf16")))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.loop.draw_reconstruction", _interrupt)
        run(tmp_path / "stopped", tiny_settings(precision="bf16"))
    assert losses(run(tmp_path / "stopped", tiny_settings(precision="bf16"), resume=True)) == expected


def first_batches(settings, run_dir: Path) -> tuple[Learner, list[dict]]:
    """A run's learner, and the micro-batches of its first step."""
    fabric, method = prepare(settings, run_dir)
    learner = Learner.set_up(fabric, settings, method)
    return learner, list(learner.batches(find_cases(settings.datasets, PLANS, "3d_fullres"), range(1)))


@methods
def test_half_precision_gets_batches_as_a_gpu_does(preprocessed, tmp_path, monkeypatch, method):
    """As workers made them: boxes, which no 16 bits are made of, and images with all their bits to compare with."""
    monkeypatch.setattr(Learner, "views", property(lambda learner: unresized(learner.method.views())))
    learner, batches = first_batches(tiny_settings(method, precision="bf16"), tmp_path)
    seen = []
    learner.method.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert np.isfinite(learner.step(0, iter(batches))["loss"])
    assert len(seen) == learner.method.num_parts and all(batch is batches[0] for batch in seen)


def test_losses_are_looked_at_once_in_a_step(preprocessed, tmp_path, monkeypatch):
    """However many parts and micro-batches there are: a GPU's work is waited for, and other processes. The loss that is
    not finite is found again."""
    looks, mean = [], steps._mean_over_processes
    monkeypatch.setattr(steps, "_mean_over_processes", lambda *args: looks.append(args[1]) or mean(*args))
    learner, batches = first_batches(tiny_settings("mim", accumulate=2), tmp_path)
    batches[1] |= {"level2": batches[1]["level2"] * torch.nan, "case": ["D/broken"] * 2}
    with pytest.raises(UserError, match=r"the loss is nan at step 0, .*: D/broken; look"):
        learner._backward(iter(batches), 0)
    assert len(looks) == 1 and learner.method.num_parts > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["hiendmae", "glmae"])
def test_gpu_run_and_continue(preprocessed, tmp_path, method, precision):
    """On a GPU kernels may differ in the last bit: losses after continuing agree to 1e-2 in half precision."""
    settings = tiny_settings(method, precision=precision, device="cuda")
    data = find_cases(settings.datasets, PLANS, "3d_fullres")
    run_pretraining(settings, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.loop.draw_reconstruction", _interrupt)
        run_pretraining(settings, data, tmp_path / "stopped")
    run_pretraining(replace(settings, resume=True), data, tmp_path / "stopped")
    assert losses(read_log(tmp_path / "stopped")) == pytest.approx(losses(read_log(tmp_path / "whole")), abs=1e-2)


def test_weights_that_are_not_finite_are_never_saved(preprocessed, tmp_path):
    def spoil(self, progress):
        if progress > 0.5:
            with torch.no_grad():
                self.head.bias[0] = torch.inf

    with pytest.raises(UserError, match=r"step 5 .*head\.bias"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.hiendmae.HiEndMAE.after_step", spoil)
        run(tmp_path / "run", tiny_settings(epochs=9, steps_per_epoch=1))
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert saved["step"] == 4 and all(torch.isfinite(t).all() for t in saved["method"].values())


def test_crops_larger_than_every_volume_are_padded_with_a_warning(nnunet, tmp_path, caplog):
    write_preprocessed(nnunet.preprocessed, {"small": (9, 10, 11)})
    assert len(run(tmp_path / "run", tiny_settings(epochs=1))) == 3
    assert "larger along D and H and W than every volume" in caplog.text


def test_curves_are_drawn_for_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    """Drawings of 3 s are 150 s apart, and the first one comes after 20 s."""
    now, drawn = [0.0], []

    def draw(_):
        drawn.append(now[0])
        now[0] += 3

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "draw_progress", draw)
    log = StepLog(tmp_path, 0, tiny_settings())
    for seconds in range(0, 400, 10):
        now[0] = seconds
        log.end_epoch(last=seconds == 390)
    log.close()
    assert drawn == [30, 190, 350, 390]


def test_progress_of_a_very_long_run_is_drawn_at_once(tmp_path):
    """400,000 steps are the paper's; a running mean over a window of them must not hold window × steps numbers."""
    line = '{{"step": {}, "epoch": 0, "loss": {}, "lr": 1e-4, "samples_per_second": 9}}\n'
    with (tmp_path / "log.jsonl").open("w") as f:
        f.writelines(line.format(i, i % 7) for i in range(400_000))
    draw_progress(tmp_path)
    assert (tmp_path / "progress.png").stat().st_size > 10_000


def test_progress_draws_every_loss_and_what_else_a_method_measures(tmp_path, drawn):
    def labels(**measured) -> list[list[str]]:
        line = {"step": 0, "epoch": 0, "loss": 1.0, **measured, "lr": 1e-4, "samples_per_second": 9.0}
        (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
        draw_progress(tmp_path)
        return [[curve.get_label() for curve in axis.lines if curve.get_label()[0] != "_"] for axis in drawn[-1].axes]

    assert labels() == [["loss"], [], []]
    assert labels(loss_part=0.5) == [["loss"], ["loss_part"], [], []]
    # losses of one kind share an axis, so that a large one does not flatten those of another kind
    measured = {"loss_level1": 0.9, "accuracy_12": 0.5, "loss_align12": 2.0, "loss_level2": 0.8}
    panels = [["loss"], ["loss_level1", "loss_level2"], ["loss_align12"], ["accuracy_12"], [], []]
    assert labels(**measured) == panels


def test_running_mean():
    values = [float(i % 13) for i in range(500)]
    expected = [np.mean(values[max(0, i - 9) : i + 1]) for i in range(500)]
    np.testing.assert_allclose(running_mean(values), expected, rtol=1e-12)


def test_continuing_a_finished_run_changes_nothing(preprocessed, tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run" / ENCODER).read_bytes()
    assert len(run(tmp_path / "run", resume=True)) == 9
    assert (tmp_path / "run" / ENCODER).read_bytes() == before


def test_broken_intensities_stop_the_run_before_the_weights_change(nnunet, tmp_path):
    def fill(number, shape):
        return np.full(shape, np.nan if number == 1 else 0.5)

    write_preprocessed(nnunet.preprocessed, {"fine": (16, 16, 16), "nan": (16, 16, 16)}, fill=fill)
    # sample 0 of a step takes its case from the first draw: find a seed that meets the broken case in step 2
    drawn = {seed: [np.random.default_rng([seed, step, 0]).integers(2) for step in range(3)] for seed in range(50)}
    seed = next(s for s, cases in drawn.items() if cases == [0, 0, 1])
    settings = tiny_settings(batch_size=1, steps_per_epoch=1, epochs=5, picture_epochs=5, seed=seed)
    with pytest.raises(UserError, match=r"loss is nan at step 2,.*Dataset001_Tiny/nan;"):
        run(tmp_path / "run", settings)
    log = read_log(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in log)
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert saved["step"] == len(log) == 2
    assert all(torch.isfinite(t).all() for t in saved["method"].values())


def test_a_run_folder_is_not_overwritten(preprocessed, tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run" / ENCODER).read_bytes()
    with pytest.raises(UserError, match=rf"{tmp_path / 'run'} .*--c.*--name"):
        run(tmp_path / "run")
    with pytest.raises(UserError, match=r"lr was 0.001, is 0.002"):
        run(tmp_path / "run", tiny_settings(lr=2e-3), resume=True)
    with pytest.raises(UserError, match=r"run\.json.*without --c"):
        run(tmp_path / "new", resume=True)
    assert (tmp_path / "run" / ENCODER).read_bytes() == before


class FakeWandb:
    """As much of Weights & Biases as nnU-Net's logger touches; remembers what was logged."""

    def __init__(self):
        self.logged, self.config, self.summary, self.step = [], {}, {}, 0

    def init(self, **_):
        return self

    def log(self, values, step):
        self.logged.append((step, values))


def test_weights_and_biases_through_nnunets_own_logger(preprocessed, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(tmp_path / "without")
    fake = FakeWandb()
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", fake)
    log = run(tmp_path / "run")
    assert [(s, v["loss"]) for s, v in fake.logged if "loss" in v] == [(x["step"], x["loss"]) for x in log]
    assert fake.config["method"] == "hiendmae"


def test_a_run_folder_in_use(preprocessed, tmp_path):
    folder = tmp_path / "run"
    with locked(folder / LOCK, "by this test"), pytest.raises(UserError, match=rf"{folder} is in use .*--name or -o"):
        run(tmp_path / "run")


def test_a_damaged_checkpoint(preprocessed, tmp_path):
    run(tmp_path / "run")
    file = tmp_path / "run" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{file} .*--name"):
        run(tmp_path / "run", resume=True)


def test_a_full_disk_keeps_the_former_checkpoint(preprocessed, tmp_path):
    """Writing to a file-size limit is what a full disk does: an OSError in the middle of a write."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_state(folder, {}, step=1)
    before = (folder / CHECKPOINT).read_bytes()
    code = (
        "import resource, signal, torch, sys; from pathlib import Path\n"
        "from nnunetv2_hiendmae.training.run import save_state\n"
        "from nnunetv2_hiendmae.training.runlog import RunLog\n"
        "from nnunetv2_hiendmae.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from nnunetv2_hiendmae.architectures import PRESETS, build_encoder\n"
        "from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder\n"
        "folder, encoder = Path(sys.argv[1]), build_encoder(PRESETS['vit_nano_p8'])\n"
        "log = RunLog(folder, 'step', 0, 9)\n"
        "try: log.add({'step': 0, 'x': 'long' * 50_000})\n"
        "except UserError as e: print('log:', e)\n"
        "try: save_state(folder, {}, x=torch.zeros(1_000_000))\n"
        "except UserError as e: print('checkpoint:', e)\n"
        "metadata = EncoderMetadata(encoder.spec, 'mae3d')\n"
        "try: save_encoder(folder / 'encoder.safetensors', encoder.state_dict(), metadata)\n"
        "except UserError as e: print('encoder:', e)\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], capture_output=True, encoding="utf-8"
    )
    assert [line.partition(" on the disk")[0] for line in out.stdout.splitlines()] == [
        "log: no space left",
        "checkpoint: no space left",
        "encoder: no space left",
    ], out.stderr
    assert (folder / CHECKPOINT).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [CHECKPOINT, "log.jsonl"]


def test_a_disk_that_is_too_small_is_refused_before_training(preprocessed, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"0\.0 GB .*0\.\d GB.* -o"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-size", "20", "16", "16"], r"20, 16, 16.*8, 8, 8.*--crop-size"),
        (["--method", "nope"], r"--method is nope, .*hiendmae, mim, glmae, mae3d"),
        (["--batch-size", "3", "--accumulate", "2"], r"--batch-size 3 .*1 processes x 2 .*2$"),
        (["--set", "colour=1"], r"--set colour=1 .*mask_ratio"),
        (["--set", "decoder_dim=50", "decoder_heads=4"], r"decoder_dim\D*50.*decoder_heads\D*4"),
        (["--set", "decoder_dim=-6"], r"decoder_dim\D*-6"),
        (["--set", "self_depth=-3"], r"self_depth\D*-3"),
        (["--set", "mask_ratio=1.0"], r"mask_ratio\D*1\.0"),
        (["--crop-size", "8", "8", "8"], r"mask_ratio.* 1 token.*--crop-size"),
        (["--lr", "nan"], r"--lr is nan, needed more than 0"),
        (["--precision", "fp16"], r"fp16 .*-device cuda"),
        (["-device", "mps"], r"-device mps.*-device cpu"),
        (["-d", "9"], r"'9' .*Dataset001_Tiny"),
        (["-c", "2d"], r"'2d' .*3d_fullres"),
        (["-device", "cuda"], r"-device cuda.*-device cpu"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(preprocessed, tmp_path, capsys, arguments, message):
    if arguments == ["-device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cli.main([*cli_arguments("hiendmae", tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error) and error.startswith("hiendmae pretrain: ")
    # nothing half-written
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("mim", ["--crop-size", "24", "16", "16"], r"\(3, 2, 2\).*--crop-size"),
        ("mim", ["--set", "crops_level3=6"], r"crops_level3\D*6\D*1 to 5"),
        ("mim", ["--set", "tau=nan"], r"tau\W+\w* ?nan"),
        ("glmae", ["--set", "global_size=20"], r"global_size\D*20"),
        ("hiendmae", ["--encoder", "convvit_tiny", "--crop-size", "32", "32", "32"], r"hiendmae .*'convvit'"),
    ],
)
def test_options_that_do_not_fit_are_told_before_anything_is_written(
    preprocessed, tmp_path, capsys, method, arguments, message
):
    assert cli.main([*cli_arguments(method, tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error) and error.startswith("hiendmae pretrain: ") and not (tmp_path / "run").exists()


def test_output_that_is_a_file(preprocessed, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(cli_arguments("hiendmae", output)) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_dataset_given_twice_is_one(preprocessed, tmp_path):
    assert cli.main([*cli_arguments("hiendmae", tmp_path / "run"), "-d", "1", "Dataset001_Tiny", "--epochs", "1"]) == 0
    assert load_encoder(tmp_path / "run" / ENCODER)[1].training["cases"] == 2
