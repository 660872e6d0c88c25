"""Where the voxels of arrays lie in the world."""

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.training.volumes import Case

# LPS, as ITK counts, to NIfTI's RAS
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# file axes are x, y, z, array axes D, H, W: columns of an affine in the other order
REVERSED = [2, 1, 0, 3]
# of a voxel, at the edge of a box: so that rounding in affines does not decide what lies inside
TOLERANCE = 1e-4
logger = logging.getLogger(__name__)

_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie.

    Args:
        shape: (D, H, W).
        affine: (4, 4), from array index (d, h, w, 1) to the world (x, y, z, 1) in mm as NIfTI has it: x grows to
            the patient's right, y to the front, z to the head.
        in_world: False where the image's format has no place in the world (TIFF): then only distances are true.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    in_world: bool = True

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along D, H, W."""
        return tuple(voxel_sizes(self.affine).tolist())

    @property
    def edges(self) -> str:
        """What lies at the top, bottom, left and right of a slice (H, W), as nearly as one letter each can say: "APRL"
        for front, back, right and left. Empty where nobody knows."""
        _, down, right = aff2axcodes(self.affine)
        return _OPPOSITE[down] + down + _OPPOSITE[right] + right if self.in_world else ""

    def to_world(self, index: Sequence[float]) -> np.ndarray:
        """World position (x, y, z) in mm of an array index, which may be fractional."""
        return self.affine[:3, :3] @ np.asarray(index, float) + self.affine[:3, 3]

    def to_index(self, point: Sequence[float]) -> np.ndarray:
        """Fractional array index (d, h, w) of a world position in mm."""
        return np.linalg.solve(self.affine[:3, :3], np.asarray(point, float) - self.affine[:3, 3])

    def cropped(self, lower: Sequence[int], shape: Sequence[int]) -> "Grid":
        """Grid of `array[lower : lower + shape]`; may reach beyond this one."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(lower)
        return replace(self, shape=tuple(int(s) for s in shape), affine=affine)

    def resized(self, shape: Sequence[int]) -> "Grid":
        """The same box divided into another number of voxels, as nnU-Net's resampling does (align_corners=False)."""
        scale = np.array(self.shape) / np.array(shape)
        affine = self.affine.copy()
        affine[:3, :3] *= scale
        affine[:3, 3] = self.to_world((scale - 1) / 2)
        return replace(self, shape=tuple(int(s) for s in shape), affine=affine)

    def turn_to(self, axes: str) -> np.ndarray:
        """The turn (nibabel's orientation transform) after which D, H, W grow towards `axes`, e.g. "SPL"; for oblique
        grids as nearly as permuting and flipping can."""
        return ornt_transform(io_orientation(self.affine), axcodes2ornt(tuple(axes)))

    def turned(self, change: np.ndarray) -> "Grid":
        """The same voxels with axes permuted and flipped by nibabel's orientation transform `change`; arrays by its
        `apply_orientation`."""
        # per new axis the old one
        old = np.argsort(change[:, 0])
        shape = tuple(self.shape[axis] for axis in old)
        return replace(self, shape=shape, affine=self.affine @ inv_ornt_aff(change, self.shape))

    def covered(self, box: "Grid", margin: float = 0.0) -> tuple[slice, ...]:
        """Part that the box of a parallel grid covers, widened on every side by `margin` of its extent."""
        found = []
        for step, start, size, count in zip(*steps_between(box, self), box.shape, self.shape, strict=True):
            at, beyond = start + step * np.arange(count), 0.5 + TOLERANCE + margin * size
            inside = (at > -beyond) & (at < size - 1 + beyond)
            first = int(inside.argmax())
            found.append(slice(first, first + int(inside.sum())))
        return tuple(found)


def steps_between(source: Grid, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Per axis, in voxels of the source: from one voxel of the target to the next, and where the first one lies."""
    matrix = np.linalg.inv(source.affine) @ target.affine
    steps = matrix[:3, :3].diagonal()
    if not np.allclose(matrix[:3, :3], np.diag(steps), atol=1e-3 * np.abs(steps).max()):
        raise ValueError("the grids are not parallel")
    return steps, matrix[:3, 3]


def case_grid(case: Case) -> Grid:
    """Grid of a preprocessed case.

    Raises:
        UserError: what nnU-Net recorded beside the case is missing, damaged or incomplete.
    """
    record = case.path.with_suffix(".pkl")
    try:
        *_, properties = nnUNetDatasetBlosc2(str(case.path.parent), [case.path.stem]).load_case(case.path.stem)
        return preprocessed_grid(properties, case.shape)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(
            f"{record} does not say where case {case.name} lies ({type(e).__name__}: {e}); delete the case's files and "
            "preprocess again"
        ) from e


def case_edges(case: Case) -> str:
    """`Grid.edges` of a preprocessed case; empty too where nothing usable is recorded beside it."""
    try:
        return case_grid(case).edges
    except UserError:
        return ""


def warn_if_turned(cases: Sequence[Case]) -> None:
    """Says so where the volumes of several datasets lie in different directions; looks at the first of each."""
    found: dict[str, list[str]] = {}
    firsts = {case.name.partition("/")[0]: case for case in reversed(cases)}
    for name, case in sorted(firsts.items()):
        try:
            grid = case_grid(case)
        except UserError:
            continue
        if grid.in_world:
            found.setdefault("".join(aff2axcodes(grid.affine)), []).append(name)
    if len(found) > 1:
        told = ", ".join(f"{some(names)} {axes}" for axes, names in found.items())
        mend = "hiendmae preprocess turns them to the same where it gets all datasets in one command (with another -p)"
        logger.warning(f"volumes lie in different directions (D, H, W): {told}; {mend}")


def reader_grid(properties: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    """Grid of an array (D, H, W) that one of nnU-Net's readers made, from what it recorded.

    A format without a place in the world (TIFF) starts at its origin.
    """
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        axes = len(stuff["spacing"])
        # of a 4D file, whose last axis holds the channels, the first three
        steps = np.reshape(stuff["direction"], (axes, axes))[:3, :3] * np.array(stuff["spacing"])[:3]
        affine = LPS_TO_RAS @ from_matvec(steps, stuff["origin"][:3])
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.array(stuff.get("reoriented_affine", stuff["original_affine"]), float)
    else:
        affine = np.diag([*reversed(properties["spacing"]), 1.0])
    known = "sitk_stuff" in properties or "nibabel_stuff" in properties
    return Grid(tuple(int(s) for s in shape), affine[:, REVERSED], known)


def preprocessed_grid(properties: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    """Grid of a preprocessed array (D, H, W): nnU-Net cuts off the empty border, then resamples.

    Plans that transpose the axes are not for us (`find_data` refuses them). The spacing differs a little from the
    plans': the box is divided into a whole number of voxels.
    """
    before = reader_grid(properties, properties["shape_before_cropping"])
    lower = [int(a) for a, _ in properties["bbox_used_for_cropping"]]
    return before.cropped(lower, properties["shape_after_cropping_and_before_resampling"]).resized(shape)
