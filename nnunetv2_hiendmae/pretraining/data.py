"""Preprocessed nnU-Net cases as a stateless source of samples: sample i of step s is a function of (seed, s, i)."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils.data import DataLoader, Dataset, Sampler

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.plans_section import PLANS_KEY
from nnunetv2_hiendmae.pretraining.views import Views
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

# open files per worker; a file costs a header and a descriptor
OPEN_FILES = 256


@dataclass(frozen=True)
class Case:
    """One preprocessed volume: `name` is 'Dataset/case', `shape` (D, H, W) in voxels."""

    name: str
    path: Path
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class PretrainData:
    """All cases of a run and their common format."""

    cases: tuple[Case, ...]
    format: VolumeFormat

    def digest(self) -> str:
        """SHA-256 over names and shapes of the cases and their format; samples depend on all of it."""
        described = [[(c.name, c.shape) for c in self.cases], self.format.to_dict()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def find_data(datasets: Sequence[str], plans_name: str, configuration: str) -> PretrainData:
    """Cases that `hiendmae preprocess` or stock `nnUNetv2_preprocess` left on disk.

    Raises:
        UserError: unknown dataset, plans or configuration, a 2D one, nothing preprocessed, an unreadable case, or
            datasets that were preprocessed differently.
    """
    cases, formats = [], {}
    for dataset in datasets:
        name = dataset_name(dataset)
        plans, folder = _preprocessed(name, plans_name, configuration)
        formats[name] = _volume_format(name, plans, configuration)
        cases += _cases(name, folder, len(formats[name].channel_names), _mend(plans, configuration))
    first_name, first = next(iter(formats.items()))
    for name, other in formats.items():
        differing = [k for k in vars(first) if vars(first)[k] != vars(other)[k]]
        if differing:
            key = differing[0]
            raise UserError(
                f"{first_name} and {name} differ in {key} ({vars(first)[key]} and {vars(other)[key]}), needed the same "
                f"for one run; run: hiendmae preprocess -d {' '.join(map(str, datasets))} -p {plans_name}_joint"
            )
    return PretrainData(tuple(cases), first)


def warn_if_padded(cases: Sequence[Case], padded_below: Sequence[int]) -> None:
    """Says so when a sample takes more voxels than volumes have: those are padded with zeros, which is right but costs
    tokens."""
    small = [c for c in cases if any(s < k for s, k in zip(c.shape, padded_below, strict=True))]
    if not small:
        return
    largest = tuple(max(c.shape[a] for c in cases) for a in range(3))
    whose = "every volume" if len(small) == len(cases) else f"{len(small)} of {len(cases)} volumes"
    logger.warning(
        f"a sample takes {tuple(padded_below)} voxels, larger than {whose} along some axis (largest extent {largest} "
        "voxels); they are padded with zeros. A smaller --crop-size or a finer spacing avoids that"
    )


class CaseVolume:
    """A case that is read in parts; never holds the volume. Implements `views.Volume`."""

    def __init__(self, case: Case, volumes: VolumeFormat):
        self.shape = case.shape
        self.spacing_mm = volumes.spacing_mm
        self._array = _open(str(case.path))
        self._channel, self._above = volumes.foreground_channel, volumes.foreground_above

    def read(self, lower: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """(C, *size) float32 from corner `lower`, zero outside the volume."""
        box = [[a, a + s] for a, s in zip(lower, size, strict=True)]
        return np.ascontiguousarray(crop_and_pad_nd(self._array, box, 0), dtype=np.float32)

    def is_foreground(self, voxel: Sequence[int]) -> bool:
        """Whether the foreground channel at (D, H, W) is above the lower bound of the intensity window."""
        return bool(self._array[(self._channel, *voxel)] > self._above)


class SampleDataset(Dataset):
    """Samples by (step, index): case, crop, augmentation and masks all come from (seed, step, index)."""

    def __init__(self, data: PretrainData, views: Views, seed: int):
        self.data = data
        self.views = views
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """One sample: the tensors of the views, and "case", the name it came from."""
        rng = np.random.default_rng([self.seed, *key])
        case = self.data.cases[rng.integers(len(self.data.cases))]
        try:
            sample = self.views.draw(CaseVolume(case, self.data.format), rng)
        except (RuntimeError, OSError) as e:  # what blosc2 raises for a damaged file
            raise UserError(f"cannot read case {case.name} ({e}); delete {case.path} and preprocess again") from e
        return {**sample, "case": case.name}


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Keys of every micro-batch of one process, from `first_step` to `last_step`.

    The samples of a step are numbered over the whole global batch, so that its content depends neither on the
    number of processes nor on the number of accumulated micro-batches.
    """

    def __init__(self, first_step: int, last_step: int, batch_size: int, accumulate: int, rank: int, world_size: int):
        self.first_step, self.last_step = first_step, last_step
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.micro_batch = batch_size // (accumulate * world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.last_step):
            for part in range(self.accumulate):
                start = (part * self.world_size + self.rank) * self.micro_batch
                yield [(step, start + i) for i in range(self.micro_batch)]

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate


def build_loader(dataset: SampleDataset, sampler: StepSampler, workers: int, pin_memory: bool) -> DataLoader:
    """Loader whose batches come in the sampler's order, whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _preprocessed(name: str, plans_name: str, configuration: str) -> tuple[PlansManager, Path]:
    root = nnunet_folder("nnUNet_preprocessed") / name
    plans_file = root / f"{plans_name}.json"
    if not plans_file.is_file():
        mend = f"run: hiendmae preprocess -d {name} -p {plans_name}"
        there = ", ".join(sorted(p.stem for p in root.glob("*.json") if "configurations" in p.read_text())) or "none"
        raise UserError(f"no plans '{plans_name}' in {root} (there: {there}); {mend}")
    plans = PlansManager(json.loads(plans_file.read_text()))
    if configuration not in plans.available_configurations:
        listed = ", ".join(plans.available_configurations)
        raise UserError(
            f"{plans_name} of {name} has no configuration '{configuration}' (there: {listed}); choose with -c"
        )
    manager = plans.get_configuration(configuration)
    if len(manager.patch_size) != 3:
        raise UserError(
            f"configuration '{configuration}' of {plans_name} is 2D, needed a 3D one: 3D patches cannot be cut from "
            "slices; choose with -c 3d_fullres"
        )
    folder = root / manager.data_identifier
    if not folder.is_dir():
        raise UserError(
            f"{name} is not preprocessed with {plans_name} ({folder} is missing); {_mend(plans, configuration)}"
        )
    return plans, folder


def _mend(plans: PlansManager, configuration: str) -> str:
    """The command that preprocesses with these plans: whose they are decides."""
    network = plans.plans["configurations"][configuration].get("architecture", {}).get("network_class_name", "")
    if network.startswith("nnunetv2_hiendmae.") and PLANS_KEY not in plans.plans:
        return f"run: hiendmae preprocess -d {plans.dataset_name} -p {plans.plans_name}"
    return f"run: nnUNetv2_preprocess -d {plans.dataset_name} -plans_name {plans.plans_name} -c {configuration}"


def _volume_format(name: str, plans: PlansManager, configuration: str) -> VolumeFormat:
    manager = plans.get_configuration(configuration)
    mend = f"run: hiendmae preprocess -d {name}"
    if list(plans.transpose_forward) != [0, 1, 2]:
        raise UserError(
            f"{plans.plans_name} of {name} transposes the axes to {plans.transpose_forward}, needed arrays as they are "
            f"stored: the encoder's axes are those of the images; {mend}"
        )
    schemes = tuple(manager.normalization_schemes)
    channel_names = _channel_names(name, len(schemes))
    spacing = tuple(float(s) for s in manager.spacing)
    reader = plans.plans["image_reader_writer"]
    known = VolumeFormat(
        spacing,
        image_reader_writer=reader,
        normalization_schemes=schemes,
        channel_names=channel_names,
        orientation=f"as {reader} reads it",
    )
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    properties = plans.foreground_intensity_properties_per_channel
    stats = {tuple(float(properties[str(i)][k]) for k in keys) for i in range(len(schemes)) if known.is_ct(i)}
    if not stats:
        return known
    if len(stats) > 1:
        raise UserError(f"the CT channels of {name} were normalised differently by {plans.plans_name}; {mend}")
    low, high, offset, std = stats.pop()
    # the floor is CTNormalization's
    return replace(known, window_hu=(low, high), intensity_offset=offset, intensity_scale=max(std, 1e-8))


def _channel_names(name: str, count: int) -> tuple[str, ...]:
    description = nnunet_folder("nnUNet_preprocessed") / name / "dataset.json"
    data = json.loads(description.read_text()) if description.is_file() else {}
    names = data.get("channel_names") or data.get("modality") or {}
    return tuple(str(v) for v in names.values()) or tuple(str(i) for i in range(count))


def _cases(name: str, folder: Path, channels: int, mend: str) -> list[Case]:
    identifiers = sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))
    if not identifiers:
        raise UserError(f"no preprocessed images (.b2nd) in {folder}, needed at least one; {mend}")
    return [_case(name, folder / f"{i}.b2nd", channels, f"delete it and {mend}") for i in identifiers]


def _case(name: str, path: Path, channels: int, mend: str) -> Case:
    try:
        shape = tuple(int(s) for s in blosc2.open(str(path), mode="r").shape)
    except Exception as e:  # blosc2 raises RuntimeError, OSError and others for a damaged file
        raise UserError(f"cannot read the preprocessed case {path} ({e}); {mend}") from e
    if len(shape) != 4 or shape[0] != channels:
        raise UserError(f"{path} has shape {shape}, needed ({channels}, D, H, W) as in the plans; {mend}")
    return Case(f"{name}/{path.stem}", path, shape[1:])


@lru_cache(maxsize=OPEN_FILES)
def _open(path: str) -> blosc2.NDArray:
    # memory-mapping fails on Windows (as nnU-Net's own dataset class notes)
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(path, mode="r", dparams={"nthreads": 1}, **mapped)
