"""Options of `hiendmae plan`."""

from dataclasses import dataclass

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, option

_RECIPE, _FILE = "the method's recipe", "that of the file"


@dataclass(frozen=True)
class PlanOptions:
    """How an encoder is fine-tuned. None: what the encoder file or its method's recipe says, whose ranges hold for
    what is given too.

    Raises:
        UserError: a number is out of range, or options exclude each other.
    """

    plans_name: str | None = option(
        None, "name of the plans", flag="--name", metavar="PLANS", default_is="nnUNetPlans_METHOD"
    )
    from_scratch: bool = option(False, "same network and data, but no pretrained weights: the baseline")
    epochs: int | None = option(None, "epochs", metavar="N", default_is=_RECIPE)
    warmup_epochs: int | None = option(None, "epochs of linear warm-up", metavar="N", default_is="10% of the epochs")
    iterations_per_epoch: int | None = option(
        None, "training batches per epoch", metavar="N", default_is="nnU-Net's 250"
    )
    val_iterations_per_epoch: int | None = option(
        None, "validation batches per epoch", metavar="N", default_is="nnU-Net's 50"
    )
    lr: float | None = option(None, "peak learning rate", default_is=_RECIPE)
    weight_decay: float | None = option(None, "AdamW weight decay", default_is=_RECIPE)
    batch_size: int | None = option(None, "crops per batch", metavar="B", default_is=_RECIPE, at_least=1)
    patch_size: tuple[int, int, int] | None = option(None, "crop in voxels", metavar=("D", "H", "W"), default_is=_FILE)
    spacing_mm: tuple[float, float, float] | None = option(
        None, "target spacing in mm", flag="--spacing", metavar=("D", "H", "W"), default_is=_FILE
    )
    window_hu: tuple[float, float] | None = option(
        None, "CT window in HU", flag="--window", metavar=("LO", "HI"), default_is=_FILE
    )
    reader: str | None = option(
        None,
        "nnU-Net image reader, it decides the orientation; auto: nnU-Net's choice",
        metavar="NAME",
        default_is=_FILE,
    )
    freeze_encoder: bool = option(False, 'train the decoder alone ("linear" in the papers)')
    layer_decay: float | None = option(
        None, "factor of the learning rate per encoder layer", metavar="F", default_is="1"
    )
    drop_path_rate: float | None = option(
        None, "stochastic depth of the encoder", flag="--drop-path", metavar="RATE", default_is="recipe"
    )
    grad_clip: float | None = option(
        None, "largest gradient norm, at most nnU-Net's 12", metavar="NORM", default_is="recipe"
    )
    decoder_width: int | None = option(
        None, "channels of the decoder at full resolution", metavar="W", default_is="recipe", at_least=1
    )
    num_processes: int = option(4, "processes of the fingerprint extraction", flag="-np", metavar="N", at_least=1)

    def __post_init__(self):
        check_ranges(self)
        if self.from_scratch and self.freeze_encoder:
            raise UserError("a frozen encoder needs weights, got --from-scratch and --freeze-encoder; leave one out")
