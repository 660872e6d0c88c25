"""Surface Dice, 95% Hausdorff distance and volumes of two masks, exactly, in the definition of Nikolov et al. 2021
(doi:10.2196/26151), which DeepMind's `surface-distance` implements."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from scipy.spatial import KDTree
from skimage.measure import marching_cubes, mesh_surface_area

from nnunetv2_hiendmae.evaluation.metrics import DECIMALS

# corners of a cube of 2 × 2 × 2 voxels; the bit of each in the number of a pattern
_CORNERS = tuple(product((0, 1), repeat=3))
_FULL = 2 ** len(_CORNERS) - 1
_SHARE = 0.95
# headers keep spacings as 32-bit floats: 1 mm may be read as 0.99999998 or 1.00000006
_SLACK = 1e-6
_MM3_PER_ML = 1000

NSD, HD95, PREDICTED_ML, REFERENCE_ML = MEASURES = ("nsd", "hd95", "predicted_ml", "reference_ml")


def measure(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Agreement of two masks of one image.

    The surface runs half-way between a voxel inside and one outside. Its elements lie at the corners of voxels, where
    2 × 2 × 2 of them are not all alike, and count by their area. An axis of one voxel is none: then it is a contour.

    Args:
        reference, prediction: bool, (D, H, W); outside the image there is nothing.
        spacing_mm: of the three axes.
        tolerance_mm: distance up to which an element agrees with the other surface.

    Returns:
        Under the names in `MEASURES`. `nsd`: area of both surfaces within the tolerance of the other one, over their
        whole area; NaN where both masks are empty, 0 where one is. `hd95`, mm: the smallest distance from the other
        surface within which 95% of the area lie, the larger of the two directions; NaN where both masks are empty, the
        diagonal of the image where one is. `predicted_ml`, `reference_ml`: volumes.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    flat = np.array(reference.shape) == 1
    voxel_ml = spacing.prod() / _MM3_PER_ML
    masks = {PREDICTED_ML: prediction, REFERENCE_ML: reference}
    volumes = {name: round(float(np.count_nonzero(mask) * voxel_ml), DECIMALS) for name, mask in masks.items()}
    if not all(mask.any() for mask in masks.values()):
        nothing = not any(mask.any() for mask in masks.values())
        diagonal = round(float(np.linalg.norm(np.where(flat, 0, spacing * reference.shape))), DECIMALS)
        return {NSD: np.nan if nothing else 0.0, HD95: np.nan if nothing else diagonal, **volumes}
    box = _box(reference | prediction)
    patterns = [_patterns(mask[box], flat) for mask in (reference, prediction)]
    surfaces = [(found != 0) & (found != _FULL) for found in patterns]
    areas = [_areas(tuple(spacing))[found[there]] for found, there in zip(patterns, surfaces, strict=True)]
    distances = [_distances(*pair, spacing) for pair in (surfaces, surfaces[::-1])]
    near = [distance <= tolerance_mm * (1 + _SLACK) for distance in distances]
    agreeing = sum(area[close].sum() for area, close in zip(areas, near, strict=True))
    nsd, hd95 = agreeing / sum(area.sum() for area in areas), max(map(_percentile, distances, areas))
    return {NSD: round(float(nsd), DECIMALS), HD95: round(float(hd95), DECIMALS), **volumes}


@lru_cache
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Area in mm² of the surface in each pattern of 2 × 2 × 2 voxels, (256,): by marching cubes (Lorensen & Cline
    1987), of the pattern or its complement, whichever is less; that makes both equal, as in `surface-distance`."""
    areas = np.zeros(_FULL + 1)
    for pattern in range(1, _FULL):
        cube = np.array([pattern >> bit & 1 for bit in range(len(_CORNERS))], dtype=float).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(cube, 0.5, spacing=spacing, method="lorensen")
        areas[pattern] = mesh_surface_area(vertices, faces)
    return np.minimum(areas, areas[::-1])


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest that holds a mask."""
    others = [tuple(axis for axis in range(mask.ndim) if axis != own) for own in range(mask.ndim)]
    ends = [np.flatnonzero(mask.any(axis=axes))[[0, -1]] for axes in others]
    return tuple(slice(first, last + 1) for first, last in ends)


def _patterns(mask: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Number of the pattern around every corner of a voxel, (D + 1, H + 1, W + 1); a flat axis keeps its length: its
    voxel is taken twice, so that there is no surface across it."""
    for axis, is_flat in enumerate(flat):
        widths = [(0, 0)] * mask.ndim
        widths[axis] = (0, 1) if is_flat else (1, 1)
        mask = np.pad(mask, widths, mode="edge" if is_flat else "constant")
    patterns = np.zeros(np.array(mask.shape) - 1, dtype=np.uint8)
    for bit, corner in enumerate(_CORNERS):
        window = tuple(slice(start, start + size) for start, size in zip(corner, patterns.shape, strict=True))
        patterns |= mask[window].astype(np.uint8) << bit
    return patterns


def _distances(start: np.ndarray, goal: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each element of a surface to the nearest one of another, in the order of the array."""
    apart = ~goal[start]
    distances = np.zeros(apart.size)
    if apart.any():
        tree = KDTree(np.argwhere(goal) * spacing)
        distances[apart], _ = tree.query(np.argwhere(start & ~goal) * spacing)
    return distances


def _percentile(distances: np.ndarray, areas: np.ndarray) -> float:
    """The smallest distance within which 95% of the area lie."""
    order = np.argsort(distances, kind="stable")
    within = np.cumsum(areas[order])
    return distances[order][np.searchsorted(within, _SHARE * within[-1])]
