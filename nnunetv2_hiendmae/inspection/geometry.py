"""Voxel grids in the world: cutting, resizing and turning arrays without losing where they lie."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from nnunetv2_hiendmae.files import write_with


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie.

    Args:
        shape: (D, H, W).
        affine: (4, 4), from array index (d, h, w, 1) to the world (x, y, z, 1) in mm as NIfTI has it: x grows to
            the patient's right, y to the front, z to the head.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along D, H, W."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def to_world(self, index: Sequence[float]) -> np.ndarray:
        """World position (x, y, z) in mm of an array index, which may be fractional."""
        return self.affine[:3, :3] @ np.asarray(index, float) + self.affine[:3, 3]

    def to_index(self, point: Sequence[float]) -> np.ndarray:
        """Fractional array index (d, h, w) of a world position in mm."""
        return np.linalg.solve(self.affine[:3, :3], np.asarray(point, float) - self.affine[:3, 3])

    def nearest(self, point: Sequence[float]) -> tuple[int, int, int] | None:
        """Index of the voxel that a world position lies in, None outside the grid."""
        index = np.floor(self.to_index(point) + 0.5).astype(int)
        inside = all(0 <= i < s for i, s in zip(index, self.shape, strict=True))
        return tuple(int(i) for i in index) if inside else None

    def cropped(self, lower: Sequence[int], shape: Sequence[int]) -> "Grid":
        """Grid of `array[lower : lower + shape]`; may reach beyond this one."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(lower)
        return Grid(tuple(int(s) for s in shape), affine)

    def resized(self, shape: Sequence[int]) -> "Grid":
        """The same box divided into another number of voxels, as nnU-Net's resampling does (align_corners=False)."""
        scale = np.array(self.shape) / np.array(shape)
        affine = self.affine.copy()
        affine[:3, :3] *= scale
        affine[:3, 3] = self.to_world((scale - 1) / 2)
        return Grid(tuple(int(s) for s in shape), affine)

    def turn_to(self, axes: str) -> np.ndarray:
        """The turn (nibabel's orientation transform) after which D, H, W grow towards `axes`, e.g. "SPL"; for oblique
        grids as nearly as permuting and flipping can."""
        return ornt_transform(io_orientation(self.affine), axcodes2ornt(tuple(axes)))

    def turned(self, change: np.ndarray) -> "Grid":
        """The same voxels with axes permuted and flipped by nibabel's orientation transform `change`; arrays by its
        `apply_orientation`."""
        shape = [0, 0, 0]
        for axis, (target, _) in enumerate(change):
            shape[int(target)] = self.shape[axis]
        return Grid(tuple(shape), self.affine @ inv_ornt_aff(change, self.shape))


def resample(values: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Values (d, h, w) of one grid on another whose axes are parallel to it, linear between voxel centres.

    Up to the edge of the source's box its outermost values hold, outside it is zero.
    """
    weights = []
    for size, coordinates in zip(source.shape, _coordinates(source, target), strict=True):
        nearest = coordinates.clip(0, size - 1)[:, None]
        rows = (1 - np.abs(nearest - np.arange(size))).clip(0)
        rows[~_inside(coordinates, size)] = 0
        weights.append(rows.astype(np.float32))
    return np.einsum("ad,bh,cw,dhw->abc", *weights, values.astype(np.float32), optimize=True)


def covered(source: Grid, target: Grid, margin: float = 0.0) -> tuple[slice, ...]:
    """Part of the target that the source's box covers, widened on every side by `margin` of its extent."""
    found = []
    for size, coordinates in zip(source.shape, _coordinates(source, target), strict=True):
        inside = _inside(coordinates, size, margin * size)
        start = int(inside.argmax())
        found.append(slice(start, start + int(inside.sum())))
    return tuple(found)


def write_nifti(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Writes an array (D, H, W) as float32 `.nii.gz` at its place in the world, in one step.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    # file axes are x, y, z: ours reversed
    affine = grid.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.T, dtype=np.float32), affine)
    for put in (image.set_sform, image.set_qform):
        put(affine, code="scanner")
    # without a time stamp: the same picture is the same file
    write_with(path, lambda temporary: temporary.write_bytes(gzip.compress(image.to_bytes(), 5, mtime=0)))


def _coordinates(source: Grid, target: Grid) -> list[np.ndarray]:
    """Per axis: the target's voxels as fractional indices of the source.

    Raises:
        ValueError: the axes are not parallel.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    steps = matrix[:3, :3].diagonal()
    if not np.allclose(matrix[:3, :3], np.diag(steps), atol=1e-3 * np.abs(steps).max()):
        raise ValueError("the grids are not parallel")
    return [matrix[axis, 3] + steps[axis] * np.arange(target.shape[axis]) for axis in range(3)]


def _inside(coordinates: np.ndarray, size: int, margin: float = 0.0) -> np.ndarray:
    # a hair's breadth of tolerance, so that rounding in the affines does not decide
    return (coordinates > -0.5001 - margin) & (coordinates < size - 0.4999 + margin)
