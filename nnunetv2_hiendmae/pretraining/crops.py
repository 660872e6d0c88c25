"""What workers draw for methods of several views: MiM's nested crops and GL-MAE's boxes of random scale, resized to a
fixed size, with their masks (docs/methods.md, "MiM" and "GL-MAE")."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.training.views import Augmentation, Volume, draw_corner, read_resized

OCTANTS = 8
# times the voxels of the view that it becomes; of larger boxes workers send the view
LARGEST_BOX = 4


def octant_tokens(grid: Sequence[int]) -> Tensor:
    """Token numbers (8, N / 8) of the 2×2×2 octants of a grid; octants and tokens in raster order.

    Raises:
        UserError: an axis of the grid is odd.
    """
    if any(g % 2 for g in grid):
        raise UserError(
            f"the grid of {tuple(grid)} tokens has an odd axis, needed even ones to divide it into octants; choose "
            "--crop-size as a multiple of twice the patch"
        )
    return block_tokens(grid, [g // 2 for g in grid])


def block_tokens(grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Token numbers (blocks, tokens of one) of a grid that is divided into blocks of `size` tokens; both in raster
    order."""
    blocks = math.prod(g // s for g, s in zip(grid, size, strict=True))
    numbers = torch.arange(math.prod(grid)).reshape(1, 1, *grid)
    return cut_blocks(numbers, torch.arange(blocks)[None], size).flatten(2)[0]


def cut_blocks(images: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """Blocks `index` (B, K) of images (B, C, D, H, W) → (B, K, C, *size).

    The image is divided into blocks of `size` voxels, numbered in raster order; only the chosen ones are copied.
    """
    b, c, *shape = images.shape
    (pd, ph, pw), (gd, gh, gw) = size, (s // p for s, p in zip(shape, size, strict=True))
    blocks = images.reshape(b, c, gd, pd, gh, ph, gw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    rows = torch.arange(b, device=index.device)[:, None]
    return blocks[rows, index // (gh * gw), index // gw % gh, index % gw]


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """(M, C, D, H, W) → (M, C, *size), trilinear (align_corners=False).

    Halving averages 2×2×2 voxels and therefore mixes no two patches.
    """
    return F.interpolate(images, size=tuple(size), mode="trilinear", align_corners=False)


@dataclass(frozen=True)
class NestedCrops:
    """A crop of twice the encoder's edge, its octants at full resolution, and masks for all three levels.

    Gives
        "level1" (C, *crop) float32: the whole crop, halved; "ids_shuffle1" (N,): visible octants first;
        "level2" (V2, C, *crop): masked octants "octants" (V2,) of it; "ids_shuffle2" (V2, N);
        "patches" (V2, V3): masked tokens of each level-2 crop, which are level 3; "ids_shuffle3" (V2, V3, N).
    These are token permutations, visible tokens first. Level-3 patches are enlarged by the method: they are voxels of
    level 2 already, and enlarged ones would be three quarters of what a worker sends.

    Args:
        crop_size: the encoder's, (D, H, W) voxels.
        grid: tokens of that crop per axis, all even.
        visible_octants: octants of level 1 that are not masked.
        visible_level2: visible tokens of a level-2 crop.
        crops_level2, crops_level3: V2 per crop, V3 per level-2 crop.
        foreground_share: of crops that are centred on foreground. Ours is none: with MiM's window, lower bound
            -1000 HU, almost every voxel of a body and of the noise around it would count.
    """

    crop_size: tuple[int, int, int]
    grid: tuple[int, int, int]
    visible_octants: int
    visible_level2: int
    crops_level2: int
    crops_level3: int
    foreground_share: float = 0.0

    @property
    def padded_below(self) -> tuple[int, int, int]:
        """Edges (D, H, W) of the level-1 crop in voxels of the volume."""
        return tuple(2 * s for s in self.crop_size)

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """One sample of a volume."""
        size = self.padded_below
        lower = draw_corner(volume, size, self.foreground_share, rng)
        whole = torch.from_numpy(volume.read(lower, size))[None]
        tokens, shuffled = octant_tokens(self.grid), torch.from_numpy(rng.permutation(OCTANTS))
        octants = shuffled[self.visible_octants :][: self.crops_level2]
        ids_shuffle2 = self._shuffles(rng, self.crops_level2)
        ids_shuffle3 = self._shuffles(rng, self.crops_level2 * self.crops_level3)
        return {
            "level1": resize(whole, self.crop_size)[0],
            "ids_shuffle1": tokens[shuffled].flatten(),
            "level2": cut_blocks(whole, octants[None], self.crop_size)[0],
            "ids_shuffle2": ids_shuffle2,
            "octants": octants,
            # the first masked tokens of a random permutation: a random choice among them
            "patches": ids_shuffle2[:, self.visible_level2 :][:, : self.crops_level3].contiguous(),
            "ids_shuffle3": ids_shuffle3.unflatten(0, (self.crops_level2, self.crops_level3)),
        }

    def _shuffles(self, rng: np.random.Generator, count: int) -> Tensor:
        tokens = math.prod(self.grid)
        return torch.from_numpy(np.stack([rng.permutation(tokens) for _ in range(count)]))


class Box(NamedTuple):
    """A part of a volume: its lower corner and its edges, (D, H, W) voxels."""

    lower: tuple[int, ...]
    size: tuple[int, ...]


def read_boxes(volume: Volume, boxes: Sequence[Box]) -> list[Tensor]:
    """Boxes (C, *size) in the precision in which they are stored. Where the smallest box around all of them has fewer
    voxels than they, it is read once, and they are parts of its memory."""
    lower = [min(box.lower[a] for box in boxes) for a in range(3)]
    around = [max(box.lower[a] + box.size[a] for box in boxes) - lower[a] for a in range(3)]
    if math.prod(around) > sum(math.prod(box.size) for box in boxes):
        return [volume.read_stored(*box) for box in boxes]
    whole = volume.read_stored(lower, around)
    starts = [[a - b for a, b in zip(box.lower, lower, strict=True)] for box in boxes]
    return [
        whole[(slice(None), *(slice(a, a + s) for a, s in zip(start, box.size, strict=True)))]
        for start, box in zip(starts, boxes, strict=True)
    ]


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
        resized: False gives the box, for a device that resizes it (`views.resize_box`) to the same view; one far larger
            than the view is resized all the same, so that memory does not grow with volumes.
    """

    size: tuple[int, int, int]
    num_tokens: int
    scale: tuple[float, float]
    augmentation: Augmentation | None = None
    resized: bool = True

    def draw(self, volume: Volume, rng: np.random.Generator) -> tuple[Tensor | Box, Tensor]:
        """View (C, *size) float32, or its box, changed or yet to be read, and token permutation (N,) int64."""
        share = rng.uniform(*self.scale)
        box = [max(1, round(share * s)) for s in volume.shape]
        lower = draw_corner(volume, box, 0.0, rng)
        if self.resized or math.prod(box) > LARGEST_BOX * math.prod(self.size):
            image = read_resized(volume, lower, box, self.size)
        elif self.augmentation is None:
            image = Box(tuple(lower), tuple(box))
        else:
            image = torch.from_numpy(volume.read(lower, box))
        if self.augmentation is not None:
            spacing = [mm * b / s for mm, b, s in zip(volume.spacing_mm, box, self.size, strict=True)]
            image = self.augmentation.apply(image[None], spacing, rng, self.size)[0]
        return image, torch.from_numpy(rng.permutation(self.num_tokens))


@dataclass(frozen=True)
class GlobalLocalCrops:
    """Several global and several local views of one volume.

    Gives "global" (g, C, *size) float32 and "global_ids_shuffle" (g, N) int64, and the same of "local"; where crops are
    not resized, the list "boxes" of g + l boxes (C, D, H, W) in place of the views.
    """

    global_crop: ResizedCrop
    local_crop: ResizedCrop
    global_views: int
    local_views: int

    # boxes shrink with the volume, none is too small for them
    padded_below: ClassVar[tuple[int, int, int]] = (1, 1, 1)

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor | list[Tensor]]:
        """One sample of a volume."""
        sample, drawn = {}, []
        groups = {"global": (self.global_crop, self.global_views), "local": (self.local_crop, self.local_views)}
        for name, (crop, count) in groups.items():
            images, shuffles = zip(*(crop.draw(volume, rng) for _ in range(count)), strict=True)
            sample[f"{name}_ids_shuffle"] = torch.stack(shuffles)
            if crop.resized:
                sample[name] = torch.stack(images)
            else:
                drawn += images
        if drawn:
            boxes = [image for image in drawn if isinstance(image, Box)]
            read = iter(read_boxes(volume, boxes) if boxes else ())
            sample["boxes"] = [next(read) if isinstance(image, Box) else image for image in drawn]
        return sample
