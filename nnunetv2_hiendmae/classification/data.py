"""Preprocessed cases as inputs of the classifier. A training sample is a function of (seed, epoch, case)."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.data import Case, CaseVolume
from nnunetv2_hiendmae.pretraining.views import Augmentation, Volume, draw_corner, seeded_globals
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

RESIZE, CROPS = "resize", "crops"
# of the random crops; METHODS §2: 3:1, as in pretraining
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

    def draw(self, volume: Volume, rng: np.random.Generator, augment: bool) -> Tensor:
        """Inputs for training; everything random comes from `rng`."""
        if self.mode == RESIZE:
            images = [self._resized(volume)]
            spacing = [s * n / m for s, n, m in zip(volume.spacing_mm, volume.shape, self.size, strict=True)]
        else:
            corners = [draw_corner(volume, self.size, FOREGROUND_SHARE, rng) for _ in range(self.crops)]
            images, spacing = [self._crop(volume, corner) for corner in corners], volume.spacing_mm
        if augment:
            transform = Augmentation().transform(self.size, spacing)
            with seeded_globals(int(rng.integers(2**31))):
                images = [transform(image=image)["image"] for image in images]
        return torch.stack(images)

    def regular(self, volume: Volume) -> Tensor:
        """Inputs for prediction; nothing random."""
        if self.mode == RESIZE:
            return self._resized(volume)[None]
        return torch.stack([self._crop(volume, corner) for corner in grid_corners(volume.shape, self.size, self.crops)])

    def _resized(self, volume: Volume) -> Tensor:
        whole = torch.from_numpy(volume.read((0, 0, 0), volume.shape))
        return F.interpolate(whole[None], size=self.size, mode="trilinear", align_corners=False)[0]

    def _crop(self, volume: Volume, corner: Sequence[int]) -> Tensor:
        return torch.from_numpy(volume.read(corner, self.size))


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


class TrainingCases(Dataset):
    """Samples by (epoch, index of the case): "image" (n, C, D, H, W) and "case", its name."""

    def __init__(self, cases: Sequence[Case], volumes: VolumeFormat, inputs: Inputs, seed: int, augment: bool):
        self.cases, self.volumes, self.inputs = cases, volumes, inputs
        self.seed, self.augment = seed, augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, *key])
        case = self.cases[key[1]]
        with _reading(case):
            return {"image": self.inputs.draw(CaseVolume(case, self.volumes), rng, self.augment), "case": case.name}


class RegularCases(Dataset):
    """Samples for prediction by index of the case."""

    def __init__(self, cases: Sequence[Case], volumes: VolumeFormat, inputs: Inputs):
        self.cases, self.volumes, self.inputs = cases, volumes, inputs

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        with _reading(case):
            return {"image": self.inputs.regular(CaseVolume(case, self.volumes)), "case": case.name}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Keys of every training batch: each epoch has all cases once, in an order of its own. The last batch of an
    epoch may be smaller."""

    def __init__(self, cases: int, batch_size: int, first_epoch: int, last_epoch: int, seed: int):
        self.cases, self.batch_size, self.seed = cases, batch_size, seed
        self.epochs = range(first_epoch, last_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.cases / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            # a sample's generator is seeded by its case's index, which is never the number of cases
            order = np.random.default_rng([self.seed, epoch, self.cases]).permutation(self.cases).tolist()
            for start in range(0, self.cases, self.batch_size):
                yield [(epoch, index) for index in order[start : start + self.batch_size]]

    def __len__(self) -> int:
        return len(self.epochs) * self.batches_per_epoch


def batches_of(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's batches; a worker's UserError without the traceback that it arrives with."""
    try:
        yield from loader
    except UserError as e:
        raise UserError(str(e).strip().splitlines()[-1].rpartition("UserError: ")[2]) from e


def warn_of_differences(
    volumes: VolumeFormat, cases: Sequence[Case], inputs: Inputs, seen: VolumeFormat, whose: str
) -> None:
    """Says so when images were prepared otherwise than those that `whose` weights saw, and how far apart voxels are
    after resizing. What is None was not recorded, or varied."""
    for what, before, now in (
        ("spacing in mm", seen.spacing_mm, volumes.spacing_mm),
        ("window in HU", seen.window_hu, volumes.window_hu),
        ("offset of the intensities", seen.intensity_offset, volumes.intensity_offset),
        ("scale of the intensities", seen.intensity_scale, volumes.intensity_scale),
        ("normalisation", sorted(set(seen.normalization_schemes)) or None, sorted(set(volumes.normalization_schemes))),
        ("reader", seen.image_reader_writer, volumes.image_reader_writer),
    ):
        if before is not None and not _same(before, now):
            logger.warning(f"{what}: the images have {now}, {whose} saw {before}; preprocess them alike")
    if inputs.mode == RESIZE:
        shape = np.median([case.shape for case in cases], axis=0)
        spacing = " x ".join(f"{s:.1f}" for s in shape * volumes.spacing_mm / inputs.size)
        logger.info(f"whole volumes are resized to {inputs.size} voxels: in the median {spacing} mm each")


def _same(before: Any, now: Any) -> bool:
    if before == now:
        return True
    numbers = now is not None and not isinstance(before, str | list)
    return numbers and np.allclose(before, now, rtol=TOLERATED, atol=0)


@contextmanager
def _reading(case: Case) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as e:  # what blosc2 raises for a damaged file
        raise UserError(f"cannot read case {case.name} ({e}); delete {case.path} and preprocess again") from e
