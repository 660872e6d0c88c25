"""Pictures of slices with something laid over them: segmentations, or a map of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with

if TYPE_CHECKING:
    from nnunetv2_hiendmae.inspection.volumes import Grid

# array axes towards feet, back, left: slices then have the head or the front up, and the patient's right at the left
PICTURE_AXES = "IPL"
CLASS_COLOURS, NUM_COLOURS = "tab10", 10
WEIGHT_COLOURS = "inferno"
PANEL_INCHES = 3.0
MARGIN_INCHES = 1.0  # title, column titles, legend
PLANE_INCHES = 3.4
CROSS = {"marker": "+", "color": "cyan", "markersize": 12, "markeredgewidth": 1.5}
# matplotlib is imported where it is needed, and figures are not made through pyplot, whose global state keeps them open


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
    rows = _slices(next(iter(layers.values())), num_slices)
    drawn = {name: value for name, value in labels.items() if value > 0}
    colours = {value: colormaps[CLASS_COLOURS]((value - 1) % NUM_COLOURS) for value in drawn.values()}
    limits, aspect = _limits(voxels, window), spacing[1] / spacing[2]

    columns = 1 + len(layers)
    height = PANEL_INCHES * min(2.0, aspect * voxels.shape[1] / voxels.shape[2])
    figure = Figure(figsize=(PANEL_INCHES * columns, height * len(rows) + MARGIN_INCHES), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, z in zip(axes, rows, strict=True):
        for axis, (name, layer) in zip(row, {"image": None, **layers}.items(), strict=True):
            _show_grey(axis, voxels[z], limits, aspect, name if z == rows[0] else "")
            if layer is not None:
                axis.imshow(_colour(layer[z], colours), aspect=aspect, interpolation="nearest")
    handles = [Patch(color=colours[value], label=name) for name, value in drawn.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))


def draw_planes(
    path: Path,
    image: np.ndarray,
    overlay: np.ndarray,
    grid: "Grid",
    *,
    shown: tuple[slice, ...],
    point: np.ndarray,
    window: tuple[float, float] | None,
    title: str,
) -> None:
    """Writes a PNG: axial, coronal and sagittal slices through a world position in mm, above the image alone with the
    position marked, below with the map over it. Patient's right is at the left, front and head are up.

    Args:
        image, overlay: an image (D, H, W) and a map, both on `grid`.
        shown: part of these arrays that is drawn.
        window: intensities shown from black to white; None: the 1st to 99th percentile of the whole image.
    """
    from matplotlib.figure import Figure
    from nibabel.orientations import apply_orientation

    limits = _limits(image, window)
    part = grid.cropped([s.start for s in shown], [s.stop - s.start for s in shown])
    change = part.turn_to(PICTURE_AXES)
    image, overlay = (apply_orientation(a[shown], change) for a in (image, overlay))
    turned = part.turned(change)
    at = [min(max(round(float(i)), 0), n - 1) for i, n in zip(turned.to_index(point), turned.shape, strict=True)]
    strongest = float(overlay.max())

    extent = np.array(turned.shape) * turned.spacing_mm
    heights, widths = (extent[1], extent[0], extent[0]), (extent[2], extent[2], extent[1])
    scale = PLANE_INCHES / extent.max()
    figure = Figure(figsize=(scale * sum(widths) + 1.6, 2 * scale * max(heights) + 1.0), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=widths)
    for across, name in enumerate(("axial", "coronal", "sagittal")):
        rows, columns = [axis for axis in range(3) if axis != across]
        picture, weights = (np.take(a, at[across], axis=across) for a in (image, overlay))
        aspect = turned.spacing_mm[rows] / turned.spacing_mm[columns]
        above, below = axes[:, across]
        _show_grey(above, picture, limits, aspect, name)
        _show_grey(below, picture, limits, aspect)
        # weak attention lets the image through
        opacity = 0.75 * np.sqrt(weights / max(strongest, 1e-12))
        percent = {"cmap": WEIGHT_COLOURS, "vmin": 0, "vmax": strongest * 100}
        drawn = below.imshow(weights * 100, alpha=opacity, aspect=aspect, **percent)
        for axis in (above, below):
            axis.plot(at[columns], at[rows], **CROSS)
    bar = figure.colorbar(drawn, ax=axes[1, :], shrink=0.8)
    bar.set_label("attention on a patch, % of all", fontsize=8)
    figure.suptitle(f"{title}, at {', '.join(f'{p:.1f}' for p in point)} mm", fontsize=10)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _limits(voxels: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float]:
    return tuple(np.percentile(voxels, (1, 99))) if window is None else window


def _show_grey(axis: Any, picture: np.ndarray, limits: tuple[float, float], aspect: float, title: str = "") -> None:
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


def _slices(mask: np.ndarray, wanted: int) -> list[int]:
    filled = np.flatnonzero((mask > 0).any(axis=(1, 2)))
    if not filled.size:
        filled = np.arange(len(mask))
    # the outermost slices show little: take the middles of equal parts, from head to feet
    parts = np.array_split(filled, min(wanted, filled.size))
    return [int(part[len(part) // 2]) for part in reversed(parts)]


def _colour(layer: np.ndarray, colours: Mapping[int, tuple[float, ...]]) -> np.ndarray:
    picture = np.zeros((*layer.shape, 4))
    for value, colour in colours.items():
        picture[layer == value] = (*colour[:3], 0.55)
    return picture
