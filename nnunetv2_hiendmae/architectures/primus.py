"""Primus (Wald et al. 2025): the EVA-02 transformer of dynamic-network-architectures as an encoder of ours."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from timm.layers import build_rotary_pos_embed
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.kinds import Primus
from nnunetv2_hiendmae.architectures.layers import Axes, Encoder, PatchEmbed
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import patchify, take_tokens, token_grid

_PAIR = 2


def rotary_table(grid: Sequence[int], head_dim: int) -> Tensor:
    """Angles of a grid's tokens: (N, 2·head_dim), sines then cosines, raster order.

    A head's channels are three equal blocks, one per axis of the grid; in each of them pair p turns by
    t · 10000^(−p / (head_dim / 6)), where t counts the tokens along the axis. It is never rescaled: a larger crop goes
    on counting.
    """
    grid = [int(g) for g in grid]
    # with the grid as its own reference, as `Eva` asks for it: the same roundings
    waves = build_rotary_pos_embed(grid, dim=head_dim // 3 * _PAIR, in_pixels=False, ref_feat_shape=grid)
    return torch.cat(waves, dim=-1)


class PrimusEncoder(Primus, Encoder):
    """Rotary and learned positions, gated MLPs with a norm inside; LayerScale, norms in the attention and register
    tokens as the spec says. No CLS token.

    `Eva` builds and initialises positions and blocks. What it does to a sequence is done here: its own dropping of
    tokens does not run with timm 1.0.22, its tables fit one grid only, and it takes another of as many tokens without a
    word. Tokens lie in raster order, which is that of dynamic-network-architectures since 2025-06-24. The position of a
    register token is part of the token.
    """

    input_kernel = "patch_embed.proj.weight"
    axes: ClassVar = {
        r"patch_embed\.proj\.weight": Axes.KERNEL,
        r"pos_embed": Axes.TOKENS,
        r"blocks\.\d+\.attn\.(q_proj\.(weight|bias)|k_proj\.weight)": Axes.ROTARY,
        r"register_tokens|patch_embed\.proj\.bias|norm\.(weight|bias)": Axes.NONE,
        r"blocks\.\d+\.(gamma_[12]|(norm[12]|attn\.(v_proj|norm|proj)|mlp\.(fc1_g|fc1_x|norm|fc2))\.(weight|bias))": (
            Axes.NONE
        ),
    }

    def __init__(self, spec: EncoderSpec):
        super().__init__(spec)
        registers = spec.register_tokens
        eva = Eva(
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            scale_attn_inner=spec.inner_norm,
            drop_path_rate=spec.drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=spec.norm_eps),
            init_values=spec.layer_scale,
            ref_feat_shape=spec.grid,
            num_reg_tokens=registers,
            use_rot_pos_emb=False,
        )
        self.patch_embed = PatchEmbed(spec.in_channels, spec.embed_dim, spec.patch_size)
        self.patch_embed.apply(InitWeights_He(1e-2))
        self.register_tokens = nn.Parameter(eva.pos_embed[:, :registers].detach().clone()) if registers else None
        self.pos_embed = nn.Parameter(eva.pos_embed[:, registers:].detach().clone())
        self.blocks, self.norm = eva.blocks, eva.norm
        self.register_buffer("rotary", self._rotary(spec.grid), persistent=False)

    def _rotary(self, grid: Sequence[int]) -> Tensor:
        return rotary_table(grid, self.spec.embed_dim // self.spec.num_heads)

    def forward(self, x: Tensor, idx_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """See `Encoder`: tokens after the final norm, and the taps' outputs of the same shape before it."""
        grid = token_grid(x.shape[2:], self.spec.patch_size)
        patches = take_tokens(patchify(x, self.spec.patch_size), idx_keep)
        tokens = self.patch_embed(patches) + take_tokens(self.positions(grid), idx_keep)
        rotary = self.rotary if tuple(grid) == self.spec.grid else self._rotary(grid).to(self.rotary)
        if idx_keep is not None:
            # one table per sample; the axis of the heads is ours to add
            rotary = rotary[idx_keep][:, None]
        registers = self.spec.register_tokens
        if self.register_tokens is not None:
            tokens = torch.cat([self.register_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, rope=rotary)
            if i in self.spec.taps:
                outputs[i] = tokens[:, registers:]
        return self.norm(tokens[:, registers:]), [outputs[i] for i in self.spec.taps]
