"""Montages of grey slices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np

from nnunetv2_hiendmae.files import write_with

# in inches: width of a slice and height of a line of a row's label
SLICE_WIDTH, LINE_HEIGHT = 3.2, 0.15
LABEL_CHARACTERS = 24


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
