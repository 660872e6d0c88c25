"""What a classification run computes: options of the user, the labels, the cases and their split, all checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.classification.inputs import Inputs
from nnunetv2_hiendmae.classification.labels import SPLIT, Labels, Split, choose_split, read_labels
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.options.commands import ClassifyOptions
from nnunetv2_hiendmae.training.launch import choose_precision
from nnunetv2_hiendmae.training.run_folder import RunSettings
from nnunetv2_hiendmae.training.volumes import CaseSet, find_cases
from nnunetv2_hiendmae.weights import EncoderMetadata, read_metadata

# ours, nobody published them: that of end-to-end fine-tuning for segmentation, ten times that for a linear layer alone
LR, LR_FROZEN = 1e-4, 1e-3
WARMUP_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(RunSettings, ClassifyOptions):
    """What a run computes, and how: its options, all decided but `fold`.

    Args:
        spec: of the encoder in the network; may differ from that of the file in crop and channels.
        encoder_file, encoder_sha256: whose weights the encoder starts with, unless `from_scratch`.
        labels_sha256: of cases, labels and places.
        fold: number or "all"; None where a column of the labels splits.
        lr: peak learning rate of AdamW, after `warmup_epochs`, cosine to 0 at the end.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    spec: EncoderSpec
    encoder_file: str
    encoder_sha256: str
    labels_sha256: str
    inputs: Inputs

    keys: ClassVar = (
        *("datasets", "plans_name", "configuration", "spec", "encoder_file", "encoder_sha256", "labels_sha256", "fold"),
        *("fraction", "inputs", "epochs", "warmup_epochs", "batch_size", "lr", "weight_decay", "precision", "pool"),
        *("freeze_encoder", "from_scratch", "augmentation", "seed", "split_seed", "validate_epochs"),
        "checkpoint_epochs",
    )
    not_deciding: ClassVar = ("encoder_file", "checkpoint_epochs")

    def __post_init__(self):
        super().__post_init__()
        if self.pool == "cls" and not self.spec.cls_token:
            raise UserError("--pool cls, but the encoder has no CLS token; use --pool mean")


@dataclass(frozen=True)
class Task:
    """A run's settings, its labelled cases and which of them train."""

    settings: ClassifySettings
    data: CaseSet
    labels: Labels
    split: Split

    def subset(self, names: Sequence[str]) -> CaseSet:
        """The named cases, in that order."""
        by_name = {case.name: case for case in self.data.cases}
        return replace(self.data, cases=tuple(by_name[name] for name in names))

    def targets(self, names: Sequence[str]) -> torch.Tensor:
        """Class indices (n,) of the named cases."""
        return torch.tensor([self.labels.targets[name] for name in names])


def build_task(datasets: Iterable[str | int], labels_file: Path, encoder_file: Path, options: ClassifyOptions) -> Task:
    """Task of a run; writes nothing.

    Raises:
        UserError: anything about the labels, the data, the encoder file or an option is wrong.
    """
    metadata = read_metadata(encoder_file)
    data = find_cases(datasets, options.plans_name, options.configuration)
    labels = read_labels(labels_file, [case.name for case in data.cases])
    split = choose_split(labels, options.fold, options.fraction, options.split_seed)
    spec = _spec(metadata, len(data.format.channel_names), options.crop_size)
    values = {
        "warmup_epochs": int(WARMUP_FRACTION * options.epochs),
        "lr": LR_FROZEN if options.freeze_encoder else LR,
        **{name: value for name, value in vars(options).items() if value is not None},
        "datasets": data.datasets,
        "spec": spec,
        "encoder_file": str(Path(encoder_file).resolve()),
        "encoder_sha256": sha256(encoder_file),
        "labels_sha256": labels.digest(),
        "fold": None if labels.column == SPLIT else options.fold or "0",
        "inputs": Inputs(options.input, spec.img_size, options.crops),
        "precision": choose_precision(options.precision, options.device),
    }
    settings = ClassifySettings(**values)
    labelled = tuple(case for case in data.cases if case.name in labels.targets)
    return Task(settings, replace(data, cases=labelled), labels, split)


def run_name(labels_file: Path, settings: ClassifySettings) -> str:
    """Default name of a run: label file, encoder's method, what trains, input, share of the labels, fold."""
    method = "scratch" if settings.from_scratch else read_metadata(settings.encoder_file).method
    trained = "probe" if settings.freeze_encoder else "finetune"
    share = f"{100 * settings.fraction:g}pct"
    fold = SPLIT if settings.fold is None else f"fold{settings.fold}"
    return "_".join([Path(labels_file).stem, method, trained, settings.inputs.mode, share, fold])


def _spec(metadata: EncoderMetadata, channels: int, crop_size: Sequence[int] | None) -> EncoderSpec:
    source = metadata.spec
    if source.in_channels not in (1, channels):
        raise UserError(
            f"the encoder has {source.in_channels} input channels, the images {channels}: only 1 can be spread; choose "
            "another -w"
        )
    try:
        # stochastic depth draws from the global generator: not reproducible from (seed, epoch, case)
        return source.with_(in_channels=channels, img_size=tuple(crop_size or source.img_size), drop_path_rate=0.0)
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the encoder's patch") from e
