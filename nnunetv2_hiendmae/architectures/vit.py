"""The plain ViT encoder that pretraining and fine-tuning share."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import layers
from nnunetv2_hiendmae.architectures.kinds import ViT
from nnunetv2_hiendmae.architectures.layers import BLOCK_TENSORS, Axes, Encoder, PatchEmbed
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import take_patches, take_tokens, token_grid


class ViTEncoder(ViT, Encoder):
    """Pre-norm vision transformer over 3D patches (docs/methods.md, "Shared building blocks").

    `pos_embed` is stored with the weights: a foreign or trained table travels with the file. It holds no CLS
    row, the CLS token's position is zero.
    """

    input_kernel = "patch_embed.proj.weight"
    axes: ClassVar = {
        r"patch_embed\.proj\.weight": Axes.KERNEL,
        r"pos_embed": Axes.TOKENS,
        rf"cls_token|patch_embed\.proj\.bias|norm\.(weight|bias)|{BLOCK_TENSORS}": Axes.NONE,
    }

    def __init__(self, spec: EncoderSpec):
        super().__init__(spec)
        e = spec.embed_dim
        self.patch_embed = PatchEmbed(spec.in_channels, e, spec.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, e)) if spec.cls_token else None
        self.pos_embed = layers.position_table(spec)
        self.blocks = layers.transformer_blocks(spec, layers.drop_path_rates(spec.drop_path_rate, spec.depth))
        self.norm = nn.LayerNorm(e, eps=spec.norm_eps)
        layers.init_transformer(self)

    def forward(self, x: Tensor, idx_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """See `Encoder`: tokens after the final norm, and the taps' outputs of the same shape before it."""
        patches = take_patches(x, self.spec.patch_size, idx_keep)
        positions = self.positions(token_grid(x.shape[2:], self.spec.patch_size))
        tokens = self.patch_embed(patches) + take_tokens(positions, idx_keep)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in self.spec.taps:
                outputs[i] = tokens
        return self.norm(tokens), [outputs[i] for i in self.spec.taps]
