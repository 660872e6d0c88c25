"""The one key that we add to nnU-Net's plans: written when planning, read by the trainers."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nnunetv2_hiendmae.schemas import CLOSED, validated

PLANS_KEY = "hiendmae"
# name of the plans that `hiendmae preprocess` writes and `hiendmae pretrain` reads
PRETRAIN_PLANS = "HiEndMAEPretrain"
# what nnUNetTrainer.train_step clips the gradient norm to
NNUNET_GRAD_CLIP = 12.0
PLAN_COMMAND = "hiendmae plan -d DATASET -w encoder.safetensors"


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a network is fine-tuned; one epoch is `iterations_per_epoch` batches as in nnU-Net.

    Args:
        lr: peak learning rate of AdamW, reached after `warmup_epochs`, cosine to 0 at `epochs`.
        grad_clip: largest gradient norm; nnU-Net clips to its own in any case.
        freeze_encoder: train the decoder alone ("linear" in the papers).
        layer_decay: factor of the learning rate from one encoder layer to the one below it; 1: the same for all.

    Raises:
        ValueError: a value is out of range.
    """

    __pydantic_config__: ClassVar = CLOSED
    lr: float = 1e-4
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 300
    warmup_epochs: int = 30
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50
    grad_clip: float = NNUNET_GRAD_CLIP
    freeze_encoder: bool = False
    layer_decay: float = 1.0

    def __post_init__(self):
        # AdamW's steps are as long as lr, its decay lr * weight_decay: larger ones leave nothing of the weights
        if not (0 < self.lr <= 1 and 0 <= self.weight_decay <= 10):
            raise ValueError(
                f"lr is {self.lr}, needed 0 < lr <= 1; weight_decay is {self.weight_decay}, needed 0 to 10"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, needed two numbers of at least 0 and less than 1")
        if not 0 < self.grad_clip <= NNUNET_GRAD_CLIP:
            raise ValueError(f"grad_clip {self.grad_clip} must be positive, and at most nnU-Net's {NNUNET_GRAD_CLIP:g}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} must lie in (0, 1]")
        if self.freeze_encoder and self.layer_decay != 1:
            raise ValueError(f"layer_decay {self.layer_decay} has no effect on a frozen encoder, needed 1")
        if min(self.epochs, self.iterations_per_epoch, self.val_iterations_per_epoch) < 1:
            raise ValueError("epochs, iterations_per_epoch and val_iterations_per_epoch must be at least 1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must lie in 0..epochs-1 ({self.epochs - 1})")


@dataclass(frozen=True)
class PlansSection:
    """What the trainers need beyond nnU-Net's own plans.

    Args:
        method: pretraining method of the encoder file; this and what follows is None when training from scratch.
        encoder_file: absolute path, read only when training starts at epoch 0; `encoder_sha256` is checked before.
        citations: BibTeX entries, printed once by the trainer.
    """

    __pydantic_config__: ClassVar = CLOSED
    method: str | None = None
    encoder_file: str | None = None
    encoder_sha256: str | None = None
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    citations: tuple[str, ...] = ()

    def __post_init__(self):
        if len({value is None for value in (self.method, self.encoder_file, self.encoder_sha256)}) > 1:
            raise ValueError("method, encoder_file and encoder_sha256 are given together, or none of them")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PlansSection":
        """From what plans hold.

        Raises:
            ValueError: a field is unknown, missing, of another kind or out of range.
        """
        return validated(cls, json.dumps(data))
