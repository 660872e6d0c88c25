"""Raw datasets and their fingerprints: what planning and preprocessing need to know before they start."""

import glob
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.schemas import Fingerprint, channels_of, read_dataset_json, read_json
from nnunetv2_hiendmae.volume_format import CT_SCHEME

FINGERPRINT = "dataset_fingerprint.json"
# in that file: written by `hiendmae preprocess` from images alone
LABEL_FREE_KEY = "hiendmae_label_free"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawDataset:
    """Training images of `$nnUNet_raw/<name>`; imagesTs is never looked at.

    Args:
        dataset_json: with `labels` (background only) and `numTraining` filled in where the file lacks them.
        cases: image files of every case, one per channel.
        labels: label file of every case, whether it is there or not.
    """

    name: str
    dataset_json: dict[str, Any]
    cases: dict[str, tuple[str, ...]]
    labels: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return nnunet_folder("nnUNet_raw") / self.name

    @property
    def missing_labels(self) -> tuple[str, ...]:
        """Label files that should be there."""
        return tuple(file for file in self.labels.values() if not Path(file).is_file())

    @property
    def channels(self) -> tuple[str, ...]:
        """Their names in order."""
        return channels_of(self.dataset_json)


def read_raw_dataset(name: str) -> RawDataset:
    """Lists a raw dataset; reads no image.

    Raises:
        UserError: dataset.json is missing or incomplete, there are no training images, or files or cases have names
            that nnU-Net takes for something else.
    """
    folder = nnunet_folder("nnUNet_raw") / name
    dataset_json = read_dataset_json(folder)
    _check_channel_names(folder / "dataset.json", dataset_json)
    if "dataset" not in dataset_json:
        _check_files(folder / "imagesTr", dataset_json["file_ending"])
    # nnU-Net changes what it is given
    listing = deepcopy(dataset_json)
    try:
        found = get_filenames_of_train_images_and_targets(str(folder), listing)
    except FileNotFoundError as e:
        raise UserError(f"{name} has no training images ({e}); put CASE_0000 files into imagesTr") from e
    except KeyError as e:
        raise UserError(
            f'an entry under "dataset" in {folder / "dataset.json"} has no {e}; nnU-Net needs "images" and "label", '
            f'where there is no label write "label": ""'
        ) from e
    ending = dataset_json["file_ending"]
    if not found:
        raise UserError(f"{folder / 'imagesTr'} holds no '{ending}' files; check file_ending in dataset.json")

    # among preprocessed cases nnU-Net takes these for segmentations
    if taken := [case for case in map(str, found) if case.endswith("_seg")]:
        told = f"{name} has cases whose names end in _seg, which nnU-Net does not list: {some(taken)}"
        raise UserError(f"{told}; rename their files")

    def images(case: str, files: list[str]) -> tuple[str, ...]:
        if "dataset" in listing:
            return tuple(files)
        # found by pattern: with 0000 and 0002 there, 0002 would pass for the second channel
        return tuple(str(folder / "imagesTr" / f"{case}_{i:04d}{ending}") for i in range(len(files)))

    return RawDataset(
        name,
        {"labels": {"background": 0}, "numTraining": len(found), **dataset_json},
        {str(case): images(str(case), files["images"]) for case, files in found.items()},
        {str(case): str(files["label"]) for case, files in found.items()},
    )


def _check_channel_names(file: Path, dataset_json: dict[str, Any]) -> None:
    """Raises UserError: nnU-Net would give a channel the name, and so the normalisation, of another one."""
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    # "0000" is as good as "0"
    if [int(key) if key.isdecimal() else key for key in names] != [*range(len(names))]:
        needed = 'needed {"0": NAME, "1": NAME, …} in this order, "0" of the files that end in _0000'
        told = f"{file} names the channels {json.dumps(names)}, {needed}"
        raise UserError(f"{told}: nnU-Net takes the names one after the other, whatever their numbers; mend it")


def _check_files(images: Path, ending: str) -> None:
    """Raises UserError: nnU-Net would cut the name of a file wrongly, or leave it out without a word."""
    files = sorted(images.glob(f"*{glob.escape(ending)}"))
    unnamed = [f.name for f in files if not re.fullmatch(r".+_\d{4}", f.name.removesuffix(ending))]
    told = [f"{name} should be {name.removesuffix(ending)}_0000{ending}" for name in unnamed[:3]]
    if len(unnamed) > len(told):
        told.append(f"and {len(unnamed) - len(told)} more, each file is one channel: _0000, _0001, …")
    if missing := [f.name for f in files if not f.is_file()]:
        told.append(f"no files but dead links, pipes or folders: {some(missing)}")
    if told:
        raise UserError(f"{images}: {'; '.join(told)}; rename, mend or remove them")


def is_ct(channel: str) -> bool:
    """Whether nnU-Net normalises a channel of that name as CT, so that a window in HU makes sense."""
    return get_normalization_scheme(channel).__name__ == CT_SCHEME


def read_fingerprint(dataset_name: str, with_labels: bool = False) -> dict[str, Any] | None:
    """The fingerprint on disk; None when there is none, or a cut-short one (nnU-Net writes it in place). `with_labels`:
    one that was made without labels does not count.

    Raises:
        UserError: it is no fingerprint.
    """
    file = nnunet_folder("nnUNet_preprocessed") / dataset_name / FINGERPRINT
    if not file.exists() or (file.is_file() and _is_cut_short(file)):
        return None
    fingerprint = read_json(file, Fingerprint, "delete it, it is made anew")
    shapes, spacings = (len(fingerprint[key]) for key in ("shapes_after_crop", "spacings"))
    if shapes != spacings:
        raise UserError(f"{file} has {shapes} shapes and {spacings} spacings; delete it, it is made anew")
    return None if with_labels and fingerprint.get(LABEL_FREE_KEY) else fingerprint


def _is_cut_short(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return False


@contextmanager
def prints_to_log() -> Iterator[None]:
    """What nnU-Net prints inside goes to this module's log at level DEBUG."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in filter(str.strip, printed.getvalue().splitlines()):
            logger.debug(line)
