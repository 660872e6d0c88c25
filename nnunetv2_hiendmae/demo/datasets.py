"""The two datasets of a demo: one to pretrain on, one to fine-tune on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.environment import dataset_id
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import ENCODER
from nnunetv2_hiendmae.schemas import EXAMPLE_JSON, NNUNET_FOLDS, read_dataset_json

EMBEDDED_DATA = Path(__file__).parent / "data"
# folders of the embedded data -> where their labels come from, and whom they show
TASKS = {
    "brain": "The labels of the embedded data are tissue maps that ship with two brain templates, SRI24 and MNI "
    "ICBM152 2009a, which are averages of many people: they are not human truth. Dice here is agreement between the "
    "maps of one template and those of the other, and these draw CSF differently: it takes 18 % of one brain and "
    "5 % of the other. Neither template is among the pretraining volumes.",
    "ct": "The labels of the embedded data are TotalSegmentator's output, not human truth: Dice here is agreement with "
    "another program. The held-out patient is not among the pretraining volumes; the training patient is.",
}
DEFAULT_TASK = "brain"
# a volume of the fine-tuning data should have about this many voxels along its longest axis: fast on a CPU
LONGEST_AXIS_VOXELS = 128
# nnU-Net finds datasets by three digits
DATASET_PATTERN = "Dataset[0-9][0-9][0-9]_*/dataset.json"
NO_CLASSES = ("background", "ignore")


@dataclass(frozen=True)
class DemoData:
    """Folders in nnU-Net's raw format.

    Args:
        pretraining: dataset without labels.
        finetuning: dataset with labels.
        dataset_json: of `finetuning`.
        held_out: whether `finetuning` has test images with labels (imagesTs, labelsTs).
        task: which of the `TASKS` that ship with the package; None: data of the user.
        encoder: encoder file beside the two datasets, to be fine-tuned as well; None: there is none.
    """

    pretraining: Path
    finetuning: Path
    dataset_json: dict[str, Any]
    held_out: bool
    task: str | None
    encoder: Path | None

    @property
    def pretraining_id(self) -> str:
        """nnU-Net id, as `-d` takes it."""
        return str(dataset_id(self.pretraining.name))

    @property
    def finetuning_id(self) -> str:
        """nnU-Net id, as `-d` takes it."""
        return str(dataset_id(self.finetuning.name))

    @property
    def first_channel_is_ct(self) -> bool:
        """Whether nnU-Net takes the first channel of the fine-tuning data for CT."""
        names = self.dataset_json.get("channel_names") or self.dataset_json.get("modality")
        return str(names.get("0")).casefold() == "ct"

    @property
    def foreground(self) -> dict[str, int | tuple[int, ...]]:
        """Class name -> label, or the tuple of labels of a region; without background and ignore label."""
        labels = {k: tuple(v) if isinstance(v, list) else v for k, v in self.dataset_json["labels"].items()}
        return {name: value for name, value in labels.items() if value != 0 and name not in NO_CLASSES}


def find_data(folder: Path | None, task: str = DEFAULT_TASK) -> DemoData:
    """The two datasets in a folder of the user, or those that are embedded for a task (None), and the encoder file
    that may lie beside them.

    Raises:
        UserError: an unknown task, not exactly one dataset with and one without labels, a dataset.json that cannot be
            used, or too few cases for nnU-Net's folds.
    """
    if task not in TASKS:
        raise UserError(f"unknown task '{task}', needed one of {', '.join(TASKS)}; see: hiendmae demo --help")
    root = EMBEDDED_DATA / task if folder is None else Path(folder).resolve()
    datasets = sorted(p.parent for p in root.glob(DATASET_PATTERN))
    labelled = [d for d in datasets if _files(d, "labelsTr")]
    unlabelled = [d for d in datasets if d not in labelled and _files(d, "imagesTr")]
    if len(labelled) != 1 or len(unlabelled) != 1:
        raise UserError(
            f"{root} holds {len(unlabelled)} nnU-Net datasets without and {len(labelled)} with labels, needed one of "
            "each: DatasetXXX_A/imagesTr for pretraining, DatasetYYY_B/imagesTr + labelsTr for fine-tuning"
        )
    dataset = labelled[0]
    description, cases = read_dataset_json(dataset), len(_files(dataset, "labelsTr"))
    labels = description.get("labels", {})
    if "background" not in labels or not set(labels) - set(NO_CLASSES):
        raise UserError(
            f'"labels" of {dataset / "dataset.json"} is {labels}, needed name -> value with the background and at '
            f"least one more; change it, e.g. {EXAMPLE_JSON}"
        )
    if cases < NNUNET_FOLDS and not (dataset / "splits_final.json").is_file():
        raise UserError(
            f"{dataset} has {cases} labelled cases, nnU-Net makes folds from {NNUNET_FOLDS} on; write its "
            'splits_final.json, e.g. [{"train": ["a"], "val": ["b"]}]'
        )
    held_out = bool(_files(dataset, "labelsTs") and _files(dataset, "imagesTs"))
    encoder = root / ENCODER
    return DemoData(
        pretraining=unlabelled[0],
        finetuning=dataset,
        dataset_json=description,
        held_out=held_out,
        task=task if folder is None else None,
        encoder=encoder if encoder.is_file() else None,
    )


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

    sizes = []
    reader = sitk.ImageFileReader()
    for file in _files(data.finetuning, "labelsTr"):
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as e:
            mend = f"put an intact file there, or take the case out of imagesTr and labelsTr of {data.finetuning}"
            raise UserError(f"cannot read the header of {file} ({str(e).strip().splitlines()[-1]}); {mend}") from e
        spacing = np.array(reader.GetSpacing())
        sizes.append((spacing.min(), (spacing * reader.GetSize()).max()))
    finest, longest = np.median(sizes, axis=0)
    return float(f"{max(finest, longest / LONGEST_AXIS_VOXELS):.3g}")


def _files(dataset: Path, part: str) -> list[Path]:
    return sorted((dataset / part).glob(f"*{read_dataset_json(dataset)['file_ending']}"))
