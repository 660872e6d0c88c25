"""The one key that we add to nnU-Net's plans: written when planning, read by the trainers."""

import json
from collections.abc import Iterator
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
        encoder_lr_scale: learning rate of the encoder over that of the decoder; `layer_decay` comes on top.
        decoder_warmup: epochs in which the encoder is frozen; after them it has the schedule of `lr` from its start.
        scratch_lr: what `lr` is where training starts from scratch; None: the same.
        seed: of the first weights, batches, augmentation and stochastic depth; None: none, as in nnU-Net.

    Raises:
        ValueError: values that are out of range or exclude each other, all of them.
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
    encoder_lr_scale: float = 1.0
    decoder_warmup: int = 0
    scratch_lr: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if wrong := [told for fits, told in self._checks() if not fits]:
            raise ValueError("; ".join(wrong))

    def _checks(self) -> Iterator[tuple[bool, str]]:
        """Whether a value fits, and what is told if not."""
        # AdamW's steps are as long as lr, its decay lr * weight_decay: larger ones leave nothing of the weights
        for name, lr in (("lr", self.lr), ("scratch_lr", self.scratch_lr)):
            yield lr is None or 0 < lr <= 1, f"{name} is {lr}, needed 0 < {name} <= 1"
        yield 0 <= self.weight_decay <= 10, f"weight_decay is {self.weight_decay}, needed 0 to 10"
        betas = f"betas are {self.betas}, needed two numbers of at least 0 and less than 1"
        yield all(0 <= beta < 1 for beta in self.betas), betas
        clip = f"grad_clip {self.grad_clip} must be positive, and at most nnU-Net's {NNUNET_GRAD_CLIP:g}"
        yield 0 < self.grad_clip <= NNUNET_GRAD_CLIP, clip
        of_encoder = {"layer_decay": 1, "encoder_lr_scale": 1, "decoder_warmup": 0}
        for name in ("layer_decay", "encoder_lr_scale"):
            yield 0 < getattr(self, name) <= 1, f"{name} {getattr(self, name)} must lie in (0, 1]"
        for name, neutral in of_encoder.items():
            value = getattr(self, name)
            told = f"{name} {value} has no effect on a frozen encoder, needed {neutral}"
            yield not self.freeze_encoder or value == neutral, told
        counts = "epochs, iterations_per_epoch and val_iterations_per_epoch must be at least 1"
        yield min(self.epochs, self.iterations_per_epoch, self.val_iterations_per_epoch) >= 1, counts
        warmup, last = self.decoder_warmup, self.epochs - 1
        yield 0 <= warmup <= last, f"decoder_warmup {warmup} must lie in 0..epochs-1 ({last})"
        after = f" after decoder_warmup {warmup}" if warmup else ""
        told = f"warmup_epochs {self.warmup_epochs}{after} must lie in 0..epochs-1 ({last - warmup})"
        yield not 0 <= warmup <= last or 0 <= self.warmup_epochs <= last - warmup, told
        yield self.seed is None or 0 <= self.seed < 2**63, f"seed {self.seed} must lie in 0..2^63-1"


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

    @property
    def lr(self) -> float:
        """Peak learning rate of these plans: with weights, or from scratch."""
        recipe = self.recipe
        return recipe.lr if self.method is not None or recipe.scratch_lr is None else recipe.scratch_lr

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PlansSection":
        """From what plans hold.

        Raises:
            ValueError: a field is unknown, missing, of another kind or out of range.
        """
        return validated(cls, json.dumps(data))
