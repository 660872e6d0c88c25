"""Raw datasets and their fingerprints: what planning and preprocessing need to know before they start."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_hiendmae.environment import dataset_id, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.schemas import Fingerprint, read_dataset_json, read_json
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
        missing_labels: label files that should be there.
    """

    name: str
    dataset_json: dict[str, Any]
    cases: dict[str, tuple[str, ...]]
    missing_labels: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return nnunet_folder("nnUNet_raw") / self.name

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in order ("modality" is what old datasets call them)."""
        return tuple((self.dataset_json.get("channel_names") or self.dataset_json["modality"]).values())

    def reader(self, name: str | None = None) -> type[BaseReaderWriter]:
        """nnU-Net's reader of that name; None: the one that reads the first readable image.

        Raises:
            UserError: nnU-Net has no such reader, or none for the file ending.
        """
        if name is not None:
            with suppress(RuntimeError):
                return recursive_find_reader_writer_by_name(name)
            raise UserError(f"nnU-Net has no image reader '{name}'; leave it out to let nnU-Net choose")
        # where nothing is readable, the ending decides: let every case be named with its own reason
        examples = (*(images[0] for images in self.cases.values() if images), None)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for example in examples:
                with suppress(RuntimeError):
                    return determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)
        raise UserError(
            f"nnU-Net has no reader for '{self.dataset_json['file_ending']}' files ({self.name}); "
            f"check file_ending in its dataset.json"
        )


def read_raw_dataset(name: str) -> RawDataset:
    """Lists a raw dataset; reads no image.

    Raises:
        UserError: dataset.json is missing or incomplete, or there are no training images.
    """
    folder = nnunet_folder("nnUNet_raw") / name
    dataset_json = read_dataset_json(folder)
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

    def images(case: str, files: list[str]) -> tuple[str, ...]:
        if "dataset" in listing:
            return tuple(files)
        # found by pattern: with 0000 and 0002 there, 0002 would pass for the second channel
        return tuple(str(folder / "imagesTr" / f"{case}_{i:04d}{ending}") for i in range(len(files)))

    return RawDataset(
        name,
        {"labels": {"background": 0}, "numTraining": len(found), **dataset_json},
        {str(case): images(str(case), files["images"]) for case, files in found.items()},
        tuple(str(files["label"]) for files in found.values() if not Path(files["label"]).is_file()),
    )


def is_ct(channel: str) -> bool:
    """Whether nnU-Net normalises a channel of that name as CT, so that a window in HU makes sense."""
    return get_normalization_scheme(channel).__name__ == CT_SCHEME


def check_labels(raw: RawDataset) -> None:
    """Raises UserError: the dataset names no foreground label, or training cases lack their label file."""
    if not set(raw.dataset_json["labels"]) - {"background", "ignore"}:
        raise UserError(f"{raw.folder / 'dataset.json'} names no label besides background, needed labels to fine-tune")
    if raw.missing_labels:
        raise UserError(
            f"{raw.name} has {len(raw.missing_labels)} of {len(raw.cases)} training cases without a label file, first "
            f"{raw.missing_labels[0]}; fine-tuning needs a label for every image, add them or move the images out of "
            f"{raw.folder / 'imagesTr'}"
        )


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
    return None if with_labels and fingerprint.get(LABEL_FREE_KEY) else fingerprint


def _is_cut_short(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return False


def extract_fingerprint(dataset_name: str, num_processes: int) -> None:
    """Writes nnU-Net's own fingerprint, of images and labels, over what is there.

    Raises:
        UserError: nnU-Net cannot read the dataset.
    """
    try:
        with prints_to_log():
            extractor = DatasetFingerprintExtractor(dataset_name, num_processes)
            extractor.show_progress_bar = sys.stderr.isatty()
            extractor.run(overwrite_existing=True)
    # whatever a reader raises about an image or a label
    except Exception as e:
        reason = (str(e).splitlines() or [type(e).__name__])[-1]
        raise UserError(
            f"nnU-Net cannot read {dataset_name} ({reason}); "
            f"run: nnUNetv2_extract_fingerprint -d {dataset_id(dataset_name)} --verify_dataset_integrity"
        ) from e


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
