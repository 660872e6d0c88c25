"""Volumes as inputs of the classifier. Those of training are a function of (seed, epoch, case)."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import CROPS, RESIZE
from nnunetv2_hiendmae.training.views import Augmentation, Volume, draw_corner, seeded_globals
from nnunetv2_hiendmae.training.volumes import CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

# of the random crops; 3:1, as in pretraining
FOREGROUND_SHARE = 0.75
# relative difference of spacing or intensities that no warning is worth
TOLERATED = 0.01


@dataclass(frozen=True)
class Inputs:
    """How a volume becomes images (n, C, *size) of the encoder's size.

    Args:
        mode: "resize": the whole volume, trilinear, n = 1; "crops": random ones in training, a regular grid in
            prediction.
        size: (D, H, W) in voxels.
        crops: random crops per case and epoch in training, and the most that the grid may have.

    Raises:
        UserError: unknown mode, or no crop.
    """

    mode: str
    size: tuple[int, int, int]
    crops: int = 1

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(self.size))
        if self.mode not in (RESIZE, CROPS):
            raise UserError(f"--input {self.mode} is unknown, needed {RESIZE} or {CROPS}")
        if self.crops < 1:
            raise UserError(f"--crops is {self.crops}, needed at least 1")
        if self.mode == RESIZE and self.crops > 1:
            raise UserError(f"--crops {self.crops} with --input {RESIZE}, which has one input; add --input {CROPS}")

    def draw(self, volume: Volume, rng: np.random.Generator, augment: bool) -> dict[str, Tensor]:
        """Inputs for training, "image" (n, C, *size); everything random comes from `rng`."""
        if self.mode == RESIZE:
            images = self._resized(volume)[None]
            spacing = [s * n / m for s, n, m in zip(volume.spacing_mm, volume.shape, self.size, strict=True)]
        else:
            corners = [draw_corner(volume, self.size, FOREGROUND_SHARE, rng) for _ in range(self.crops)]
            images, spacing = self._cut(volume, corners), volume.spacing_mm
        if augment:
            transform = Augmentation().transform(self.size, spacing)
            with seeded_globals(int(rng.integers(2**31))):
                images = torch.stack([transform(image=image)["image"] for image in images])
        return {"image": images}

    def regular(self, volume: Volume, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Inputs for prediction, "image" (n, C, *size); nothing random."""
        if self.mode == RESIZE:
            return {"image": self._resized(volume)[None]}
        return {"image": self._cut(volume, grid_corners(volume.shape, self.size, self.crops))}

    def _resized(self, volume: Volume) -> Tensor:
        whole = torch.from_numpy(volume.read((0, 0, 0), volume.shape))
        return F.interpolate(whole[None], size=self.size, mode="trilinear", align_corners=False)[0]

    def _cut(self, volume: Volume, corners: Iterable[Sequence[int]]) -> Tensor:
        return torch.stack([torch.from_numpy(volume.read(corner, self.size)) for corner in corners])


def grid_corners(shape: Sequence[int], size: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Lower corners (D, H, W) of crops spread evenly over a volume, at most `most`.

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


def epoch_keys(epochs: range, cases: int, batch_size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Keys of every training batch: each epoch has all cases once, in an order of its own. The last batch of an
    epoch may be smaller."""
    for epoch in epochs:
        # a sample's generator is seeded by its case's index, which is never the number of cases
        order = np.random.default_rng([seed, epoch, cases]).permutation(cases).tolist()
        for start in range(0, cases, batch_size):
            yield [(epoch, index) for index in order[start : start + batch_size]]


def warn_of_differences(data: CaseSet, inputs: Inputs, seen: VolumeFormat, whose: str) -> None:
    """Says so when images were prepared otherwise than those that `whose` weights saw, and how far apart voxels are
    after resizing. What is None was not recorded, or varied."""
    images = data.format
    for what, before, now in (
        ("spacing in mm", seen.spacing_mm, images.spacing_mm),
        ("window in HU", seen.window_hu, images.window_hu),
        ("offset of the intensities", seen.intensity_offset, images.intensity_offset),
        ("scale of the intensities", seen.intensity_scale, images.intensity_scale),
        ("normalisation", sorted(set(seen.normalization_schemes)) or None, sorted(set(images.normalization_schemes))),
        ("reader", seen.image_reader_writer, images.image_reader_writer),
    ):
        if before is not None and not _same(before, now):
            logger.warning(f"{what}: the images have {now}, {whose} saw {before}; preprocess them alike")
    if inputs.mode == RESIZE:
        shape = np.median([case.shape for case in data.cases], axis=0)
        spacing = " x ".join(f"{s:.1f}" for s in shape * images.spacing_mm / inputs.size)
        logger.info(f"whole volumes are resized to {inputs.size} voxels: in the median {spacing} mm each")


def _same(before: Any, now: Any) -> bool:
    numbers = now is not None and not isinstance(before, str | list)
    return before == now or (numbers and np.allclose(before, now, rtol=TOLERATED, atol=0))
