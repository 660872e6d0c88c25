"""What a user may set of a classifier's training and predictions."""

from dataclasses import dataclass
from pathlib import Path

from nnunetv2_hiendmae.options import option
from nnunetv2_hiendmae.options.execution import DEVICE, DHW, PRECISION, SEED, WORKERS, CheckedOptions, count
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS

RESIZE, CROPS = "resize", "crops"


@dataclass(frozen=True)
class ClassifyOptions(CheckedOptions):
    """Options of `hiendmae classify train`."""

    plans_name: str = option(PRETRAIN_PLANS, "plans the images were preprocessed with", flag="-p", metavar="PLANS")
    configuration: str = option("3d_fullres", "configuration of those plans", flag="-c", metavar="CONFIG")
    fold: str | None = option(
        None,
        "validation fold, 0 to 4 or one of the column fold (default: 0), or 'all': train on all, validate on none",
        flag="-f",
        metavar="FOLD",
    )
    fraction: float = option(1.0, "share of the training cases of every class", metavar="F", above=0, at_most=1)
    pool: str = option("mean", "what the head reads: mean of patch tokens, or CLS", choices=("mean", "cls"))
    input: str = option(RESIZE, "whole volumes resized, or crops of them", choices=(RESIZE, CROPS))
    crops: int = count(1, "crops per case: random in training, a grid in prediction")
    crop_size: tuple[int, int, int] | None = option(None, "input in voxels", default_is="the encoder's", metavar=DHW)
    freeze_encoder: bool = option(False, "train the head only (linear probe)")
    from_scratch: bool = option(False, "same network without pretrained weights: the baseline")
    augmentation: bool = option(True, "flips, turns, intensity changes")
    epochs: int = count(100, "passes over the training cases")
    warmup_epochs: int | None = count(None, "epochs of linear warm-up", 0, default_is="10% of the epochs")
    batch_size: int = count(8, "cases per optimizer step", metavar="B")
    lr: float | None = option(None, "peak learning rate", default_is="1e-4, with --freeze-encoder 1e-3", above=0)
    weight_decay: float = option(1e-5, "AdamW weight decay", at_least=0)
    seed: int = option(help="decides initial weights, order, crops and augmentation", **SEED)
    # scikit-learn takes 32 bits
    split_seed: int = option(0, "decides folds and fractions", at_least=0, at_most=2**32 - 1)
    validate_epochs: int = count(1, "epochs between validations", flag="--validate-every")
    checkpoint_epochs: int = count(10, "epochs between checkpoints", flag="--checkpoint-every")
    name: str | None = option(None, "name of the run", default_is="made of the options", metavar="RUN")
    output: Path | None = option(
        None, "run folder (default: $nnUNet_results/classification/RUN)", flag="-o", metavar="DIR"
    )
    resume: bool = option(False, "continue from the last checkpoint", flag="--c")
    precision: str = option(**PRECISION)
    device: str = option(**DEVICE)
    workers: int = option(help="loader processes; do not change results", **WORKERS)


@dataclass(frozen=True)
class PredictOptions(CheckedOptions):
    """Options of `hiendmae classify predict`."""

    plans_name: str | None = option(None, "plans of the images (default: those of the run)", flag="-p", metavar="PLANS")
    configuration: str | None = option(
        None, "configuration of those plans", flag="-c", default_is="that of the run", metavar="CONFIG"
    )
    model: str | None = option(None, "which weights", default_is="best where there is one", choices=("best", "last"))
    labels: Path | None = option(None, "columns case,label; for metrics only", metavar="CSV")
    output: Path | None = option(None, "default: predictions_DATASETS.csv in the run folder", flag="-o", metavar="CSV")
    precision: str = option(**PRECISION)
    device: str = option(**DEVICE)
    workers: int = option(help="loader processes; do not change results", **WORKERS)
