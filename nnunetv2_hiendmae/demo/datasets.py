"""The two datasets of a demo: one to pretrain on, one to fine-tune on."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_hiendmae.errors import UserError

EMBEDDED_DATA = Path(__file__).parent / "data"
# a volume of the fine-tuning data should have about this many voxels along its longest axis: fast on a CPU
LONGEST_AXIS_VOXELS = 128
# nnU-Net makes five folds by itself, and cannot with fewer cases
NNUNET_FOLDS = 5


@dataclass(frozen=True)
class DemoData:
    """Folders in nnU-Net's raw format.

    Args:
        pretraining: dataset without labels.
        finetuning: dataset with labels.
        held_out: whether `finetuning` has test images with labels (imagesTs, labelsTs).
        embedded: whether these are the volumes that ship with the package.
    """

    pretraining: Path
    finetuning: Path
    held_out: bool
    embedded: bool

    @property
    def pretraining_id(self) -> str:
        """nnU-Net id, as `-d` takes it."""
        return _dataset_id(self.pretraining)

    @property
    def finetuning_id(self) -> str:
        """nnU-Net id, as `-d` takes it."""
        return _dataset_id(self.finetuning)

    @property
    def dataset_json(self) -> dict:
        """Of the fine-tuning data."""
        return json.loads((self.finetuning / "dataset.json").read_text(encoding="utf-8"))

    @property
    def file_ending(self) -> str:
        """Of the fine-tuning data, e.g. '.nii.gz'."""
        return self.dataset_json["file_ending"]


def find_data(folder: Path | None) -> DemoData:
    """The embedded data (None), or the two datasets in a folder of the user.

    Raises:
        UserError: not exactly one dataset with and one without labels, or too few cases for nnU-Net's folds.
    """
    root = EMBEDDED_DATA if folder is None else Path(folder).resolve()
    datasets = sorted(p.parent for p in root.glob("Dataset*/dataset.json"))
    labelled = [d for d in datasets if _files(d, "labelsTr")]
    unlabelled = [d for d in datasets if d not in labelled and _files(d, "imagesTr")]
    if len(labelled) != 1 or len(unlabelled) != 1:
        raise UserError(
            f"{root} holds {len(unlabelled)} nnU-Net datasets without and {len(labelled)} with labels, needed one of "
            "each: DatasetXXX_A/imagesTr for pretraining, DatasetYYY_B/imagesTr + labelsTr for fine-tuning"
        )
    data = DemoData(unlabelled[0], labelled[0], _held_out(labelled[0]), embedded=folder is None)
    cases = len(_files(data.finetuning, "labelsTr"))
    if cases < NNUNET_FOLDS and not (data.finetuning / "splits_final.json").is_file():
        raise UserError(
            f"{data.finetuning} has {cases} labelled cases, nnU-Net makes folds from {NNUNET_FOLDS} on; "
            'write its splits_final.json, e.g. [{"train": ["a"], "val": ["b"]}]'
        )
    return data


def install(data: DemoData, raw: Path) -> None:
    """Links both datasets into a folder for `nnUNet_raw`; nothing is copied or changed."""
    raw.mkdir(parents=True, exist_ok=True)
    for dataset in (data.pretraining, data.finetuning):
        (raw / dataset.name).symlink_to(dataset.resolve(), target_is_directory=True)


def isotropic_spacing(data: DemoData) -> float:
    """Voxel edge in mm that makes the fine-tuning data small: never finer than it is.

    Raises:
        UserError: a header cannot be read.
    """
    import SimpleITK as sitk

    finest, longest = [], []
    reader = sitk.ImageFileReader()
    for file in _files(data.finetuning, "labelsTr"):
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as e:
            raise UserError(
                f"cannot read the header of {file} ({str(e).strip().splitlines()[-1]}); give --spacing D H W"
            ) from e
        spacing, size = np.array(reader.GetSpacing()), np.array(reader.GetSize())
        finest.append(spacing.min())
        longest.append((spacing * size).max())
    return float(f"{max(np.median(finest), np.median(longest) / LONGEST_AXIS_VOXELS):.3g}")


def _held_out(dataset: Path) -> bool:
    return bool(_files(dataset, "labelsTs")) and bool(_files(dataset, "imagesTs"))


def _files(dataset: Path, part: str) -> list[Path]:
    ending = json.loads((dataset / "dataset.json").read_text(encoding="utf-8")).get("file_ending", "")
    return sorted((dataset / part).glob(f"*{ending}"))


def _dataset_id(dataset: Path) -> str:
    return str(int(dataset.name[len("Dataset") :].split("_")[0]))
