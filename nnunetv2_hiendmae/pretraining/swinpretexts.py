"""Swin-UNETR's three pretexts on a ViT: inpainting, rotation, contrast (docs/methods.md, "Baselines of the papers")."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.declared import DeclaredSwinPretexts
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.pretraining.simclr import nt_xent
from nnunetv2_hiendmae.training.views import Crop, Volume

VIEWS, TURNS = 2, 4
# edges of a box that is cut out, as shares of the crop's: ours, none are published
CUTOUT_EDGES = (0.1, 0.4)


def draw_cutout(shape: tuple[int, int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Boxes of random edges anywhere in a crop, bool (D, H, W), so many that they hide a share of its voxels; of the
    last one only the first slices that it takes."""
    hidden, wanted = np.zeros(shape, bool), round(share * math.prod(shape))
    while (missing := wanted - np.count_nonzero(hidden)) > 0:
        edges = [max(1, round(s * rng.uniform(*CUTOUT_EDGES))) for s in shape]
        corner = [int(rng.integers(s - e + 1)) for s, e in zip(shape, edges, strict=True)]
        box = hidden[tuple(slice(c, c + e) for c, e in zip(corner, edges, strict=True))]
        fresh = np.cumsum(~box).reshape(box.shape)
        box |= fresh <= missing
    return hidden


@dataclass(frozen=True)
class CutoutPair(Crop):
    """A crop, "image" (C, D, H, W) with its "lower" corner, and what makes two views of it: quarter turns in the plane
    of the last two axes, "turns" (2,) int64, and what is then cut out, "hidden" (2, D, H, W) bool."""

    share: float

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        sample = super().draw(volume, rng)
        hidden = np.stack([draw_cutout(self.crop_size, self.share, rng) for _ in range(VIEWS)])
        turns = torch.from_numpy(rng.integers(TURNS, size=VIEWS))
        return {**sample, "turns": turns, "hidden": torch.from_numpy(hidden)}


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Each of the images (B, C, D, H, H) by its number (B,) of quarter turns about the first spatial axis."""
    # by its two bits, and not by numbers on the CPU, which would wait for a GPU to hand them out
    quarter, half = (((turns & bit) > 0).reshape(-1, 1, 1, 1, 1) for bit in (1, 2))
    turned = torch.where(half, images.flip(-2, -1), images)
    return torch.where(quarter, turned.rot90(1, (-2, -1)), turned)


class SwinPretexts(DeclaredSwinPretexts, Method):
    """Two views of a crop, each turned and cut out, are restored by one linear layer (mean absolute error over all
    voxels), their turns are told, and they are told from the views of other crops."""

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        if spec.img_size[1] != spec.img_size[2]:
            crop = f"{spec.img_size} voxels (D, H, W)"
            raise UserError(f"{self.name} turns crops of {crop} in plane, needed H equal to W; choose --crop-size")
        self.encoder = build_encoder(spec)
        self.inpainting = nn.Linear(spec.embed_dim, spec.patch_voxels)
        self.rotation = nn.Linear(spec.embed_dim, TURNS)
        self.contrast = nn.Linear(spec.embed_dim, self.options.projection_dim)
        for head in (self.inpainting, self.rotation, self.contrast):
            init_transformer(head)

    def views(self) -> CutoutPair:
        # flips and turns would change the answer
        return CutoutPair(self.spec.img_size, self.options.cutout, augmentation=None)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """ "loss_inpainting" is a mean over voxels, "loss_rotation" and "loss_contrast" are in nats; accuracies are
        shares of views."""
        chosen, turns = self.options, views["turns"].flatten()
        turned = turn(views["image"].repeat_interleave(VIEWS, 0), turns)
        tokens = self.encode(turned, views["hidden"].flatten(0, 1))
        told, embedded = self.rotation(tokens.mean(1)).float(), self.contrast(tokens.mean(1)).float()
        inpainting, rotation = F.l1_loss(self.inpaint(tokens), turned), F.cross_entropy(told, turns)
        contrast, accuracy = nt_xent(self.gather(embedded.unflatten(0, (-1, VIEWS))), chosen.temperature)
        weighted = chosen.weight_inpainting * inpainting + chosen.weight_rotation * rotation
        losses = {"loss_inpainting": inpainting, "loss_rotation": rotation, "loss_contrast": contrast}
        return {
            "loss": weighted + chosen.weight_contrast * contrast,
            **{name: loss.detach() for name, loss in losses.items()},
            "accuracy_rotation": (told.argmax(1) == turns).float().mean(),
            "accuracy_contrast": accuracy,
        }

    def encode(self, turned: Tensor, hidden: Tensor) -> Tensor:
        """Views (B, C, D, H, W), and what is cut out of them (B, D, H, W), which becomes 0 → patch tokens (B, N, E)."""
        tokens, _ = self.encoder(turned.masked_fill(hidden[:, None], 0))
        return tokens[:, self.encoder.num_prefix_tokens :]

    def inpaint(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, E) → views (B, C, D, H, W)."""
        return tk.unpatchify(self.inpainting(tokens).float(), self.spec.grid, self.spec.patch_size)

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The first view of each crop, turned back."""
        image, turns, hidden = views["image"], views["turns"][:, 0], views["hidden"][:, 0]
        made = turn(self.inpaint(self.encode(turn(image, turns), hidden)), -turns)
        cut = turn(hidden[:, None], -turns)
        return {"crop": Reconstruction(image, image.masked_fill(cut, 0), made, cut[:, 0], true_scale=False)}
