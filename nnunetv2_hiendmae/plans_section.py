"""The one key that we add to nnU-Net's plans: written when planning, read by the trainers."""

from dataclasses import dataclass, field, fields
from typing import Any

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
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(f"lr {self.lr} must be positive, weight_decay {self.weight_decay} not negative")
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

    method: str | None = None
    encoder_file: str | None = None
    encoder_sha256: str | None = None
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    citations: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PlansSection":
        """From what plans hold.

        Raises:
            ValueError: unknown fields or values out of range.
        """
        unknown = set(data) - {f.name for f in fields(cls)}
        recipe = data.get("recipe", {})
        unknown |= {f"recipe.{k}" for k in set(recipe) - {f.name for f in fields(FinetuneRecipe)}}
        if unknown:
            raise ValueError(f"unknown fields in the plans' '{PLANS_KEY}' section: {sorted(unknown)}")
        return cls(**{**data, "recipe": FinetuneRecipe(**recipe), "citations": tuple(data.get("citations", ()))})
