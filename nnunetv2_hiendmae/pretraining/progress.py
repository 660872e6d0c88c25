"""What a pretraining run leaves to look at: log.jsonl, progress.png, reconstructions, and W&B if asked for."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2_hiendmae.figures import MontageRow, draw_montage, grey_limits, save_figure
from nnunetv2_hiendmae.pretraining.method import Reconstruction
from nnunetv2_hiendmae.training.runlog import RunLog, read_log
from nnunetv2_hiendmae.volume_format import VolumeFormat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from nnunetv2_hiendmae.pretraining.settings import PretrainSettings

PROGRESS = "progress.png"
RECONSTRUCTIONS = "reconstructions"
# what a line of the log holds besides the method's losses and measures
RUN_KEYS = ("step", "epoch", "lr", "samples_per_second")
# what the line of a step with a probe holds too, and that before the first step, which alone knows of voxels
PROBE_KEYS = PROBE_DICE, PROBE_VOXELS, PROBE_RANK = ("probe_dice", "probe_dice_voxels", "probe_rank")
PROBE_COSTS = PROBE_SECONDS, PROBE_SHARE = ("probe_seconds", "probe_share")
# log lines without a terminal: at least this many seconds apart
PLAIN_LINE_SECONDS = 30
# between two drawings of the curves at least so long, and of a run's time they take at most this share: a GPU waits
DRAW_SECONDS, MOST_DRAW_SHARE = 20, 0.02
# a figure has about 1000 pixels across, a run has up to millions of steps
CURVE_POINTS = 2000
# of a picture's grey scale, in normalised intensities: a constant patch (air, padding) is predicted to about 1e-3, the
# root of the epsilon that its deviation gets, and should look constant
LEAST_SPAN = 0.02


class StepLog(RunLog):
    """Writes one JSON line per step and shows progress; samples are crops, or volumes where a method draws several
    views of one, over all processes."""

    def __init__(self, run_dir: Path, first_step: int, settings: "PretrainSettings"):
        super().__init__(run_dir, "step", first_step, settings.total_steps, settings.to_dict())
        self._settings, self._drawing = settings, 0.0
        self._started = self._last = self._told = self._drawn = time.monotonic()

    def before_steps(self, values: dict[str, float]) -> None:
        """Records what was measured before the first step, as that of number -1; no speed has its time."""
        self.write({"step": -1, "epoch": 0, **values})
        self._started = self._last = time.monotonic()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Records a finished step (0-based)."""
        now, samples, told = time.monotonic(), self._settings.batch_size, ""
        spent = now - self._last - values.get(PROBE_SECONDS, 0)
        speed, self._last = samples / max(spent, 1e-9), now
        loss, lr = f"{values['loss']:.4f}", f"{values['lr']:.2e}"
        line = {"step": step, "epoch": step // self._settings.steps_per_epoch, **values}
        if step + 1 == self.total or now - self._told > PLAIN_LINE_SECONDS:
            seconds, self._told = (now - self._started) / (step + 1 - self.first), now
            told = (
                f"step {step + 1}/{self.total} epoch {line['epoch']} loss {loss} lr {lr} {samples / seconds:.3g} "
                f"samples/s, {seconds * (self.total - step - 1) / 60:.0f} min left"
            )
        self.add({**line, "samples_per_second": round(speed, 2)}, told, loss=loss, lr=lr, samples_s=f"{speed:.3g}")
        for key, value in values.items() if self.wandb else ():
            self.wandb.log(key, value, step)

    def end_epoch(self, last: bool) -> None:
        """Redraws progress.png, but not several times a minute, and leaves the time since the last step (pictures,
        checkpoints) out of samples/s."""
        begun = time.monotonic()
        if last or begun - self._drawn > max(DRAW_SECONDS, self._drawing / MOST_DRAW_SHARE):
            draw_progress(self.run_dir)
            self._drawn = time.monotonic()
            self._drawing = self._drawn - begun
        self._last = time.monotonic()


def draw_progress(run_dir: Path) -> None:
    """Redraws progress.png from log.jsonl: every loss part, what else the method measures, learning rate, speed."""
    import pandas as pd
    from matplotlib.figure import Figure

    lines = read_log(run_dir, "step")
    if not lines:
        return
    # what a line lacks is a gap
    probed = [line for line in lines if PROBE_DICE in line]
    columns = [*RUN_KEYS, *(PROBE_KEYS if probed else ()), *lines[-1]]
    values = pd.DataFrame(lines, columns=list(dict.fromkeys(columns))).apply(pd.to_numeric, errors="coerce")
    panels = _panels([k for k in values if k not in {*RUN_KEYS, *PROBE_KEYS, *PROBE_COSTS}])
    shown = slice(None, None, -(-len(lines) // CURVE_POINTS))
    steps = values["step"][shown].to_numpy()
    rows = len(panels) + (2 if probed else 0) + 2
    figure = Figure(figsize=(8, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        for number, key in enumerate(keys):
            axis.plot(steps, values[key][shown], alpha=0.3, linewidth=0.8, color=f"C{number}")
            axis.plot(steps, running_mean(values[key])[shown], label=key, color=f"C{number}")
        axis.set(ylabel=title)
        axis.legend()
    axes[0].set(title=f"{run_dir.name}: step {steps[-1] + 1}")
    if probed:
        _draw_probe(axes[-4:-2], values[values[PROBE_DICE].notna()])
    axes[-2].plot(steps, values["lr"][shown])
    axes[-2].set(ylabel="learning rate")
    axes[-1].plot(steps, running_mean(values["samples_per_second"])[shown])
    axes[-1].set(ylabel="samples / s", xlabel="step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, run_dir / PROGRESS)


def _draw_probe(axes: Sequence["Axes"], probed: "DataFrame") -> None:
    """Dice and rank at every probe; what was there before the first step as lines."""
    start = probed.iloc[0]
    for axis, key, title in zip(axes, (PROBE_DICE, PROBE_RANK), ("probe Dice", "effective rank"), strict=True):
        axis.plot(probed["step"], probed[key], marker="o", label=key)
        if start["step"] < 0:
            axis.axhline(start[key], linestyle="--", color="C1", label="at the start")
        axis.set(ylabel=title)
    if start["step"] < 0:
        axes[0].axhline(start[PROBE_VOXELS], linestyle=":", color="C2", label="of voxels")
    for axis in axes:
        axis.legend()


def _panels(measured: Sequence[str]) -> dict[str, list[str]]:
    """What shares an axis, by its title: losses of one kind (`loss_level1`, `loss_level2`), since kinds differ in size
    and the larger would hide how the smaller falls, and then all that is no loss."""
    panels: dict[str, list[str]] = {}
    for name in sorted(measured, key=lambda name: not name.startswith("loss")):
        kind = re.match(r"loss(_[a-z]+)?", name)
        panels.setdefault(kind[0] if kind else "other measures", []).append(name)
    return panels


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and those before it, over a fiftieth of them all."""
    import pandas as pd

    return pd.Series(values).rolling(max(1, len(values) // 50), min_periods=1).mean().to_numpy()


def draw_reconstruction(
    path: Path, made: Reconstruction, cases: Sequence[str], volumes: VolumeFormat, edges: Sequence[str]
) -> None:
    """Montage, one row per sample: the middle slice of input, masked input and reconstruction, first channel.

    `cases`: 'Dataset/case' of every sample; datasets are only named where there are several. `edges`: letters of every
    sample's slices, see `Grid.edges`.
    """
    several = len({case.partition("/")[0] for case in cases}) > 1
    rows = []
    for row, (case, letters) in enumerate(zip(cases, edges, strict=True)):
        shown = {name: volumes.to_intensity(v[0], 0) for name, v in made.arrays(row).items()}
        shown["masked"] = np.ma.array(shown["masked"], mask=made.hidden[row].cpu().numpy())
        slices = {name: volume[len(volume) // 2] for name, volume in shown.items()}
        label = "\n".join(case.split("/")) if several else case.rpartition("/")[2]
        rows.append(MontageRow(label, slices, shown_range(shown["input"], volumes), letters))
    draw_montage(path, rows, title=how_shown(made, volumes))


def shown_range(image: np.ndarray, volumes: VolumeFormat) -> tuple[float, float]:
    """Values of a sample's first channel shown black and white: CT's window in HU, else the 1st and 99th percentile."""
    low, high = grey_limits(image, volumes.window_hu if volumes.is_ct(0) else None)
    return float(low), float(max(high, low + LEAST_SPAN))


def how_shown(made: Reconstruction, volumes: VolumeFormat) -> str:
    """What a picture's grey values are, in a line."""
    window = "{:.0f} to {:.0f} HU".format(*volumes.window_hu) if volumes.is_ct(0) else "1st to 99th percentile"
    return f"{window}; mean and spread of masked patches are the true ones" if made.true_scale else window
