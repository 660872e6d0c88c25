"""GL-MAE's views: boxes of random scale, resized to a fixed size, and their masks (docs/methods.md, "GL-MAE")."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.training.views import Augmentation, Volume, draw_corner, seeded_globals

# voxels of one channel that are read at once: 16 MB, so that memory does not grow with the volume
SLAB_VOXELS = 4_000_000


@dataclass(frozen=True)
class ResizedCrop:
    """A box whose edges are one random share of the volume's edges, resized to `size`, and a permutation of its tokens.

    The share is the same for all three axes, as published ("edge scale"): a volume that is not a cube is squeezed into
    one. The box lies anywhere in the volume, never outside, so that nothing is padded.

    Args:
        size: (D, H, W) voxels of the view.
        num_tokens: of the view.
        scale: smallest and largest share.
        augmentation: None, as published, or that of the other methods, applied to the resized view.
    """

    size: tuple[int, int, int]
    num_tokens: int
    scale: tuple[float, float]
    augmentation: Augmentation | None = None

    def draw(self, volume: Volume, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """View (C, *size) float32 and token permutation (N,) int64."""
        share = rng.uniform(*self.scale)
        box = [max(1, round(share * s)) for s in volume.shape]
        image = read_resized(volume, draw_corner(volume, box, 0.0, rng), box, self.size)
        if self.augmentation is not None:
            spacing = [mm * b / s for mm, b, s in zip(volume.spacing_mm, box, self.size, strict=True)]
            transform = self.augmentation.transform(self.size, spacing)
            with seeded_globals(int(rng.integers(2**31))):
                image = transform(image=image)["image"].contiguous()
        return image, torch.from_numpy(rng.permutation(self.num_tokens))


@dataclass(frozen=True)
class GlobalLocalCrops:
    """Several global and several local views of one volume.

    Gives "global" (g, C, *size) float32 and "global_ids_shuffle" (g, N) int64, and the same of "local".
    """

    global_crop: ResizedCrop
    local_crop: ResizedCrop
    global_views: int
    local_views: int

    @property
    def padded_below(self) -> tuple[int, int, int]:
        """One voxel: boxes shrink with the volume, none is too small for them."""
        return (1, 1, 1)

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """One sample of a volume."""
        sample = {}
        groups = {"global": (self.global_crop, self.global_views), "local": (self.local_crop, self.local_views)}
        for name, (crop, count) in groups.items():
            images, shuffles = zip(*(crop.draw(volume, rng) for _ in range(count)), strict=True)
            sample |= {name: torch.stack(images), f"{name}_ids_shuffle": torch.stack(shuffles)}
        return sample


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
