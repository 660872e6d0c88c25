"""How much a demo computes, and how each method spends it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.recipes import TRAINERS

# of the decoders that are as large as their papers' unless told otherwise: 8 blocks would dwarf the demo's encoder
SMALL_DECODER = {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4}


@dataclass(frozen=True)
class MethodSettings:
    """What a method's sample is made of in the demo.

    Args:
        views: crops that the encoder learns from in one sample; they share one read from one volume.
        options: of the method, where the demo is smaller than the paper; they make `views` come out as said.
    """

    views: int = 1
    options: dict[str, Any] = field(default_factory=dict)


METHODS = tuple(method for method in TRAINERS if method is not None)
# a method that is not named here is run with its own defaults
_SMALLER = {
    # one view of level 1, one of level 2, two of level 3
    "mim": MethodSettings(4, {"crops_level2": 1, "crops_level3": 2, "views_per_part": 2, **SMALL_DECODER}),
    "glmae": MethodSettings(
        4,
        {
            "global_views": 2, "local_views": 2, "global_size": 64, "head_hidden": 256, "head_dim": 128,
            **SMALL_DECODER,
        },
    ),
    "mae3d": MethodSettings(options=SMALL_DECODER),
}  # fmt: skip


def method_settings(method: str) -> MethodSettings:
    """What a method's sample is made of in the demo."""
    return _SMALLER.get(method, MethodSettings())


@dataclass(frozen=True)
class Budget:
    """How much is computed, the same for every method; the defaults fit a laptop.

    Args:
        views_per_step: crops that the encoder learns from in one optimizer step of pretraining.
        spacing_mm: voxel spacing (D, H, W); None: isotropic, about 128 voxels along a volume's longest axis.
        pretrain_lr, finetune_lr: peak learning rates, high because network, batches and runs are small.

    Raises:
        UserError: a number is not positive.
    """

    encoder: str = "vit_nano_p8"
    pretrain_epochs: int = 15
    steps_per_epoch: int = 40
    views_per_step: int = 8
    pretrain_lr: float = 1e-3
    finetune_epochs: int = 25
    iterations_per_epoch: int = 10
    finetune_batch_size: int = 2
    finetune_lr: float = 1e-3
    decoder_width: int = 16
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self):
        # now, and not when the command is reached after minutes
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"{name} is {value}, needed more than 0; see: hiendmae demo --help")

    def samples_per_step(self, method: str) -> int:
        """Batch size of a method.

        Raises:
            UserError: its samples have more views than a step, or do not fill it.
        """
        views = method_settings(method).views
        if self.views_per_step % views:
            raise UserError(f"views_per_step is {self.views_per_step}, {method} needs a multiple of {views}")
        return self.views_per_step // views
