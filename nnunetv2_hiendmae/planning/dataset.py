"""Raw datasets: what planning needs to know of them before it starts."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError

# in dataset_fingerprint.json: written by `hiendmae preprocess` from images alone
LABEL_FREE_KEY = "hiendmae_label_free"
# what neither planning nor pretraining can do without; the second name is that of old datasets
REQUIRED_KEYS = (("file_ending",), ("channel_names", "modality"))
EXAMPLE_JSON = '{"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}'

logger = logging.getLogger(__name__)


def raw_dataset_json(dataset_name: str) -> dict[str, Any]:
    """Content of the raw dataset's dataset.json.

    Raises:
        UserError: it is missing, not JSON, or lacks what nnU-Net needs.
    """
    path = nnunet_folder("nnUNet_raw") / dataset_name / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        told = f"cannot read {path}, nnU-Net's description of the dataset"
        raise UserError(f"{told}; write one, e.g. {EXAMPLE_JSON}") from e
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); mend it, see: python -m json.tool {path}") from e
    for keys in REQUIRED_KEYS:
        if not any(content.get(k) for k in keys):
            raise UserError(f'{path} has no "{keys[0]}", which nnU-Net needs; add it, e.g. {EXAMPLE_JSON}')
    return content


def channel_names(dataset_json: dict[str, Any]) -> tuple[str, ...]:
    """Names of the input channels in order ("modality" is what old datasets call them)."""
    return tuple((dataset_json.get("channel_names") or dataset_json["modality"]).values())


def is_ct(channel_name: str) -> bool:
    """Whether nnU-Net normalises the channel as CT, so that a window in HU makes sense."""
    return get_normalization_scheme(channel_name) is CTNormalization


def check_labels(dataset_name: str, dataset_json: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the dataset names no foreground label, or training cases lack their label file.
    """
    folder = nnunet_folder("nnUNet_raw") / dataset_name
    if not set(dataset_json.get("labels", ())) - {"background", "ignore"}:
        raise UserError(f"{folder / 'dataset.json'} names no label besides background, needed labels to fine-tune")
    try:
        cases = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
    except FileNotFoundError as e:
        raise UserError(f"{dataset_name} is incomplete: {e}; see: ls {folder}") from e
    missing = [case["label"] for case in cases.values() if not Path(case["label"]).is_file()]
    if missing or not cases:
        told = f"{len(missing)} of {len(cases)} training cases without a label file"
        raise UserError(
            f"{dataset_name} has {told}{f', first {missing[0]}' if missing else ''}; "
            f"fine-tuning needs a label for every image, add them or move the images out of {folder / 'imagesTr'}"
        )


def fingerprint_file(dataset_name: str) -> Path:
    """Where nnU-Net keeps a dataset's fingerprint."""
    return nnunet_folder("nnUNet_preprocessed") / dataset_name / "dataset_fingerprint.json"


def read_fingerprint(dataset_name: str) -> dict[str, Any] | None:
    """The fingerprint on disk; None when there is none, or a cut-short one (nnU-Net writes it in place)."""
    try:
        return json.loads(fingerprint_file(dataset_name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def ensure_labelled_fingerprint(dataset_name: str, num_processes: int) -> None:
    """Runs nnU-Net's fingerprint extraction unless a fingerprint made with labels is there.

    Raises:
        UserError: nnU-Net cannot read the dataset.
    """
    existing = read_fingerprint(dataset_name)
    if existing is not None and not existing.get(LABEL_FREE_KEY):
        return
    logger.info("extracting the fingerprint of %s", dataset_name)
    try:
        with prints_to_log():
            DatasetFingerprintExtractor(dataset_name, num_processes).run(overwrite_existing=True)
    except (RuntimeError, AssertionError, ValueError, IndexError, OSError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"nnU-Net cannot read {dataset_name} ({reason}); "
            f"run: nnUNetv2_extract_fingerprint -d {int(dataset_name[7:10])} --verify_dataset_integrity"
        ) from e


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """What nnU-Net prints inside goes to this module's log at level DEBUG."""
    with contextlib.redirect_stdout(_LogStream()):
        yield


class _LogStream(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.debug(line)
        return len(text)
