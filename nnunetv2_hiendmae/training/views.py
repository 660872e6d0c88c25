"""What a worker cuts out of a volume for one sample: crop, augmentation and masks. A stateless source: sample i of step
s is a function of (seed, s, i)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from typing import Protocol

import numpy as np
import torch
from batchgeneratorsv2.helpers.scalar_type import sample_scalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.randomness import seeded_globals

# voxels tried before a crop is taken anywhere: a volume in which fewer than one in a hundred is foreground
# is then still centred on it in two cases of three
FOREGROUND_TRIES = 100
# voxels of one channel that are read at once: 16 MB, so that memory does not grow with the volume
SLAB_VOXELS = 4_000_000


class Volume(Protocol):
    """A preprocessed case that is read in parts (see `volumes.CaseVolume`)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def read(self, lower: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """(C, *size) float32 from corner `lower`, the channel's smallest value outside the volume."""

    def read_stored(self, lower: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box (C, *size) inside the volume, in the precision in which it is stored."""

    def is_foreground(self, voxel: Sequence[int]) -> bool:
        """Whether a voxel (D, H, W) is above the lower bound of the intensity window."""


class Views(Protocol):
    """Draws one sample from a volume."""

    @property
    def padded_below(self) -> tuple[int, int, int]:
        """Voxels (D, H, W); along an axis that is shorter a volume is padded."""

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Tensors of one sample; everything random comes from `rng`."""


def unaugmented(views: Views) -> Views:
    """The views as they would be without augmentation, those that they are made of too."""
    return _with(views, "augmentation", None)


def unresized(views: Views) -> Views:
    """The views as workers draw them for a device that resizes their boxes itself; others as they are."""
    return _with(views, "resized", False)


def _with(views: Views, field_name: str, value: object) -> Views:
    """With another value of a field, wherever they and those that they are made of have it."""
    if not is_dataclass(views):
        return views
    inner = {f.name: _with(getattr(views, f.name), field_name, value) for f in fields(views)}
    return replace(views, **{k: value if k == field_name else v for k, v in inner.items()})


class ShiftIntensityTransform(ImageOnlyTransform):
    """Adds one value, uniform in `offset_range`, to all channels."""

    def __init__(self, offset_range: tuple[float, float]):
        super().__init__()
        self.offset_range = offset_range

    def get_parameters(self, **data_dict) -> dict:
        return {"offset": float(sample_scalar(self.offset_range))}

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        return img.add_(params["offset"])


@dataclass(frozen=True)
class Augmentation:
    """Flips, in-plane quarter turns, intensity scale and shift, with Hi-End-MAE's probabilities (docs/methods.md,
    "Shared building blocks").

    Args:
        p_rotate: of a turn by 90°, 180° or 270° in the plane of the last two axes.
        scale: factor 1 ± this; shift: ± this, in units of the normalised image.
    """

    p_rotate: float = 0.3
    p_scale: float = 0.1
    scale: float = 0.1
    p_shift: float = 0.1
    shift: float = 0.1

    def transform(self, crop_size: Sequence[int], spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> BasicTransform:
        """The batchgeneratorsv2 pipeline for crops of a size; draws from the global generators."""
        # a quarter turn would change the shape of a crop that is not square, and squeeze one whose voxels are not
        square = crop_size[1] == crop_size[2] and math.isclose(spacing_mm[1], spacing_mm[2], rel_tol=0.05)
        turns = (1, 2, 3) if square else (2,)
        return _pipeline(self, turns)

    def apply(
        self,
        images: Tensor,
        spacing_mm: Sequence[float],
        rng: np.random.Generator,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Crops (n, C, D, H, W), each changed in its own way, by one number of `rng`. `size`: (D, H, W) that they are
        resized to afterwards, which decides how they may turn; resizing and all that is done here commute."""
        transform = self.transform(size or images.shape[2:], spacing_mm)
        with seeded_globals(int(rng.integers(2**31))):
            return torch.stack([transform(image=image)["image"] for image in images])


@lru_cache
def _pipeline(augmentation: Augmentation, turns: tuple[int, ...]) -> BasicTransform:
    """Built once per process: it holds no state, and every sample needs it."""
    low, high = 1 - augmentation.scale, 1 + augmentation.scale
    brightness = MultiplicativeBrightnessTransform((low, high), synchronize_channels=True)
    shift = ShiftIntensityTransform((-augmentation.shift, augmentation.shift))
    return ComposeTransforms(
        [
            MirrorTransform((0, 1, 2)),
            RandomTransform(Rot90Transform(1, turns, allowed_axes={1, 2}), augmentation.p_rotate),
            RandomTransform(brightness, augmentation.p_scale),
            RandomTransform(shift, augmentation.p_shift),
        ]
    )


@dataclass(frozen=True)
class Crop:
    """One augmented crop.

    Gives "image" (C, D, H, W) float32, and "lower" (3,) int64: the crop's corner in the volume.

    Args:
        foreground_share: of crops that are centred on foreground, the others lie anywhere (Hi-End-MAE: 3:1).
        augmentation: None turns it off.
    """

    crop_size: tuple[int, int, int]
    _: KW_ONLY
    foreground_share: float = 0.75
    augmentation: Augmentation | None = field(default_factory=Augmentation)

    @property
    def padded_below(self) -> tuple[int, int, int]:
        """The crop, (D, H, W) voxels."""
        return self.crop_size

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """One sample of a volume."""
        lower = draw_corner(volume, self.crop_size, self.foreground_share, rng)
        image = torch.from_numpy(volume.read(lower, self.crop_size))
        if self.augmentation is not None:
            image = self.augmentation.apply(image[None], volume.spacing_mm, rng)[0]
        return {"image": image, "lower": torch.tensor(lower)}


@dataclass(frozen=True)
class MaskedCrop(Crop):
    """A crop and "ids_shuffle" (N,) int64, a random permutation of its tokens, of which the first K are visible."""

    num_tokens: int

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        sample = super().draw(volume, rng)
        return {**sample, "ids_shuffle": torch.from_numpy(rng.permutation(self.num_tokens))}


def step_keys(
    steps: range, batch_size: int, accumulate: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Keys of every micro-batch of one process.

    The samples of a step are numbered over the whole global batch, so that its content depends neither on the
    number of processes nor on the number of accumulated micro-batches.
    """
    micro_batch = batch_size // (accumulate * world_size)
    for step in steps:
        for part in range(accumulate):
            start = (part * world_size + rank) * micro_batch
            yield [(step, start + i) for i in range(micro_batch)]


def draw_corner(
    volume: Volume, crop_size: Sequence[int], foreground_share: float, rng: np.random.Generator
) -> list[int]:
    """Lower corner (D, H, W) of a random crop that lies inside the volume wherever the volume is large enough;
    along a shorter axis the volume sits in the middle of the crop.

    A foreground centre is found by trying random voxels, which draws uniformly from the foreground without
    an index of it and reads a single compressed block per try.
    """
    slack = [s - c for s, c in zip(volume.shape, crop_size, strict=True)]
    centre = _draw_foreground(volume, rng) if rng.random() < foreground_share else None
    corner = []
    for axis, room in enumerate(slack):
        if room <= 0:
            corner.append(-(-room // 2))
        elif centre is None:
            corner.append(int(rng.integers(room + 1)))
        else:
            corner.append(min(max(centre[axis] - crop_size[axis] // 2, 0), room))
    return corner


def grid_corners(shape: Sequence[int], size: Sequence[int], most: float = math.inf) -> list[tuple[int, ...]]:
    """Lower corners (D, H, W) of crops spread evenly over a volume, at most `most`, and as few as cover it.

    The axis whose crops lie farthest apart, in crop edges, gets another one as long as that leaves gaps along it.
    A single crop lies in the middle; along an axis shorter than the crop, the volume does.
    """
    counts = [1] * len(shape)
    while True:
        gaps = [s / (k * c) for s, c, k in zip(shape, size, counts, strict=True)]
        axis = int(np.argmax(gaps))
        if gaps[axis] <= 1 or math.prod(counts) // counts[axis] * (counts[axis] + 1) > most:
            break
        counts[axis] += 1
    return list(product(*(_positions(s - c, k) for s, c, k in zip(shape, size, counts, strict=True))))


def _positions(room: int, count: int) -> list[int]:
    if count == 1:
        return [-(-room // 2)]
    return [round(i * room / (count - 1)) for i in range(count)]


def _draw_foreground(volume: Volume, rng: np.random.Generator) -> list[int] | None:
    for _ in range(FOREGROUND_TRIES):
        voxel = [int(rng.integers(s)) for s in volume.shape]
        if volume.is_foreground(voxel):
            return voxel
    return None


def read_resized(volume: Volume, lower: Sequence[int], box: Sequence[int], size: Sequence[int]) -> Tensor:
    """The box (D, H, W) from corner `lower`, resized to (C, *size): trilinear, anti-aliased where it shrinks.

    Voxel centres keep their places (align_corners=False). Anti-aliasing (ours) widens the interpolation's triangle by
    the factor of shrinking: every voxel counts, where plain trilinear interpolation would pick two of them per axis and
    turn fine structures and noise into patterns that depend on the box. The box is read slab by slab.

    The result does not depend on the number of threads, so that it is the same in workers and without them.
    """
    depth = axis_weights(box[0], size[0])
    resized = None
    for start, stop in _slabs(box):
        slab = volume.read([lower[0] + start, *lower[1:]], [stop - start, *box[1:]])
        # slices as channels: resized in plane
        slices = F.interpolate(torch.from_numpy(slab), tuple(size[1:]), mode="bilinear", antialias=True)
        if resized is None:
            resized = slices.new_zeros(len(slab), *size)
        # few weights per row are not zero, and a matrix product may sum in an order that depends on the threads
        for row, column in depth[:, start:stop].nonzero().tolist():
            resized[:, row].add_(slices[:, column], alpha=depth[row, start + column].item())
    return resized


def resize_box(box: Tensor, size: Sequence[int]) -> Tensor:
    """A whole box (C, D, H, W) of any precision → (C, *size) float32, as `read_resized` but on the box's device: to
    rounding, since the order of sums differs."""
    slices = F.interpolate(box.float().contiguous(), tuple(size[1:]), mode="bilinear", antialias=True)
    # rows as width, whose weights are 1 and 0: no matrix product, which autocast or TF32 would round
    rows = slices.flatten(2)[:, None]
    return F.interpolate(rows, (size[0], rows.shape[3]), mode="bilinear", antialias=True)[:, 0].unflatten(2, size[1:])


def axis_weights(source: int, target: int) -> Tensor:
    """Weights (target, source) that resize one axis, rows sum to 1: the same rule that is applied in plane."""
    columns = torch.eye(source)[None, None]
    return F.interpolate(columns, (target, source), mode="bilinear", antialias=True)[0, 0]


def _slabs(box: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last slice of slabs of equal depth that hold at most `SLAB_VOXELS` each, one slice at least."""
    thickest = max(1, SLAB_VOXELS // (box[1] * box[2]))
    count = -(-box[0] // thickest)
    cuts = [box[0] * i // count for i in range(count + 1)]
    yield from pairwise(cuts)
