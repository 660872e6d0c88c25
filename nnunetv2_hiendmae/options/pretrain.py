"""What a user may set of a pretraining run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.options import option
from nnunetv2_hiendmae.options.execution import DEVICE, DHW, PRECISION, SEED, WORKERS, CheckedOptions, count
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS


@dataclass(frozen=True)
class PretrainOptions(CheckedOptions):
    """Options of `hiendmae pretrain`; None: what the method or the preset of the encoder says. `method_options` are
    texts key=value or a mapping."""

    plans_name: str = option(PRETRAIN_PLANS, "plans the images were preprocessed with", flag="-p", metavar="PLANS")
    configuration: str = option("3d_fullres", "configuration of those plans", flag="-c", metavar="CONFIG")
    method: str = option("hiendmae", "see: hiendmae methods", metavar="M")
    encoder: str | None = option(None, "see: hiendmae presets", default_is="the method's", metavar="PRESET")
    crop_size: tuple[int, int, int] | None = option(None, "crop in voxels", default_is="the preset's", metavar=DHW)
    patch_size: tuple[int, int, int] | None = option(
        None, "ViT patch in voxels", default_is="the preset's", metavar=DHW
    )
    epochs: int | None = count(None, "epochs", default_is="the method's")
    steps_per_epoch: int | None = count(None, "optimizer steps per epoch", default_is="the method's")
    warmup_epochs: int | None = count(None, "epochs of linear warm-up", 0, default_is="the method's, 10% at most")
    batch_size: int | None = count(
        None, "crops (MiM, GL-MAE: volumes) per optimizer step over all processes", 1, "B", default_is="the method's"
    )
    accumulate: int | None = count(
        None, "micro-batches per optimizer step; less memory, same result", default_is="the method's"
    )
    lr: float | None = option(
        None, "peak learning rate", default_is="the method's, whatever the batch size", metavar="LR", above=0
    )
    weight_decay: float | None = option(None, "AdamW weight decay", default_is="the method's", metavar="WD", at_least=0)
    method_options: tuple[str, ...] | Mapping[str, Any] | None = option(
        None,
        "options of the method, several at once or one by one; see: hiendmae methods",
        flag="--set",
        metavar="KEY=VALUE",
    )
    seed: int = option(help="decides initial weights, crops, augmentation and masks", metavar="N", **SEED)
    workers: int = option(help="loader processes per process; does not change the losses", **WORKERS)
    precision: str = option(**PRECISION)
    device: str = option(**DEVICE)
    checkpoint_epochs: int = count(10, "epochs between checkpoints", flag="--checkpoint-every")
    picture_epochs: int = count(10, "epochs between reconstruction pictures", flag="--pictures-every")
    name: str | None = option(None, "name of the run", default_is="METHOD_PRESET_DATASETS", metavar="RUN")
    output: Path | None = option(
        None, "run folder (default: $nnUNet_results/pretraining/RUN)", flag="-o", metavar="DIR"
    )
    resume: bool = option(False, "continue from the last checkpoint", flag="--c")
