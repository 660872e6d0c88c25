"""Decoder parts that methods share."""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import sincos_positions, take_tokens
from nnunetv2_hiendmae.architectures.vit import init_transformer


class DecoderQueries(nn.Module):
    """Encoder tokens brought to the decoder's width, with mask tokens and decoder positions.

    The sequence stays in the order of the permutation: visible tokens first, then masked ones. Attention does
    not mind, and nothing has to be sorted back.
    """

    def __init__(self, spec: EncoderSpec, width: int):
        super().__init__()
        self.prefix = int(spec.cls_token)
        self.grid = spec.grid
        self.embed = nn.Linear(spec.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_positions(spec.grid, width).to(torch.get_default_device())
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Visible tokens (B, [1+]K, E) and token permutation (B, N) → (B, [1+]N, F); `grid` None: the spec's."""
        x = self.embed(tokens)
        cls, visible = x[:, : self.prefix], x[:, self.prefix :]
        masked = self.mask_token.expand(len(x), ids_shuffle.shape[1] - visible.shape[1], -1).to(x.dtype)
        queries = torch.cat([visible, masked], dim=1) + take_tokens(self.positions(grid), ids_shuffle)
        return torch.cat([cls, queries], dim=1)

    def positions(self, grid: Sequence[int] | None = None) -> Tensor:
        """Position table (1, N, F) of a grid: the spec's own, or a fixed one of that grid."""
        if grid is None or tuple(grid) == self.grid:
            return self.pos_embed
        return _fixed_positions(tuple(grid), self.pos_embed.shape[2], self.pos_embed.device)


@lru_cache(maxsize=16)
def _fixed_positions(grid: tuple[int, int, int], width: int, device: torch.device) -> Tensor:
    return sincos_positions(grid, width).to(device)


class MAEDecoder(nn.Module):
    """The plain decoder of He et al. 2022: self-attention blocks over all tokens, then pixels of the masked ones."""

    def __init__(self, spec: EncoderSpec, width: int, depth: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or width < 1 or width % num_heads or depth < 1:
            raise ValueError(
                f"decoder_dim {width} must be a multiple of decoder_heads {num_heads}, decoder_depth {depth} > 0"
            )
        norm = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.queries = DecoderQueries(spec, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, spec.mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, spec.patch_voxels)
        init_transformer(self)

    def forward(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Visible tokens (B, [1+]K, E) and token permutation (B, N) → patches of masked tokens (B, N − K, P).

        `grid` (d, h, w) is that of the crop; None: the spec's.
        """
        # the head is the widest layer of all: only what enters the loss goes through it
        return self.head(self.features(tokens, ids_shuffle, grid)[:, tokens.shape[1] :])

    def features(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The same → decoder tokens (B, [1+]N, F) after the norm, in the order of `ids_shuffle`."""
        x = self.queries(tokens, ids_shuffle, grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
