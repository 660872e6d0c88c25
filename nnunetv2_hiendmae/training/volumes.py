"""Preprocessed nnU-Net cases: finding them, and reading them in parts."""

import hashlib
import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import blosc2
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch.utils.data import get_worker_info

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder, preprocess_command
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import telling_damage
from nnunetv2_hiendmae.plans_section import PLANS_KEY
from nnunetv2_hiendmae.schemas import Plans, read_dataset_json, read_json
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

# times the voxels of the largest volume; four times its edges
LARGEST_CROP = 64


@dataclass(frozen=True)
class Case:
    """One preprocessed volume: `name` is 'Dataset/case', `shape` (D, H, W) in voxels."""

    name: str
    path: Path
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class CaseSet:
    """Cases that were preprocessed alike, and how."""

    cases: tuple[Case, ...]
    format: VolumeFormat

    @property
    def datasets(self) -> tuple[str, ...]:
        """Their names, each once."""
        return tuple(dict.fromkeys(case.name.partition("/")[0] for case in self.cases))

    def digest(self) -> str:
        """SHA-256 over names and shapes of the cases and their format; samples depend on all of it."""
        described = [[(c.name, c.shape) for c in self.cases], self.format.to_dict()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def find_cases(datasets: Iterable[str | int], plans_name: str, configuration: str) -> CaseSet:
    """Cases that `hiendmae preprocess` or stock `nnUNetv2_preprocess` left on disk. `datasets`: ids or names; one that
    is given twice, by id and by name, is one.

    Raises:
        UserError: unknown dataset, plans or configuration, a 2D one, nothing preprocessed, an unreadable case, or
            datasets that were preprocessed differently.
    """
    found = {n: _preprocessed(n, plans_name, configuration) for n in dict.fromkeys(map(dataset_name, datasets))}
    (first_name, first), *others = found.items()
    for name, other in others:
        if differing := first.format.differences(other.format):
            key, mend = next(iter(differing)), f"run: hiendmae preprocess -d {shlex.join(found)} -p {plans_name}_joint"
            if "channel_names" in differing:
                key = "channel_names"
                mend = "pretrain on each alone; what is the same needs the same name in dataset.json"
            told = f"{first_name} and {name} differ in {key} ({' and '.join(map(str, differing[key]))})"
            raise UserError(f"{told}, needed the same for one run; {mend}")
        if first.format.use_mask_for_norm != other.format.use_mask_for_norm:
            told = f"of {first_name} and {name} one was z-scored without the voxels that are 0, by nnU-Net's rule"
            logger.warning(f"{told}; hiendmae preprocess --like mri -p ANOTHER_NAME treats all images alike")
    return CaseSet(tuple(case for data in found.values() for case in data.cases), first.format)


def warn_if_padded(cases: Sequence[Case], padded_below: Sequence[int]) -> None:
    """Says so when a sample takes more voxels than volumes have: those are padded, which is right but costs
    tokens."""
    small = [c for c in cases if any(s < k for s, k in zip(c.shape, padded_below, strict=True))]
    if not small:
        return
    largest = tuple(max(c.shape[a] for c in cases) for a in range(3))
    whose = "every volume" if len(small) == len(cases) else f"{len(small)} of {len(cases)} volumes"
    shorter = (any(c.shape[a] < padded_below[a] for c in cases) for a in range(3))
    axes = " and ".join(name for name, is_shorter in zip("DHW", shorter, strict=True) if is_shorter)
    told = f"{tuple(padded_below)} voxels (D, H, W), larger along {axes} than {whose} (largest extent {largest} voxels)"
    mend = "A smaller --crop-size or a finer spacing avoids that"
    logger.warning(f"a sample takes {told}; they are padded with their smallest values. {mend}")


def check_crop_size(cases: Sequence[Case], crop_size: Sequence[int]) -> None:
    """Raises UserError: nearly all of a crop would be padding; such a crop may fill the memory."""
    largest = max((c.shape for c in cases), key=math.prod)
    times = math.prod(crop_size) / math.prod(largest)
    if times > LARGEST_CROP:
        told = f"a crop of {tuple(crop_size)} voxels has {times:.3g} times as many as the largest volume, {largest}"
        raise UserError(f"{told}, needed at most {LARGEST_CROP} times; choose a smaller --crop-size")


class CaseVolume:
    """A case that is read in parts; never holds the volume. Implements `views.Volume`."""

    def __init__(self, case: Case, volumes: VolumeFormat):
        self.shape = case.shape
        self.spacing_mm = volumes.spacing_mm
        self._path = str(case.path)
        self._array = _open(self._path)
        self._channel, self._above = volumes.foreground_channel, volumes.foreground_above

    def read(self, lower: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """(C, *size) float32 from corner `lower`; outside the volume the smallest value that a channel has in it."""
        return crop_and_pad(self._array, lower, size, lambda: _smallest(self._path))

    def read_stored(self, lower: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A box (C, *size) inside the volume, in the precision in which it is stored. What a worker reads lies in
        memory that it shares with the training process, so that it is sent without a copy."""
        shape = (len(self._array), *size)
        box = torch.from_numpy(np.empty(0 if get_worker_info() else shape, self._array.dtype))
        if get_worker_info():
            # as torch's own collation does: what is shared later is copied
            box = box.new(box._typed_storage()._new_shared(math.prod(shape), device=box.device)).view(shape)
        upper = [a + s for a, s in zip(lower, size, strict=True)]
        # decompressed where it lies; indexing would take other memory and copy
        self._array.get_slice_numpy(box.numpy(), ([0, *lower], [len(self._array), *upper]))
        return box

    def is_foreground(self, voxel: Sequence[int]) -> bool:
        """Whether the foreground channel at (D, H, W) is above the lower bound of the intensity window."""
        return bool(self._array[(self._channel, *voxel)] > self._above)


def crop_and_pad(
    array: blosc2.NDArray | np.ndarray, lower: Sequence[int], size: Sequence[int], outside: Callable[[], np.ndarray]
) -> np.ndarray:
    """(C, *size) float32 of an array (C, D, H, W) from corner `lower`; outside of it the values (C,) of `outside`,
    which is only called for boxes that reach there."""
    box = [(a, a + s) for a, s in zip(lower, size, strict=True)]
    inside = [(max(0, a), min(b, most)) for (a, b), most in zip(box, array.shape[1:], strict=True)]
    part = array[(slice(None), *(slice(a, b) for a, b in inside))]
    if inside == box:
        return np.ascontiguousarray(part, dtype=np.float32)
    crop = np.empty((len(part), *size), np.float32)
    crop[:] = outside()[:, None, None, None]
    crop[(slice(None), *(slice(a - c, b - c) for (a, b), (c, _) in zip(inside, box, strict=True)))] = part
    return crop


# once per case and worker
@cache
def _smallest(path: str) -> np.ndarray:
    """Of every channel (C,): what lies outside a body, air in CT."""
    array = _open(path)
    # in parts: never holds the volume
    depth = array.chunks[1]
    return np.min([array[:, z : z + depth].min(axis=(1, 2, 3)) for z in range(0, array.shape[1], depth)], axis=0)


# per worker; an open file costs a header and a descriptor
@lru_cache(maxsize=256)
def _open(path: str) -> blosc2.NDArray:
    # memory-mapping fails on Windows (as nnU-Net's own dataset class notes)
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(path, mode="r", dparams={"nthreads": 1}, **mapped)


@contextmanager
def telling_unreadable(case: Case) -> Iterator[None]:
    """Raises UserError: a case's file is damaged, which is noticed when it is read inside."""
    try:
        yield
    except (RuntimeError, OSError) as e:  # what blosc2 raises
        raise UserError(f"cannot read case {case.name} ({e}); delete {case.path} and preprocess again") from e


def _mend(name: str) -> str:
    """The command that preprocesses a dataset anew."""
    return f"run: hiendmae preprocess -d {shlex.quote(name)}"


def _preprocessed(name: str, plans_name: str, configuration: str) -> CaseSet:
    """Cases of one dataset."""
    root = nnunet_folder("nnUNet_preprocessed") / name
    mend = _mend(name)
    file = root / f"{plans_name}.json"
    if not file.exists():
        files = filter(Path.is_file, root.glob("*.json"))
        plans = sorted(p.stem for p in files if b"configurations" in p.read_bytes())
        there = ", ".join(plans) or "none"
        raise UserError(f"no plans '{plans_name}' in {root} (there: {there}); {mend} -p {plans_name}")
    plans = PlansManager(read_json(file, Plans, f"delete it and {mend} -p {plans_name}"))
    if configuration not in plans.available_configurations:
        raise UserError(
            f"{plans_name} of {name} has no configuration '{configuration}' (there: "
            f"{', '.join(plans.available_configurations)}); choose with -c"
        )
    with telling_damage(file, f"all keys of nnU-Net's plans; delete it and {mend} -p {plans_name}"):
        return _cases_of(root, plans, configuration)


def _cases_of(root: Path, plans: PlansManager, configuration: str) -> CaseSet:
    name, plans_name, mend = root.name, plans.plans_name, _mend(root.name)
    manager = plans.get_configuration(configuration)
    if len(manager.patch_size) != 3:
        raise UserError(
            f"configuration '{configuration}' of {plans_name} is 2D, needed a 3D one: 3D patches cannot be cut from "
            "slices; choose with -c 3d_fullres"
        )
    network = plans.plans["configurations"][configuration].get("architecture", {}).get("network_class_name", "")
    # whose the plans are decides what preprocesses with them
    ours = network.startswith("nnunetv2_hiendmae.") and PLANS_KEY not in plans.plans
    stock = f"run: {preprocess_command(name, plans_name, configuration)}"
    again = f"{mend} -p {plans_name}" if ours else stock
    folder = root / manager.data_identifier
    if not folder.is_dir():
        raise UserError(f"{name} is not preprocessed with {plans_name} ({folder} is missing); {again}")
    if list(plans.transpose_forward) != [0, 1, 2]:
        raise UserError(
            f"{plans_name} of {name} transposes the axes to {plans.transpose_forward}, needed arrays as they are "
            f"stored: the encoder's axes are those of the images; {mend}"
        )
    volumes = _volume_format(root, plans, manager)
    identifiers = sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))
    if not identifiers:
        raise UserError(f"no preprocessed images (.b2nd) in {folder}, needed at least one; {again}")
    channels = len(volumes.channel_names)
    return CaseSet(tuple(_case(name, folder / f"{i}.b2nd", channels, again) for i in identifiers), volumes)


def _volume_format(root: Path, plans: PlansManager, manager: ConfigurationManager) -> VolumeFormat:
    data = read_dataset_json(root, for_images=False) if (root / "dataset.json").exists() else {}
    try:
        return VolumeFormat.of_plans(plans.plans, manager.configuration, data)
    except ValueError as e:
        raise UserError(f"{e} in {root.name} by {plans.plans_name}; {_mend(root.name)}") from e


def _case(name: str, path: Path, channels: int, again: str) -> Case:
    mend = f"delete it and {again}"
    try:
        shape = tuple(int(s) for s in blosc2.open(str(path), mode="r").shape)
    except Exception as e:  # blosc2 raises RuntimeError, OSError and others for a damaged file
        raise UserError(f"cannot read the preprocessed case {path} ({e}); {mend}") from e
    if len(shape) != 4 or shape[0] != channels:
        raise UserError(f"{path} has shape {shape}, needed ({channels}, D, H, W) as in the plans; {mend}")
    return Case(f"{name}/{path.stem}", path, shape[1:])
