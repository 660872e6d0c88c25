"""What a run leaves to look at: log.jsonl, progress.png, reconstructions, a progress bar, and W&B if asked for."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import telling_disk_errors, write_text, write_with
from nnunetv2_hiendmae.pretraining.method import Reconstruction
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
PROGRESS = "progress.png"
RECONSTRUCTIONS = "reconstructions"
# what a line of the log holds besides the method's losses and measures
RUN_KEYS = ("step", "epoch", "lr", "samples_per_second")
# nnU-Net's own switch
WANDB_VARIABLE = "nnUNet_wandb_enabled"
# log lines without a terminal: at least this many seconds apart
PLAIN_LINE_SECONDS = 30
DRAW_SECONDS = 20
# a figure has about 1000 pixels across, a run has up to millions of steps
CURVE_POINTS = 2000
# of a picture's grey scale, in normalised intensities: a constant patch (air, padding) is predicted to about 1e-3, the
# root of the epsilon that its deviation gets, and should look constant
LEAST_SPAN = 0.02
# of a montage, in inches: width of a slice and height of a line of a row's label
SLICE_WIDTH, LINE_HEIGHT = 3.2, 0.15
LABEL_CHARACTERS = 24


class RunLog:
    """Writes one JSON line per step and shows progress.

    Args:
        run_dir: where log.jsonl lies; lines after `first_step` (from a run that was killed) are dropped.
        total_steps: for the bar and the time left.
        samples_per_step: over all processes; crops, or volumes where a method draws several views of one.
    """

    def __init__(self, run_dir: Path, first_step: int, total_steps: int, samples_per_step: int, config: dict[str, Any]):
        self.run_dir = run_dir
        self.total_steps = total_steps
        self.samples_per_step = samples_per_step
        self._first_step = first_step
        if (run_dir / LOG).exists():
            kept = [line for line in _lines(run_dir) if line["step"] < first_step]
            write_text(run_dir / LOG, "".join(json.dumps(line) + "\n" for line in kept))
        with telling_disk_errors(run_dir / LOG):
            self._file = (run_dir / LOG).open("a", encoding="utf-8")
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )
        self._wandb = _wandb_logger(run_dir, resume=first_step > 0, config=config)
        self._started = self._last = self._last_line = self._drawn = time.monotonic()

    def step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Records a finished step (0-based)."""
        now = time.monotonic()
        speed = self.samples_per_step / max(now - self._last, 1e-9)
        self._last = now
        line = {"step": step, "epoch": epoch, **values, "samples_per_second": round(speed, 2)}
        with telling_disk_errors(self.run_dir / LOG):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.2e}", samples_s=f"{speed:.3g}", refresh=False
        )
        self._bar.update()
        last = step + 1 == self.total_steps
        if not self._terminal and (last or now - self._last_line > PLAIN_LINE_SECONDS):
            self._last_line = now
            logger.info(self._plain_line(step, epoch, values))
        if self._wandb:
            for key, value in values.items():
                self._wandb.log(key, value, step)

    def end_epoch(self, last: bool) -> None:
        """Redraws progress.png, but not several times a minute, and leaves the time since the last step (pictures,
        checkpoints) out of samples/s."""
        if last or time.monotonic() - self._drawn > DRAW_SECONDS:
            draw_progress(self.run_dir)
            self._drawn = time.monotonic()
        self._last = time.monotonic()

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        # what could not be written was told before; closing tries again
        with suppress(OSError):
            self._file.close()

    def _plain_line(self, step: int, epoch: int, values: dict[str, float]) -> str:
        done = step + 1 - self._first_step
        elapsed = time.monotonic() - self._started
        left = elapsed / done * (self.total_steps - step - 1)
        return (
            f"step {step + 1}/{self.total_steps} epoch {epoch} loss {values['loss']:.4f} lr {values['lr']:.2e} "
            f"{done * self.samples_per_step / elapsed:.3g} samples/s, {left / 60:.0f} min left"
        )


def draw_progress(run_dir: Path) -> None:
    """Redraws progress.png from log.jsonl: every loss part, what else the method measures, learning rate, speed."""
    from matplotlib.figure import Figure

    lines = _lines(run_dir)
    if not lines:
        return
    panels = _panels([k for k in lines[0] if k not in RUN_KEYS])
    shown = slice(None, None, -(-len(lines) // CURVE_POINTS))
    steps = [line["step"] for line in lines][shown]
    figure = Figure(figsize=(8, 3 * len(panels) + 6), layout="constrained")
    axes = figure.subplots(len(panels) + 2, 1, sharex=True)
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        for number, key in enumerate(keys):
            values = [line[key] for line in lines]
            axis.plot(steps, values[shown], alpha=0.3, linewidth=0.8, color=f"C{number}")
            axis.plot(steps, running_mean(values)[shown], label=key, color=f"C{number}")
        axis.set(ylabel=title)
        axis.legend()
    axes[0].set(title=f"{run_dir.name}: step {steps[-1] + 1}")
    axes[-2].plot(steps, [line["lr"] for line in lines][shown])
    axes[-2].set(ylabel="learning rate")
    axes[-1].plot(steps, running_mean([line["samples_per_second"] for line in lines])[shown])
    axes[-1].set(ylabel="samples / s", xlabel="step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.3)
    write_with(run_dir / PROGRESS, lambda p: figure.savefig(p, format="png", dpi=110))


def _panels(measured: Sequence[str]) -> dict[str, list[str]]:
    """What shares an axis, by its title: losses of one kind (`loss_level1`, `loss_level2`), since kinds differ in size
    and the larger would hide how the smaller falls, and then all that is no loss."""
    panels: dict[str, list[str]] = {}
    for name in sorted(measured, key=lambda name: not name.startswith("loss")):
        kind = re.match(r"loss(_[a-z]+)?", name)
        panels.setdefault(kind[0] if kind else "other measures", []).append(name)
    return panels


def draw_reconstruction(path: Path, made: Reconstruction, cases: list[str], volumes: VolumeFormat) -> None:
    """Montage, one row per sample: the middle slice of input, masked input and reconstruction, first channel.

    Black and white are the least and largest value of the input's whole crop. CT is shown in HU.

    Args:
        cases: 'Dataset/case' of every sample; datasets are only named where there are several.
    """
    several = len({case.partition("/")[0] for case in cases}) > 1
    columns, rows = columns_of(made), []
    for row, case in enumerate(cases):
        shown = {name: volumes.to_intensity(v[row, 0].float().cpu().numpy(), 0) for name, v in columns.items()}
        low, high = float(shown["input"].min()), float(shown["input"].max())
        label = case.split("/") if several else [case.rpartition("/")[2]]
        if volumes.is_ct(0):
            label.append(f"{low:.0f} to {high:.0f} HU")
            span = LEAST_SPAN * volumes.ct_statistics["std"]
        else:
            span = LEAST_SPAN
        slices = {name: volume[len(volume) // 2] for name, volume in shown.items()}
        rows.append(MontageRow("\n".join(label), slices, (low, max(high, low + span))))
    draw_montage(path, rows)


def columns_of(made: Reconstruction) -> dict[str, Tensor]:
    """What is shown side by side, by title."""
    return {"input": made.image, "masked": made.masked, "reconstruction": made.reconstruction}


@dataclass(frozen=True)
class MontageRow:
    """One row of a montage: slices by column title, shown with black and white at `limits`; lines of the label."""

    label: str
    slices: Mapping[str, np.ndarray]
    limits: tuple[float, float]


def draw_montage(path: Path, rows: Sequence[MontageRow], aspect: float = 1.0, title: str = "") -> None:
    """Writes a PNG of grey slices in rows and columns, each row's label to its left.

    Args:
        rows: all with the same columns.
        aspect: height of a voxel over its width.
    """
    from matplotlib.figure import Figure

    columns = list(rows[0].slices)
    height, width = rows[0].slices[columns[0]].shape
    broken = ([part for line in row.label.split("\n") for part in wrap(line, LABEL_CHARACTERS)] for row in rows)
    labels = ["\n".join(lines) for lines in broken]
    most_lines = 1 + max(label.count("\n") for label in labels)
    tall = max(LINE_HEIGHT * most_lines, SLICE_WIDTH * min(2.0, aspect * height / width))
    figure = Figure(figsize=(SLICE_WIDTH * len(columns) + 1, tall * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, row, label in zip(grid, rows, labels, strict=True):
        low, high = row.limits
        for axis, name in zip(axes, columns, strict=True):
            limits = {"vmin": low, "vmax": max(high, low + 1e-6)}
            axis.imshow(row.slices[name], cmap="gray", interpolation="nearest", aspect=aspect, **limits)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name if row is rows[0] else "", fontsize=10)
        # lying, not upright: rows may be lower than a name is long
        axes[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=10)
    write_with(path, lambda p: figure.savefig(p, format="png", dpi=110))


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and those before it, over a fiftieth of them all."""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = []
    for text in (run_dir / LOG).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            # a kill may cut the last line; the step is done again
            logger.warning(f"dropped an incomplete line of {run_dir / LOG}")
    return lines


def _wandb_logger(run_dir: Path, resume: bool, config: dict[str, Any]) -> Any:
    if os.environ.get(WANDB_VARIABLE, "0") not in ("1", "True", "true"):
        return None
    from nnunetv2.training.logging.nnunet_logger import WandbLogger

    try:
        wandb = WandbLogger(str(run_dir), resume)
    except RuntimeError as e:
        raise UserError(f"{WANDB_VARIABLE} is set, but {e} Or run: unset {WANDB_VARIABLE}") from e
    wandb.update_config(config)
    return wandb
