"""The classifier: pooled tokens of an encoder, LayerNorm, one linear layer; and its file."""

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.classification.inputs import Inputs
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with
from nnunetv2_hiendmae.schemas import CLOSED, validated
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights.metadata import check_size

METADATA_KEY = "hiendmae_classifier"
BEST, LAST = "classifier_best.safetensors", "classifier_last.safetensors"


class Classifier(nn.Module):
    """Logits (B, K) of images (B, C, D, H, W).

    Args:
        encoder: `encoder(x)` gives tokens (B, prefix + N, E) after the final norm, and taps.
        pool: "mean" of the patch tokens, or "cls", the first prefix token.
        frozen: the encoder gets no gradient and stays in eval mode (linear probe).

    Raises:
        ValueError: "cls" with an encoder without prefix tokens.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, pool: str = "mean", frozen: bool = False):
        super().__init__()
        if pool == "cls" and not encoder.num_prefix_tokens:
            raise ValueError("pool 'cls' needs an encoder with a CLS token")
        self.encoder = encoder
        self.pool = pool
        self.frozen = frozen
        self.norm = nn.LayerNorm(encoder.spec.embed_dim)
        self.head = nn.Linear(encoder.spec.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if frozen:
            encoder.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.encoder(x)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.encoder.num_prefix_tokens :].mean(1)
        return self.head(self.norm(pooled))

    def train(self, mode: bool = True) -> "Classifier":
        """As in torch, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def build_classifier(
    spec: EncoderSpec, num_classes: int, pool: str = "mean", frozen: bool = False, seed: int = 0
) -> Classifier:
    """Classifier with fresh weights; the same ones for the same seed."""
    torch.manual_seed(seed)
    return Classifier(build_encoder(spec), num_classes, pool, frozen)


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights (K,) of the classes, n / (K · n_k): inverse to their frequency, 1 on average over the cases. Those of
    scikit-learn, but for float32 rounding."""
    return len(targets) / (num_classes * torch.bincount(targets, minlength=num_classes).float())


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weight · cross-entropy.

    Not torch's weighted mean, which divides by the weights in the batch: in a batch of one class they would cancel.
    """
    return F.cross_entropy(logits.float(), targets, weight=weights, reduction="sum") / len(targets)


@dataclass(frozen=True)
class ClassifierMetadata:
    """What a classifier is and what it saw: all that prediction must know.

    Args:
        classes: names in the order of the outputs.
        volumes: how its training images were prepared.
        method: of the encoder's pretraining, None from scratch.
        epoch: that the weights are of (0-based).
    """

    spec: EncoderSpec
    classes: tuple[str, ...]
    pool: str
    inputs: Inputs
    volumes: VolumeFormat
    plans_name: str
    configuration: str
    method: str | None
    citations: tuple[str, ...]
    epoch: int = 0
    version: str = ""
    __pydantic_config__: ClassVar = CLOSED

    def to_json(self) -> str:
        """As stored in the file's header."""
        return json.dumps({**asdict(self), "spec": self.spec.to_dict(), "volumes": self.volumes.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "ClassifierMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a classifier.
        """
        data = from_json(text)
        if not isinstance(data, dict) or not isinstance(data.get("volumes"), dict):
            raise ValueError("no description of a classifier")
        return validated(cls, json.dumps({**data, "volumes": asdict(VolumeFormat.from_dict(data["volumes"]))}))


def save_classifier(path: Path, network: Classifier, metadata: ClassifierMetadata) -> None:
    """Writes the weights with their metadata, in one step.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    content = save(tensors, metadata={METADATA_KEY: header})
    write_with(path, lambda temporary: temporary.write_bytes(content))


def load_classifier(path: Path) -> tuple[Classifier, ClassifierMetadata]:
    """Classifier of a file in eval mode on the CPU.

    Raises:
        UserError: no such file, or not a classifier of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no classifier at {path}; make one with: hiendmae classify train")
    try:
        with safe_open(path, "pt") as f:
            metadata = ClassifierMetadata.from_json((f.metadata() or {})[METADATA_KEY])
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        check_size(metadata.spec, state)
        if metadata.inputs.size != metadata.spec.img_size:
            raise ValueError(f"inputs.size {metadata.inputs.size} is not spec.img_size {metadata.spec.img_size}")
        network = build_classifier(metadata.spec, len(metadata.classes), metadata.pool)
        network.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} is not a readable classifier ({reason}); train anew: hiendmae classify train") from e
    return network.eval(), metadata
