"""The plain ViT encoder that pretraining and fine-tuning share."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.layers import (
    BLOCK_TENSORS,
    Axes,
    Encoder,
    PatchEmbed,
    drop_path_rates,
    init_transformer,
    position_table,
    transformer_blocks,
)
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import patchify, take_tokens, token_grid


class ViTEncoder(Encoder):
    """Pre-norm vision transformer over 3D patches (docs/methods.md, "Shared building blocks").

    `pos_embed` is stored with the weights: a foreign or trained table travels with the file. It holds no CLS
    row, the CLS token's position is zero.
    """

    kind = "vit"
    network = "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"
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
        self.pos_embed = position_table(spec)
        self.blocks = transformer_blocks(spec, drop_path_rates(spec.drop_path_rate, spec.depth))
        self.norm = nn.LayerNorm(e, eps=spec.norm_eps)
        init_transformer(self)

    def forward(self, x: Tensor, idx_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens and taps of the visible patches.

        Args:
            x: (B, C, D, H, W), each axis a multiple of the patch.
            idx_keep: (B, K) visible tokens in raster numbering; None: all N in raster order.

        Returns:
            Tokens after the final norm (B, [1+]K, E), CLS first if there is one, and the list of tap outputs
            of the same shape, before the norm.
        """
        tokens = patchify(x, self.spec.patch_size)
        positions = self.positions(token_grid(x.shape[2:], self.spec.patch_size))
        if idx_keep is not None:
            tokens, positions = take_tokens(tokens, idx_keep), take_tokens(positions, idx_keep)
        tokens = self.patch_embed(tokens) + positions
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in self.spec.taps:
                outputs[i] = tokens
        return self.norm(tokens), [outputs[i] for i in self.spec.taps]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Dense maps (B, E, d, h, w) for segmentation, fine to coarse: the taps, then the normed output.

        A plain ViT has one resolution; "fine to coarse" is the order in which a UNETR decoder uses them.
        """
        tokens, taps = self(x)
        grid = token_grid(x.shape[2:], self.spec.patch_size)
        prefix = self.num_prefix_tokens
        return [t[:, prefix:].transpose(1, 2).unflatten(2, grid) for t in [*taps, tokens]]
