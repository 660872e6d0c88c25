"""Options of `hiendmae plan`."""

from dataclasses import dataclass
from typing import Any

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, option

_RECIPE, _FILE = "the method's recipe", "that of the file"


def _from(whose: str, help: str, **about: Any) -> Any:
    """An option that comes from elsewhere where it is not given."""
    return option(None, help, default_is=whose, **about)


@dataclass(frozen=True)
class PlanOptions:
    """How an encoder is fine-tuned. None: what the encoder file or its method's recipe says, whose ranges hold for
    what is given too.

    Raises:
        UserError: a number is out of range, or options exclude each other.
    """

    plans_name: str | None = _from("nnUNetPlans_METHOD", "name of the plans", flag="--name", metavar="PLANS")
    from_scratch: bool = option(False, "same network and data, but no pretrained weights: the baseline")
    epochs: int | None = _from(_RECIPE, "epochs", metavar="N")
    warmup_epochs: int | None = _from("10% of the epochs", "epochs of linear warm-up", metavar="N")
    iterations_per_epoch: int | None = _from("nnU-Net's 250", "training batches per epoch", metavar="N")
    val_iterations_per_epoch: int | None = _from("nnU-Net's 50", "validation batches per epoch", metavar="N")
    lr: float | None = _from(_RECIPE, "peak learning rate")
    weight_decay: float | None = _from(_RECIPE, "AdamW weight decay")
    batch_size: int | None = _from(_RECIPE, "crops per batch", metavar="B", at_least=1)
    patch_size: tuple[int, int, int] | None = _from(_FILE, "crop in voxels", metavar=("D", "H", "W"))
    spacing_mm: tuple[float, float, float] | None = _from(
        _FILE, "target spacing in mm", flag="--spacing", metavar=("D", "H", "W")
    )
    window_hu: tuple[float, float] | None = _from(_FILE, "CT window in HU", flag="--window", metavar=("LO", "HI"))
    reader: str | None = _from(
        _FILE, "nnU-Net image reader, it decides the orientation; auto: nnU-Net's choice", metavar="NAME"
    )
    freeze_encoder: bool = option(False, 'train the decoder alone ("linear" in the papers)')
    layer_decay: float | None = _from("1", "factor of the learning rate per encoder layer", metavar="F")
    drop_path_rate: float | None = _from(
        "recipe", "stochastic depth of the encoder", flag="--drop-path", metavar="RATE"
    )
    grad_clip: float | None = _from("recipe", "largest gradient norm, at most nnU-Net's 12", metavar="NORM")
    decoder_width: int | None = _from("recipe", "channels of the decoder at full resolution", metavar="W", at_least=1)
    num_processes: int = option(4, "processes of the fingerprint extraction", flag="-np", metavar="N", at_least=1)

    def __post_init__(self):
        check_ranges(self)
        if self.from_scratch and self.freeze_encoder:
            raise UserError("a frozen encoder needs weights, got --from-scratch and --freeze-encoder; leave one out")
