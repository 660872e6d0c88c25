"""MiM's fine-tuning network: the hybrid encoder and a convolutional decoder for segmentation."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.convvit import HALF, ConvViTEncoder
from nnunetv2_hiendmae.architectures.layers import Axes
from nnunetv2_hiendmae.architectures.unetr import SegmentationNetwork, UpStep, residual_block


class ConvViTUNETR(SegmentationNetwork):
    """The fine-tuning network of MiM: the dense `ConvViTEncoder`, one further halving, Swin-UNETR-like decoder.

    Takes (B, C, D, H, W) with every axis a multiple of twice the encoder's patch (32), gives logits
    (B, num_classes, D, H, W). Arguments and errors: `SegmentationNetwork`.

    Widths from fine to coarse, w = `decoder_width`: w at full resolution, w·2^i at the i-th convolutional stage, E
    at the transformer, 2E below it. The authors' E is 8w and their stages are as wide as the decoder; a skip block
    projects where a stage is not.

    The bottleneck's BatchNorm3d becomes nn.SyncBatchNorm when nnU-Net trains on several GPUs.
    """

    encoder_classes = (ConvViTEncoder,)
    trainers = "nnUNetTrainer_MiM or nnUNetTrainer_ViTUNETR"
    default_width = 48
    axes: ClassVar = {r"bottleneck\.1\..*": Axes.NONE, **SegmentationNetwork.axes}

    def build_decoder(self, input_channels: int, width: int) -> None:
        self._check_crop(self.spec.img_size)
        e, w, stem = self.spec.embed_dim, width, self.spec.stem_dims
        self.bottleneck = nn.Sequential(nn.Conv3d(e, 2 * e, HALF, HALF), nn.BatchNorm3d(2 * e), nn.GELU())
        self.image_block = residual_block(input_channels, w)
        self.skips = nn.ModuleList(residual_block(c, w << i) for i, c in enumerate(stem))
        self.bottleneck_block = residual_block(2 * e, 2 * e)
        widths = [2 * e, e, *(w << i for i in reversed(range(len(stem)))), w]
        self.ups = nn.ModuleList(UpStep(a, b, HALF) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) → logits (B, num_classes, D, H, W).

        Raises:
            ValueError: an axis is no multiple of 32, or the bottleneck would be a single voxel.
        """
        self._check_crop(x.shape[2:])
        *stages, tokens, bottleneck = self.normed_maps(x)
        # the transformer's map joins as it is
        skips = [self.image_block(x), *(block(m) for block, m in zip(self.skips, stages, strict=True)), tokens]
        out = self.bottleneck_block(bottleneck)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            out = up(out, skip)
        return self.head(out)

    def normed_maps(self, x: Tensor) -> list[Tensor]:
        """What the decoder reads, fine to coarse: the encoder's maps and the bottleneck's, each voxel normed over
        its channels."""
        maps = self.encoder.feature_maps(x)
        return [_layer_norm(m) for m in (*maps, self.bottleneck(maps[-1].contiguous()))]

    def _check_crop(self, size: Sequence[int]) -> None:
        steps = [2 * p for p in self.spec.patch_size]
        if any(s % step for s, step in zip(size, steps, strict=True)):
            raise ValueError(f"crop {tuple(size)}: every axis must be a multiple of {steps[0]} voxels")
        if math.prod(size) == math.prod(steps):
            raise ValueError(f"crop {tuple(size)} leaves one voxel at the bottleneck: double an axis at least")


def _layer_norm(x: Tensor) -> Tensor:
    """(B, C, D, H, W) normed over C, without affine. Plain memory order: as in `ViTUNETR`, the weights alone decide
    about the decoder's memory format."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-5).movedim(-1, 1).contiguous()
