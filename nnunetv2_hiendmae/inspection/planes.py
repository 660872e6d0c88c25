"""Three orthogonal slices through a point, with a map laid over them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from nnunetv2_hiendmae.files import write_with
from nnunetv2_hiendmae.inspection.geometry import Grid, covered

# array axes towards head, back, left: an axial slice then has the front up and the patient's right at the left
PICTURE_AXES = "SPL"
PANEL_INCHES = 3.4
# of the surroundings of the map that are shown
MARGIN = 0.2
COLOURS = "inferno"


@dataclass(frozen=True, eq=False)
class Planes:
    """What is drawn: an image (D, H, W), a map on the same grid, and the box inside which the map is defined."""

    image: np.ndarray
    overlay: np.ndarray
    grid: Grid
    box: Grid


def draw_planes(path: Path, planes: Planes, point: np.ndarray, window: tuple[float, float] | None, title: str) -> None:
    """Writes a PNG: axial, coronal and sagittal slices through a world position in mm, above the image alone with the
    position marked, below with the map over it. Patient's right is at the left, front and head are up.

    Args:
        window: intensities shown from black to white; None: the 1st to 99th percentile.
    """
    from matplotlib.figure import Figure

    part = covered(planes.box, planes.grid, MARGIN)
    grid = planes.grid.cropped([s.start for s in part], [s.stop - s.start for s in part])
    change = grid.turn_to(PICTURE_AXES)
    image, overlay = (apply_orientation(a[part], change) for a in (planes.image, planes.overlay))
    turned = grid.turned(change)
    at = [min(max(round(float(i)), 0), n - 1) for i, n in zip(turned.to_index(point), turned.shape, strict=True)]
    limits = np.percentile(planes.image, (1, 99)) if window is None else window
    strongest = float(overlay.max())

    extent = np.array(turned.shape) * turned.spacing_mm
    heights, widths = (extent[1], extent[0], extent[0]), (extent[2], extent[2], extent[1])
    scale = PANEL_INCHES / extent.max()
    figure = Figure(figsize=(scale * sum(widths) + 1.6, 2 * scale * max(heights) + 1.0), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=widths)
    for column, name in enumerate(("axial", "coronal", "sagittal")):
        picture, laid_over, (row, col), aspect = _plane(column, image, overlay, at, turned.spacing_mm)
        for axis in axes[:, column]:
            axis.imshow(picture, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=aspect)
            axis.set_axis_off()
        axes[0, column].set_title(name, fontsize=10)
        axes[0, column].plot(col, row, "+", color="cyan", markersize=12, markeredgewidth=1.5)
        # weak attention lets the image through
        opacity = 0.75 * np.sqrt(laid_over / max(strongest, 1e-12))
        drawn = axes[1, column].imshow(
            laid_over * 100, cmap=COLOURS, vmin=0, vmax=strongest * 100, alpha=opacity, aspect=aspect
        )
        axes[1, column].plot(col, row, "+", color="cyan", markersize=12, markeredgewidth=1.5)
    bar = figure.colorbar(drawn, ax=axes[1, :], shrink=0.8)
    bar.set_label("attention on a patch, % of all", fontsize=8)
    figure.suptitle(f"{title}, at {', '.join(f'{p:.1f}' for p in point)} mm", fontsize=10)
    write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _plane(
    axis: int, image: np.ndarray, overlay: np.ndarray, at: list[int], spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], float]:
    """Slices of both arrays across one axis, the position in them, and the height of a voxel over its width."""
    rows, columns = [i for i in range(3) if i != axis]
    slices, row = [np.take(a, at[axis], axis=axis) for a in (image, overlay)], at[rows]
    if rows == 0:
        # feet to head: rows of a picture go down
        slices, row = [s[::-1] for s in slices], image.shape[0] - 1 - at[0]
    return *slices, (row, at[columns]), spacing_mm[rows] / spacing_mm[columns]
