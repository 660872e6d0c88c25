"""What a classification run computes."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.classification.data import Inputs
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.checkpoint import PRECISIONS

POOLS = ("mean", "cls")


@dataclass(frozen=True)
class ClassifySettings:
    """What a run computes, and how often it saves.

    Args:
        spec: of the encoder in the network; may differ from that of the file in crop and channels.
        encoder_file, encoder_sha256: whose weights the encoder starts with.
        from_scratch: it starts with random ones instead: the baseline.
        labels_sha256: of cases, labels and places.
        fold: number or "all"; None where a column of the labels splits.
        fraction: of the training cases.
        pool: "mean" of the patch tokens, or "cls".
        freeze_encoder: train the norm and the linear layer on top only (linear probe).
        epochs: passes over the training cases.
        batch_size: cases per optimizer step.
        lr: peak learning rate of AdamW, after `warmup_epochs`, cosine to 0 at the end.
        validate_epochs, checkpoint_epochs: every so many epochs, and at the end.
        split_seed: of folds and fractions; `seed`: of initial weights, order, crops and augmentation.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    plans_name: str
    configuration: str
    spec: EncoderSpec
    encoder_file: str
    encoder_sha256: str
    labels_sha256: str
    fold: str | None
    fraction: float
    inputs: Inputs
    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    precision: str
    pool: str = "mean"
    freeze_encoder: bool = False
    from_scratch: bool = False
    augmentation: bool = True
    seed: int = 0
    split_seed: int = 0
    validate_epochs: int = 1
    checkpoint_epochs: int = 10

    def __post_init__(self):
        for name in ("epochs", "batch_size", "validate_epochs", "checkpoint_epochs"):
            if getattr(self, name) < 1:
                option = {"validate_epochs": "validate-every", "checkpoint_epochs": "checkpoint-every"}.get(name, name)
                raise UserError(f"--{option.replace('_', '-')} is {getattr(self, name)}, needed at least 1")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs}, needed 0 to {self.epochs} (--epochs)")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--lr {self.lr} must be positive and --weight-decay {self.weight_decay} not negative")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}, needed 0 to 2^63 - 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision} is unknown, needed one of {', '.join(PRECISIONS)}")
        if self.pool not in POOLS:
            raise UserError(f"--pool {self.pool} is unknown, needed one of {', '.join(POOLS)}")
        if self.pool == "cls" and not self.spec.cls_token:
            raise UserError("--pool cls, but the encoder has no CLS token; use --pool mean")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return json.loads(json.dumps({**asdict(self), "spec": self.spec.to_dict()}))

    def deciding(self) -> dict[str, Any]:
        """JSON-ready form of what decides the result; a resumed run must have the same."""
        return {k: v for k, v in self.to_dict().items() if k not in ("encoder_file", "checkpoint_epochs")}
