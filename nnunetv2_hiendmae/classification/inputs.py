"""Volumes as inputs of a classifier. Those of training are a function of (seed, epoch, case)."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import ANTIALIASED, CROPS, RESIZE
from nnunetv2_hiendmae.training.views import Augmentation, Volume, draw_corner, grid_corners, read_resized
from nnunetv2_hiendmae.training.volumes import CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat, twins

logger = logging.getLogger(__name__)

# of the random crops; 3:1, as in pretraining
FOREGROUND_SHARE = 0.75
# relative difference of spacing or intensities that no warning is worth
TOLERATED = 0.01


@dataclass(frozen=True)
class Inputs:
    """How a volume becomes images (n, C, *size) of the encoder's size.

    Args:
        mode: "antialiased": the whole volume, n = 1, every voxel counts; "resize": the same without anti-aliasing, as
            0.1 did; "crops": random ones in training, a regular grid in prediction.
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
        if self.mode not in (ANTIALIASED, RESIZE, CROPS):
            raise UserError(f"inputs '{self.mode}' are unknown, needed {ANTIALIASED}, {RESIZE} or {CROPS}")
        if self.crops < 1:
            raise UserError(f"--crops is {self.crops}, needed at least 1")
        if self.whole and self.crops > 1:
            raise UserError(f"--crops {self.crops} with --input {RESIZE}, which has one input; add --input {CROPS}")

    @property
    def whole(self) -> bool:
        """Whether the input is the whole volume, resized."""
        return self.mode != CROPS

    def draw(self, volume: Volume, rng: np.random.Generator, augment: bool) -> dict[str, Tensor]:
        """Inputs for training, "image" (n, C, *size); everything random comes from `rng`."""
        if self.whole:
            images = self._resized(volume)[None]
            spacing = [s * n / m for s, n, m in zip(volume.spacing_mm, volume.shape, self.size, strict=True)]
        else:
            corners = [draw_corner(volume, self.size, FOREGROUND_SHARE, rng) for _ in range(self.crops)]
            images, spacing = self._cut(volume, corners), volume.spacing_mm
        if augment:
            images = Augmentation().apply(images, spacing, rng)
        return {"image": images}

    def regular(self, volume: Volume, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Inputs for prediction, "image" (n, C, *size); nothing random."""
        if self.whole:
            return {"image": self._resized(volume)[None]}
        return {"image": self._cut(volume, grid_corners(volume.shape, self.size, self.crops))}

    def _resized(self, volume: Volume) -> Tensor:
        if self.mode == ANTIALIASED:
            return read_resized(volume, (0, 0, 0), volume.shape, self.size)
        whole = torch.from_numpy(volume.read((0, 0, 0), volume.shape))
        return F.interpolate(whole[None], size=self.size, mode="trilinear", align_corners=False)[0]

    def _cut(self, volume: Volume, corners: Iterable[Sequence[int]]) -> Tensor:
        return torch.stack([torch.from_numpy(volume.read(corner, self.size)) for corner in corners])


def forward_work(network: nn.Module, inputs: Inputs) -> float:
    """Floating-point operations that a case takes, roughly: two per parameter and token."""
    tokens = math.prod(inputs.size) / math.prod(network.encoder.spec.patch_size)
    return 2 * sum(p.numel() for p in network.parameters()) * tokens * inputs.crops


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
        (
            "z-score of the voxels that are not 0 alone",
            any(seen.use_mask_for_norm) if seen.use_mask_for_norm else None,
            any(images.use_mask_for_norm),
        ),
        ("reader", seen.image_reader_writer, images.image_reader_writer),
    ):
        numbers = None not in (before, now) and not isinstance(before, str | list)
        close = numbers and np.allclose(before, now, rtol=TOLERATED, atol=0)
        if before is not None and now not in twins(before) and not close:
            logger.warning(f"{what}: the images have {now}, {whose} saw {before}; preprocess them alike")
    if inputs.whole:
        shape = np.median([case.shape for case in data.cases], axis=0)
        spacing = " x ".join(f"{s:.1f}" for s in shape * images.spacing_mm / inputs.size)
        logger.info(f"whole volumes are resized to {inputs.size} voxels: in the median {spacing} mm each")
