"""Models Genesis: crops are distorted, the encoder restores them (docs/methods.md, "Baselines of the papers")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.pretraining.declared import DeclaredGenesis
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.training.views import Crop, Volume

# points of an intensity curve
CURVE_POINTS = 1000
# boxes that are painted: at most so many, each with this probability, but for the first of those that all around is
# painted of, which is always there (as the authors' program)
PAINTED, P_PAINT_MORE = 5, 0.95


def intensity_curve(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A cubic Bézier curve from (0, 0) to (1, 1) with random control points, monotone; falling with probability .5."""
    t = np.linspace(0, 1, CURVE_POINTS)
    weights = np.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x, y = (np.array([*rng.random(2), 1.0]) @ weights for _ in range(2))
    return x, y[::-1] if rng.random() < 0.5 else y


def shuffle_windows(image: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Shuffles the voxels of `count` windows of an image (C, D, H, W), one after the other, in place, channels alike.
    Edges are random, up to a tenth of the image's."""
    for _ in range(count):
        window = image[(slice(None), *_box(image.shape[1:], lambda s: (1, max(2, s // 10)), rng))]
        window[:] = rng.permutation(window.reshape(len(image), -1), axis=1).reshape(window.shape)


def paint(image: np.ndarray, outside: bool, rng: np.random.Generator) -> None:
    """Fills up to five boxes of an image (C, D, H, W), of a sixth to a third of its edges, with noise in [0, 1), in
    place; `outside`: all but one to five boxes of three to four sevenths."""
    painted, count = np.full(image.shape[1:], outside), int(outside)
    while count < PAINTED and rng.random() < P_PAINT_MORE:
        count += 1
    for _ in range(count):
        edges = (lambda s: (s - 4 * s // 7, s - 3 * s // 7)) if outside else (lambda s: (s // 6, s // 3))
        painted[_box(painted.shape, edges, rng)] = not outside
    image[:, painted] = rng.random((len(image), int(painted.sum())), dtype=np.float32)


def _box(shape: Sequence[int], edges: Callable[[int], tuple[int, int]], rng: np.random.Generator) -> tuple[slice, ...]:
    """A random box inside; `edges` says the shortest and longest edge along an axis of so many voxels."""
    sizes = [int(rng.integers(low, high + 1)) for low, high in map(edges, shape)]
    corners = [int(rng.integers(s - e + 1)) for s, e in zip(shape, sizes, strict=True)]
    return tuple(slice(c, c + e) for c, e in zip(corners, sizes, strict=True))


@dataclass(frozen=True)
class DistortedCrop(Crop):
    """A crop, "image" (C, D, H, W) with its "lower" corner, and what became of it, "distorted", as the method's options
    say. Intensities that leave [0, 1] are taken there and back, by each channel's least and largest in the crop."""

    options: DeclaredGenesis.Options

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        sample = super().draw(volume, rng)
        image, axes = sample["image"].numpy(), (1, 2, 3)
        low = np.minimum(image.min(axes, keepdims=True), 0)
        span = np.maximum(image.max(axes, keepdims=True), 1) - low
        distorted = self.distort((image - low) / span, rng) * span + low
        return {**sample, "distorted": torch.from_numpy(distorted)}

    def distort(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Intensities in [0, 1] (C, D, H, W) → the same, float32, distorted; `image` may change."""
        chosen = self.options
        if rng.random() < chosen.shuffle:
            shuffle_windows(image, chosen.windows, rng)
        if rng.random() < chosen.nonlinear:
            image = np.interp(image, *intensity_curve(rng)).astype(np.float32)
        if rng.random() < chosen.paint:
            paint(image, rng.random() < chosen.paint_outside, rng)
        return image


class Genesis(DeclaredGenesis, Method):
    """Restores distorted crops: one linear layer from each token to its voxels; mean squared error over all of them."""

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        self.encoder = build_encoder(spec)
        self.head = nn.Linear(spec.embed_dim, spec.patch_voxels)
        init_transformer(self.head)

    def views(self) -> DistortedCrop:
        return DistortedCrop(self.spec.img_size, self.options)

    def restore(self, distorted: Tensor) -> Tensor:
        """Distorted crops (B, C, D, H, W) → restored ones."""
        tokens, _ = self.encoder(distorted)
        patches = self.head(tokens[:, self.encoder.num_prefix_tokens :]).float()
        return tk.unpatchify(patches, self.spec.grid, self.spec.patch_size)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        return {"loss": F.mse_loss(self.restore(views["distorted"]), views["image"])}

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        image, distorted = views["image"], views["distorted"]
        nothing = torch.zeros_like(image[:, 0], dtype=torch.bool)
        return {"crop": Reconstruction(image, distorted, self.restore(distorted), nothing, true_scale=False)}
