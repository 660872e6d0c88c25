"""MiM's fine-tuning network: the hybrid encoder and a convolutional decoder for segmentation."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.convvit import HALF
from nnunetv2_hiendmae.architectures.layers import encoder_layers
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.unetr import UpStep, residual_block
from nnunetv2_hiendmae.architectures.vit import build_encoder


class ConvViTUNETR(nn.Module):
    """The fine-tuning network of MiM (METHODS §3): `ConvViTEncoder`, one further halving, Swin-UNETR-like decoder.

    Takes (B, C, D, H, W) with every axis a multiple of twice the encoder's patch (32), gives logits
    (B, num_classes, D, H, W). The signature is nnU-Net's, so that plans can name this class.

    Widths from fine to coarse, w = `decoder_width`: w at full resolution, w·2^i at the i-th convolutional stage, E
    at the transformer, 2E below it. The authors' E is 8w and their stages are as wide as the decoder; a skip block
    projects where a stage is not.

    The bottleneck's BatchNorm3d becomes nn.SyncBatchNorm when nnU-Net trains on several GPUs. As in `ViTUNETR`
    there is deliberately no `initialize`.

    Args:
        input_channels: channels of the image, cascade inputs included.
        num_classes: channels of the logits.
        deep_supervision: must be false; there is one output.
        decoder_width: channels w of the decoder at full resolution.
        spec_kwargs: the fields of `EncoderSpec` without `in_channels`, lists allowed for tuples; `dense` is set.

    Raises:
        ValueError: deep supervision is asked for, the spec is invalid or of another kind, or a crop does not fit.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        decoder_width: int = 48,
        **spec_kwargs: Any,
    ):
        super().__init__()
        if deep_supervision:
            raise ValueError(
                "ConvViTUNETR has one output, deep supervision needs several: train with -tr nnUNetTrainer_MiM or "
                "nnUNetTrainer_ViTUNETR, which switch it off"
            )
        self.spec = EncoderSpec.from_dict(dict(in_channels=input_channels, **_dense(spec_kwargs)))
        self._check_crop(self.spec.img_size)
        e, w, stem = self.spec.embed_dim, decoder_width, self.spec.stem_dims
        self.encoder = build_encoder(self.spec)
        self.bottleneck = nn.Sequential(nn.Conv3d(e, 2 * e, HALF, HALF), nn.BatchNorm3d(2 * e), nn.GELU())
        self.image_block = residual_block(input_channels, w)
        self.skips = nn.ModuleList(residual_block(c, w << i) for i, c in enumerate(stem))
        self.bottleneck_block = residual_block(2 * e, 2 * e)
        widths = [2 * e, e, *(w << i for i in reversed(range(len(stem)))), w]
        self.ups = nn.ModuleList(UpStep(a, b, HALF) for a, b in pairwise(widths))
        self.head = nn.Conv3d(w, num_classes, kernel_size=1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of learning-rate decay, in timm's form."""
        return encoder_layers()

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


def _dense(spec_kwargs: dict[str, Any]) -> dict[str, Any]:
    kind = spec_kwargs.get("kind")
    if kind != "convvit":
        raise ValueError(f"ConvViTUNETR needs an encoder of kind 'convvit', got '{kind}'")
    return {**spec_kwargs, "dense": True}


def _layer_norm(x: Tensor) -> Tensor:
    """(B, C, D, H, W) normed over C, without affine. Plain memory order: as in `ViTUNETR`, the weights alone decide
    about the decoder's memory format."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-5).movedim(-1, 1).contiguous()
