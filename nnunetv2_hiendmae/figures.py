"""Pictures of slices: montages in grey, and slices under a segmentation or a map of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with

# in inches: width of a slice and height of a line of a row's label
SLICE_WIDTH, LINE_HEIGHT = 3.2, 0.15
LABEL_CHARACTERS = 24
# no tissue is blue
MASKED_COLOUR = "#2a5da8"
CLASS_COLOURS, NUM_COLOURS = "tab10", 10
PANEL_INCHES = 3.0
# under masks
NUM_SLICES = 4
MARGIN_INCHES = 1.0  # title, column titles, legend
# top, bottom, left and right of a slice, in parts of its width and height
EDGES = (0.5, 0.96), (0.5, 0.04), (0.04, 0.5), (0.96, 0.5)
LETTERS = {"color": "#ffd000", "fontsize": 9, "fontweight": "bold", "ha": "center", "va": "center"}
# matplotlib is imported where it is needed, and figures are not made through pyplot, whose global state keeps them open

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> None:
    """Writes a PNG in one step."""
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


@dataclass(frozen=True)
class MontageRow:
    """One row of a montage.

    Args:
        label: its lines.
        slices: by column title; what a masked array masks is shown in colour.
        limits: values shown black and white.
        edges: letters for what lies at the top, bottom, left and right of every slice; may be empty.
    """

    label: str
    slices: Mapping[str, np.ndarray]
    limits: tuple[float, float]
    edges: str = ""


def draw_montage(path: Path, rows: Sequence[MontageRow], aspect: float = 1.0, title: str = "") -> None:
    """Writes a PNG of grey slices in rows and columns, each row's label to its left.

    Args:
        rows: all with the same columns.
        aspect: height of a voxel over its width.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grey = colormaps["gray"].with_extremes(bad=MASKED_COLOUR)
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
            axis.imshow(row.slices[name], cmap=grey, interpolation="nearest", aspect=aspect, **limits)
            for (x, y), letter in zip(EDGES, row.edges, strict=False):
                axis.text(x, y, letter, transform=axis.transAxes, **LETTERS)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name if row is rows[0] else "", fontsize=10)
        # lying, not upright: rows may be lower than a name is long
        axes[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def overlay_picture(
    path: Path,
    image: Path,
    masks: Mapping[str, Path],
    labels: Mapping[str, int],
    *,
    window: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Writes a PNG: one row per axial slice; columns are the image and the image under every mask.

    The first mask decides which slices are shown: those that hold its foreground, evenly spread. Patient's right is at
    the left of the picture, front is up.

    Args:
        image: volume in any format that SimpleITK reads.
        masks: column title -> label volume on the grid of `image`.
        labels: class name -> value; values of 0 or below are not drawn.
        window: intensities shown from black to white; None: the 1st to 99th percentile.

    Raises:
        UserError: a file cannot be read, or a mask is on another grid.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    voxels, spacing = _read_axial(image)
    layers = {name: _read_axial(file)[0] for name, file in masks.items()}
    for name, layer in layers.items():
        if layer.shape != voxels.shape:
            raise UserError(f"{masks[name]} has shape {layer.shape}, needed {voxels.shape} as {image}")
    rows = _slices(next(iter(layers.values())))
    drawn = {name: value for name, value in labels.items() if value > 0}
    colours = {value: colormaps[CLASS_COLOURS]((value - 1) % NUM_COLOURS) for value in drawn.values()}
    limits, aspect = grey_limits(voxels, window), spacing[1] / spacing[2]

    columns = 1 + len(layers)
    height = PANEL_INCHES * min(2.0, aspect * voxels.shape[1] / voxels.shape[2])
    figure = Figure(figsize=(PANEL_INCHES * columns, height * len(rows) + MARGIN_INCHES), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, z in zip(axes, rows, strict=True):
        for axis, (name, layer) in zip(row, {"image": None, **layers}.items(), strict=True):
            show_grey(axis, voxels[z], limits, aspect, name if z == rows[0] else "")
            if layer is not None:
                axis.imshow(_colour(layer[z], colours), aspect=aspect, interpolation="nearest")
    handles = [Patch(color=colours[value], label=name) for name, value in drawn.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path, dpi=90)


def grey_limits(voxels: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float]:
    """Intensities shown from black to white: the window, else the 1st to 99th percentile."""
    return tuple(np.percentile(voxels, (1, 99))) if window is None else window


def show_grey(axis: Any, picture: np.ndarray, limits: tuple[float, float], aspect: float, title: str = "") -> None:
    """Draws a slice, without ticks."""
    axis.imshow(picture, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=aspect)
    axis.set_axis_off()
    axis.set_title(title, fontsize=10)


def _read_axial(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Volume as (D, H, W) with axes towards superior, posterior, left, and its spacing in that order."""
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as e:
        raise UserError(f"cannot read {path} ({str(e).strip().splitlines()[-1]})") from e
    if image.GetDimension() != 3:
        raise UserError(f"{path} has {image.GetDimension()} axes, needed a volume with 3")
    image = sitk.DICOMOrient(image, "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def _slices(mask: np.ndarray) -> list[int]:
    filled = np.flatnonzero((mask > 0).any(axis=(1, 2)))
    if not filled.size:
        filled = np.arange(len(mask))
    # the outermost slices show little: take the middles of equal parts, from head to feet
    parts = np.array_split(filled, min(NUM_SLICES, filled.size))
    return [int(part[len(part) // 2]) for part in reversed(parts)]


def _colour(layer: np.ndarray, colours: Mapping[int, tuple[float, ...]]) -> np.ndarray:
    picture = np.zeros((*layer.shape, 4))
    for value, colour in colours.items():
        picture[layer == value] = (*colour[:3], 0.55)
    return picture
