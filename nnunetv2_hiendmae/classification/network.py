"""The classifier: pooled tokens of an encoder, LayerNorm, one linear layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder


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
    """Weights (K,) of the classes, n / (K · n_k): inverse to their frequency, 1 on average over the cases."""
    return len(targets) / (num_classes * torch.bincount(targets, minlength=num_classes).float())


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weight · cross-entropy.

    Not torch's weighted mean, which divides by the weights in the batch: in a batch of one class they would cancel.
    """
    return F.cross_entropy(logits.float(), targets, weight=weights, reduction="sum") / len(targets)
