"""What a user may set of every command with many options; None: found out, or as a file, method or recipe says."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.architectures import KINDS, PRESETS
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, declared, flag, option
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, RECIPES
from nnunetv2_hiendmae.volume_format import INTERPOLATIONS

# with Fabric's names
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
# what a checkpoint's arrays may have been; nnU-Net's are (z, y, x), called D, H, W
AXES = ("xyz", "dhw")
# the axes of the token grid as the sequences of a Primus have them, the slowest first: w is the volume's first
TOKEN_ORDERS = HWD, WHD = ("hwd", "whd")
# the first is the default, as in nnU-Net
DEVICES = ("cuda", "cpu", "mps")
RESIZE, CROPS = "resize", "crops"
# segmentation networks of `hiendmae plan`: the one of every kind of encoder, and those that only some have
UNETR = "unetr"
OWN_NETWORKS = tuple(name for kind in KINDS.values() for name in kind.own_networks)
# how whole volumes are resized; runs and files of 0.1 say only RESIZE, and had no anti-aliasing
ANTIALIASED = "antialiased"
_DHW = ("D", "H", "W")
_WINDOW, _FOLDER = {"flag": "--window", "metavar": ("LO", "HI")}, {"flag": "-o", "metavar": "DIR"}
_RECIPE, _FILE, _METHOD, _PRESET = "the method's recipe", "that of the file", "the method's", "the preset's"


def _from(whose: str, help: str, **about: Any) -> Any:
    """An option that comes from elsewhere where it is not given."""
    return option(None, help, default_is=whose, **about)


def _count(default: int | None, help: str, at_least: int = 1, metavar: str = "N", **about: Any) -> Any:
    return option(default, help, at_least=at_least, metavar=metavar, **about)


def _seed(help: str, at_most: int = 2**63 - 1, **about: Any) -> Any:
    return option(0, help, at_least=0, at_most=at_most, **about)


def _precision() -> Any:
    return option("auto", "auto: bf16 (old GPUs fp16), fp32 on a CPU", choices=("auto", *PRECISIONS))


def _device() -> Any:
    return option(DEVICES[0], "device", flag="-device", choices=DEVICES)


def _workers(help: str = "loader processes; do not change results") -> Any:
    # torch warns of more workers than cores
    return _count(min(4, os.cpu_count() or 1), help, 0)


def _plans(default: str | None = PRETRAIN_PLANS, help: str = "plans the images were preprocessed with") -> Any:
    return option(default, help, flag="-p", metavar="PLANS")


def _configuration(default: str | None = "3d_fullres", **about: Any) -> Any:
    return option(default, "configuration of those plans", flag="-c", metavar="CONFIG", **about)


def _interpolation(whose: str) -> Any:
    return _from(whose, "how images are resampled; nnunet repeats slices that are thick", choices=INTERPOLATIONS)


def _resume() -> Any:
    return option(False, "continue from the last checkpoint", flag="--c")


class CommandOptions:
    """Base of options: frozen dataclasses.

    Raises:
        UserError: a value is out of range.
    """

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class PreprocessOptions(CommandOptions):
    """How images become the arrays of pretraining; what is given wins over `like`, and that over the default method."""

    plans_name: str = _plans(help="name of the plans")
    like: str | Path | None = option(
        None,
        "method or encoder file (or hf://ORG/REPO) whose spacing and window to use; mri: 1 mm, z-scored, for heads",
        metavar="METHOD|mri|FILE",
        default_is="hiendmae",
    )
    spacing_mm: tuple[float, float, float] | None = option(
        None,
        "target spacing in mm",
        flag="--spacing",
        metavar=_DHW,
        default_is="that of --like; mim, glmae: the dataset's median; mri: 1 1 1; others: 1.5 1.5 1.5",
    )
    window_hu: tuple[float, float] | None = option(
        None,
        "CT window in HU that becomes [0, 1]",
        **_WINDOW,
        default_is="that of --like; mim, glmae: -1000 1000; other methods: -175 250",
    )
    interpolation: str | None = _interpolation("that of --like; methods and mri: linear")
    part: str | None = option(
        None, "take every N-th case only, from the K-th on: one part per machine, at the same time", metavar="K/N"
    )
    num_processes: int = _count(4, "processes", flag="-np")

    def __post_init__(self):
        super().__post_init__()
        if self.part is not None and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.part):
            raise UserError(f"--part is {self.part}, needed K/N such as 1/4")
        number, parts = self.number_of_parts
        if number > parts:
            raise UserError(f"--part is {self.part}, needed a number from 1 to {parts} before the /{parts}")

    @property
    def number_of_parts(self) -> tuple[int, int]:
        """K and N of the part; (1, 1) for everything."""
        number, parts = (self.part or "1/1").split("/")
        return int(number), int(parts)


@dataclass(frozen=True)
class PretrainOptions(CommandOptions):
    """Options of `hiendmae pretrain`; None: what the method or the preset of the encoder says. `method_options` are
    texts key=value or a mapping."""

    plans_name: str = _plans()
    configuration: str = _configuration()
    method: str = option(DEFAULT_METHOD, "see: hiendmae methods", metavar="M", choices=tuple(RECIPES))
    encoder: str | None = _from(
        f"{_METHOD}, with -w that of the file", "see: hiendmae presets", metavar="PRESET", choices=tuple(PRESETS)
    )
    encoder_file: Path | None = option(None, "start from this file, or hf://ORG/REPO[/FILE]", flag="-w", metavar="FILE")
    crop_size: tuple[int, int, int] | None = _from(_PRESET, "crop in voxels", metavar=_DHW)
    patch_size: tuple[int, int, int] | None = _from(_PRESET, "ViT patch in voxels", metavar=_DHW)
    epochs: int | None = _count(None, "epochs; more than before with --c extend a finished run", default_is=_METHOD)
    schedule: str = option("cosine", "learning rate of an extension: warm-up, then so", choices=("cosine", "constant"))
    steps_per_epoch: int | None = _count(None, "optimizer steps per epoch", default_is=_METHOD)
    warmup_epochs: int | None = _count(None, "epochs of linear warm-up", 0, default_is="the method's, 10% at most")
    batch_size: int | None = _count(
        None, "crops (or volumes: hiendmae methods) per optimizer step over all processes", 1, "B", default_is=_METHOD
    )
    accumulate: int | None = _count(
        None, "micro-batches per optimizer step; less memory, same result, but for contrast", default_is=_METHOD
    )
    lr: float | None = _from("the method's, whatever the batch size", "peak learning rate", metavar="LR", above=0)
    weight_decay: float | None = _from(_METHOD, "AdamW weight decay", metavar="WD", at_least=0)
    method_options: tuple[str, ...] | Mapping[str, Any] | None = option(
        None,
        "options of the method, several at once or one by one; see: hiendmae methods",
        flag="--set",
        metavar="KEY=VALUE",
    )
    seed: int = _seed("decides initial weights, crops, augmentation and masks", metavar="N")
    workers: int = _workers("loader processes per process; does not change the losses")
    precision: str = _precision()
    device: str = _device()
    compile: bool = option(
        False, "torch.compile: minutes at the start, then faster on a GPU; same losses up to rounding"
    )
    checkpoint_activations: bool = option(
        False, "compute blocks again in the backward pass: less memory, a third more time, same losses"
    )
    checkpoint_epochs: int = _count(10, "epochs between checkpoints", flag="--checkpoint-every")
    picture_epochs: int = _count(10, "epochs between reconstruction pictures", flag="--pictures-every")
    probe: str | int | None = option(None, "labelled dataset, preprocessed alike, to test tokens on", metavar="DATASET")
    probe_fold: int | None = _count(None, "fold of that dataset", 0, "FOLD", default_is="0")
    probe_cases: int | None = _count(None, "its training cases to fit, and as many test cases", default_is="4, or all")
    probe_epochs: int | None = _count(None, "epochs between probes", flag="--probe-every", default_is="5% of the run")
    name: str | None = _from("METHOD_PRESET_DATASETS", "name of the run", metavar="RUN")
    output: Path | None = option(None, "run folder (default: $nnUNet_results/pretraining/RUN)", **_FOLDER)
    resume: bool = _resume()


@dataclass(frozen=True)
class PlanOptions(CommandOptions):
    """How an encoder is fine-tuned. None: what the encoder file or its method's recipe says, whose ranges hold for
    what is given too.

    Raises:
        UserError: options exclude each other.
    """

    plans_name: str | None = _from("nnUNetPlans_METHOD", "name of the plans", flag="--name", metavar="PLANS")
    from_scratch: bool = option(False, "same network and data, but no pretrained weights: the baseline")
    epochs: int | None = _from(_RECIPE, "epochs", metavar="N")
    warmup_epochs: int | None = _from("10% of the epochs", "epochs of linear warm-up", metavar="N")
    iterations_per_epoch: int | None = _from("nnU-Net's 250", "training batches per epoch", metavar="N")
    val_iterations_per_epoch: int | None = _from("nnU-Net's 50", "validation batches per epoch", metavar="N")
    lr: float | None = _from(_RECIPE, "peak learning rate")
    scratch_lr: float | None = _from("--lr with --from-scratch, else 3e-4", "peak rate from scratch", metavar="LR")
    weight_decay: float | None = _from(_RECIPE, "AdamW weight decay")
    batch_size: int | None = _from(_RECIPE, "crops per batch", metavar="B", at_least=1)
    patch_size: tuple[int, int, int] | None = _from(_FILE, "crop in voxels", metavar=_DHW)
    spacing_mm: tuple[float, float, float] | None = _from(_FILE, "target spacing in mm", flag="--spacing", metavar=_DHW)
    window_hu: tuple[float, float] | None = _from(_FILE, "CT window in HU", **_WINDOW)
    interpolation: str | None = _interpolation(_FILE)
    reader: str | None = _from(
        _FILE, "nnU-Net image reader, it decides the orientation; auto: nnU-Net's choice", metavar="NAME"
    )
    network: str | None = _from(
        UNETR, "segmentation network; primus: the patch decoder that Primus has", choices=(UNETR, *OWN_NETWORKS)
    )
    freeze_encoder: bool = option(False, 'train the decoder alone ("linear" in the papers)')
    layer_decay: float | None = _from("1", "factor of the learning rate per encoder layer", metavar="F")
    encoder_lr_scale: float | None = _from("1", "learning rate of the encoder over the decoder's", metavar="F")
    decoder_warmup: int | None = _from("0", "epochs in which the encoder is frozen, at first", metavar="N")
    drop_path_rate: float | None = _from("recipe", "the encoder's stochastic depth", flag="--drop-path", metavar="RATE")
    grad_clip: float | None = _from("recipe", "largest gradient norm, at most nnU-Net's 12", metavar="NORM")
    decoder_width: int | None = _from("recipe", "channels of the decoder at full resolution", metavar="W", at_least=1)
    seed: int | None = _from("none, as in nnU-Net", "of first weights, batches and augmentation", metavar="N")
    num_processes: int = _count(4, "processes of the fingerprint extraction", flag="-np")

    def __post_init__(self):
        super().__post_init__()
        freezing = ("--freeze-encoder",) * self.freeze_encoder + ("--decoder-warmup",) * bool(self.decoder_warmup)
        if self.from_scratch and freezing:
            told = f"got --from-scratch and {' and '.join(freezing)}; leave one out"
            raise UserError(f"a frozen encoder needs weights, {told}")


@dataclass(frozen=True)
class ConvertOptions(CommandOptions):
    """What is said of another program's checkpoint; None: found out, or as the format usually is."""

    format: str | None = option(
        None,
        "hiendmae, mim, glmae, mae3d, timm, monai, nnssl or primus (default: by the names of its tensors; a bare "
        "GL-MAE file has those of mae3d, without its decoder those of timm)",
        metavar="NAME",
    )
    num_heads: int | None = _count(None, "attention heads (default: those of the released sizes)", metavar="H")
    img_size: tuple[int, int, int] | None = option(
        None,
        "crop in voxels, in nnU-Net's order z y x, that its positions belong to (default: read off sin-cos "
        "positions, otherwise a cube)",
        metavar=_DHW,
        at_least=1,
    )
    patch_size: tuple[int, int, int] | None = option(
        None,
        "voxels of a patch, in the same order (default: as its kernel is; where that is a matrix, a cube)",
        metavar=_DHW,
        at_least=1,
    )
    axes: str | None = option(
        None,
        "order of its arrays; xyz is permuted to nnU-Net's z y x (default: xyz for the authors' files hiendmae, "
        "mim, glmae and mae3d; dhw, kept as it is, for the others)",
        choices=AXES,
    )
    token_order: str | None = option(
        None,
        "order of a Primus' tokens: hwd is that of most nnssl programs, whd of nnU-Net, SimMIM and nnFoundation "
        "(default: by what the file says of its program)",
        choices=TOKEN_ORDERS,
    )
    use_teacher: bool = option(False, "take GL-MAE's momentum teacher instead of the student")
    method: str | None = option(
        None,
        "method of ours that pretrained timm, monai or primus weights: they get its recipe and trainer (default: those "
        "for weights of other programs)",
        metavar="NAME",
    )

    def __post_init__(self):
        for name in ("img_size", "patch_size"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(size))
                if len(size) != 3:
                    raise UserError(f"--{name.replace('_', '-')} is {size}, needed three numbers D H W")
        super().__post_init__()

    def said(self) -> dict[str, Any]:
        """What was said, by the option of the command line."""
        values = {flag(name, about): getattr(self, name) for name, (_, about) in declared(type(self)).items()}
        return {spelled: value for spelled, value in values.items() if value not in (None, False)}

    def arguments(self) -> list[str]:
        """`said` as on a command line."""
        words = []
        for spelled, value in self.said().items():
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [spelled, *map(str, values)]
        return words


@dataclass(frozen=True)
class ClassifyOptions(CommandOptions):
    """Options of `hiendmae classify train`."""

    plans_name: str = _plans()
    configuration: str = _configuration()
    fold: str | None = option(
        None,
        "validation fold, 0 to 4 or one of the column fold (default: 0), or 'all': train on all, validate on none",
        flag="-f",
        metavar="FOLD",
    )
    fraction: float = option(1.0, "share of the training cases of every class", metavar="F", above=0, at_most=1)
    pool: str = option("mean", "what the head reads: mean of patch tokens, or CLS", choices=("mean", "cls"))
    input: str = option(RESIZE, "whole volumes resized, or crops of them", choices=(RESIZE, CROPS))
    crops: int = _count(1, "crops per case: random in training, a grid in prediction")
    crop_size: tuple[int, int, int] | None = _from("the encoder's", "input in voxels", metavar=_DHW)
    freeze_encoder: bool = option(False, "train the head only (linear probe)")
    from_scratch: bool = option(False, "same network without pretrained weights: the baseline")
    augmentation: bool = option(True, "flips, turns, intensity changes")
    epochs: int = _count(100, "passes over the training cases")
    warmup_epochs: int | None = _count(None, "epochs of linear warm-up", 0, default_is="10% of the epochs")
    batch_size: int = _count(8, "cases per optimizer step", metavar="B")
    lr: float | None = _from("1e-4, with --freeze-encoder 1e-3", "peak learning rate", above=0)
    weight_decay: float = option(1e-5, "AdamW weight decay", at_least=0)
    seed: int = _seed("decides initial weights, order, crops and augmentation")
    # scikit-learn takes 32 bits
    split_seed: int = _seed("decides folds and fractions", at_most=2**32 - 1)
    validate_epochs: int = _count(1, "epochs between validations", flag="--validate-every")
    checkpoint_epochs: int = _count(10, "epochs between checkpoints", flag="--checkpoint-every")
    name: str | None = _from("made of the options", "name of the run", metavar="RUN")
    output: Path | None = option(None, "run folder (default: $nnUNet_results/classification/RUN)", **_FOLDER)
    resume: bool = _resume()
    precision: str = _precision()
    device: str = _device()
    workers: int = _workers()


@dataclass(frozen=True)
class PredictOptions(CommandOptions):
    """Options of `hiendmae classify predict`."""

    plans_name: str | None = _plans(None, "plans of the images (default: those of the run)")
    configuration: str | None = _configuration(None, default_is="that of the run")
    model: str | None = _from("best where there is one", "which weights", choices=("best", "last"))
    labels: Path | None = option(None, "columns case,label; for metrics only", metavar="CSV")
    output: Path | None = option(None, "default: predictions_DATASETS.csv in the run folder", flag="-o", metavar="CSV")
    precision: str = _precision()
    device: str = _device()
    workers: int = _workers()
