"""Pictures of segmentations."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with

COLOURS = "tab10"
NUM_COLOURS = 10
PANEL_INCHES = 3.0
MARGIN_INCHES = 1.0  # title, column titles, legend


def overlay_picture(
    path: Path,
    image: Path,
    masks: Mapping[str, Path],
    labels: Mapping[str, int],
    *,
    window: tuple[float, float] | None = None,
    num_slices: int = 4,
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
    low, high = np.percentile(voxels, (1, 99)) if window is None else window
    rows = _slices(next(iter(layers.values())), num_slices)
    drawn = {name: value for name, value in labels.items() if value > 0}

    columns = 1 + len(layers)
    # not through pyplot, whose global state keeps figures open and picks a screen
    aspect = spacing[1] / spacing[2]
    height = PANEL_INCHES * min(2.0, aspect * voxels.shape[1] / voxels.shape[2])
    figure = Figure(figsize=(PANEL_INCHES * columns, height * len(rows) + MARGIN_INCHES), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    colours = colormaps[COLOURS]
    for row, z in zip(axes, rows, strict=True):
        for axis, (name, layer) in zip(row, {"image": None, **layers}.items(), strict=True):
            axis.imshow(voxels[z], cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if layer is not None:
                axis.imshow(_colour(layer[z], drawn, colours), aspect=aspect, interpolation="nearest")
            axis.set_axis_off()
            if z == rows[0]:
                axis.set_title(name, fontsize=10)
    handles = [Patch(color=colours((v - 1) % NUM_COLOURS), label=k) for k, v in drawn.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))


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


def _slices(mask: np.ndarray, wanted: int) -> list[int]:
    filled = np.flatnonzero((mask > 0).any(axis=(1, 2)))
    if not filled.size:
        filled = np.arange(len(mask))
    # the outermost slices show little: take the middles of equal parts, from head to feet
    parts = np.array_split(filled, min(wanted, filled.size))
    return [int(part[len(part) // 2]) for part in reversed(parts)]


def _colour(layer: np.ndarray, labels: Mapping[str, int], colours) -> np.ndarray:
    picture = np.zeros((*layer.shape, 4))
    for value in labels.values():
        picture[layer == value] = (*colours((value - 1) % NUM_COLOURS)[:3], 0.55)
    return picture
