"""SimCLR: two crops of one volume are told from those of all others (docs/methods.md, "Baselines of the papers")."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import Encoder, EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.pretraining.declared import DeclaredSimCLR
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method
from nnunetv2_hiendmae.training.views import Crop, Volume, draw_corner


class CropPair(Crop):
    """Two crops of one volume, each augmented in its own way: "images" (2, C, D, H, W) float32."""

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        corners = [draw_corner(volume, self.crop_size, self.foreground_share, rng) for _ in range(2)]
        images = torch.stack([torch.from_numpy(volume.read(corner, self.crop_size)) for corner in corners])
        if self.augmentation is not None:
            images = self.augmentation.apply(images, volume.spacing_mm, rng)
        return {"images": images}


def embed(encoder: Encoder, images: Tensor) -> Tensor:
    """Images (B, C, D, H, W) → the mean of their patch tokens (B, E)."""
    tokens, _ = encoder(images)
    return tokens[:, encoder.num_prefix_tokens :].mean(1)


def nt_xent(pairs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Contrast of pairs (B, 2, F): cross-entropy, in nats, of finding each one's partner among the 2B − 1 others by
    cosine similarity over `temperature`; and the share of those that are most similar to their partner."""
    embedded = F.normalize(pairs.flatten(0, 1).float(), dim=1)
    with torch.autocast(embedded.device.type, enabled=False):
        logits = embedded @ embedded.T / temperature
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    partner = torch.arange(len(logits), device=logits.device) ^ 1
    return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).float().mean()


class SimCLR(DeclaredSimCLR, Method):
    """Contrast of two crops per volume, over the micro-batches of all processes."""

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        self.encoder = build_encoder(spec)
        width = spec.embed_dim
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.options.projection_dim))
        init_transformer(self.head)

    def views(self) -> CropPair:
        return CropPair(self.spec.img_size)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """ "accuracy" is the share of crops whose partner is the most similar one."""
        pairs = self.head(embed(self.encoder, views["images"].flatten(0, 1))).unflatten(0, (-1, 2))
        loss, accuracy = nt_xent(self.gather(pairs.float()), self.options.temperature)
        return {"loss": loss, "accuracy": accuracy}
