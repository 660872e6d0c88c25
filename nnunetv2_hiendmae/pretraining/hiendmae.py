"""Hi-End-MAE: a decoder that cross-attends to the encoder's layers, deep to shallow (docs/methods.md, "Hi-End-MAE")."""

import math
from functools import partial
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.layers import FusedAttention, attend, init_transformer, transformer_block
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.declared import DeclaredHiEndMAE
from nnunetv2_hiendmae.pretraining.masked import DecoderQueries, MaskedCropMethod

# the released decoders: width by encoder width; 528 is no rule of 1536
RELEASED_DECODER_DIM = {1536: 528, 768: 384}


class CrossAttention(nn.Module):
    """Multi-head attention of queries x to keys and values y of the same width."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, N, F), (B, M, F) → (B, N, F)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to un-normed encoder tokens, MLP; each pre-norm with a residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.norm_self, self.norm_cross, self.norm_mlp = norm(dim), norm(dim), norm(dim)
        self.self_attn = FusedAttention(dim, num_heads, qkv_bias=True)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Queries x (B, [1+]N, F), encoder tokens y (B, [1+]K, F) → (B, [1+]N, F)."""
        x = x + self.self_attn(self.norm_self(x))
        x = x + self.cross_attn(self.norm_cross(x), y)
        return x + self.mlp(self.norm_mlp(x))


class HiEndMAE(DeclaredHiEndMAE, MaskedCropMethod):
    """Hierarchical encoder-driven masked autoencoder.

    The paper's figure shows one self-attention block and post-norm; the released weights have two and
    pre-norm, which is what is built here.
    """

    unbiased_target = False

    def __init__(self, spec: EncoderSpec, **options: Any):
        if not spec.taps:
            raise UserError(
                f"{self.name} cross-attends to layers of a plain ViT, the encoder is of kind '{spec.kind}' and has no "
                "such layers; choose a vit_… with --encoder (see: hiendmae presets), or another --method"
            )
        super().__init__(spec, **options)
        dim, heads, self_depth = self.options.decoder_dim, self.options.decoder_heads, self.options.self_depth
        heads = spec.num_heads if heads is None else heads
        dim = _default_decoder_dim(spec.embed_dim, heads) if dim is None else dim
        if heads < 1 or dim < 1 or dim % heads or self_depth < 0:
            raise ValueError(
                f"decoder_dim {dim} must be a multiple of decoder_heads {heads}, both positive, and self_depth "
                f"{self_depth} not negative"
            )
        self.queries = DecoderQueries(spec, dim)
        self.tap_embeds = nn.ModuleList(nn.Linear(spec.embed_dim, dim) for _ in spec.taps)
        self.self_blocks = nn.ModuleList(
            transformer_block(dim, heads, spec.mlp_ratio, spec.norm_eps) for _ in range(self_depth)
        )
        self.cross_blocks = nn.ModuleList(CrossBlock(dim, heads, spec.mlp_ratio, spec.norm_eps) for _ in spec.taps)
        self.norm = nn.LayerNorm(dim, eps=spec.norm_eps)
        self.head = nn.Linear(dim, spec.patch_voxels)
        for part in (self.queries, self.tap_embeds, self.self_blocks, self.cross_blocks, self.norm, self.head):
            init_transformer(part)

    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        tokens, taps = self.encoder(image, ids_shuffle[:, : self.visible])
        return self.head(self.decode(tokens, taps, ids_shuffle)[:, tokens.shape[1] :])

    def decode(self, tokens: Tensor, taps: list[Tensor], ids_shuffle: Tensor) -> Tensor:
        """Normed tokens and taps (B, [1+]K, E) → normed decoder tokens (B, [1+]N, F) in the order of `ids_shuffle`."""
        x = self.queries(tokens, ids_shuffle)
        for block in self.self_blocks:
            x = block(x)
        keys = [embed(tap) for embed, tap in zip(self.tap_embeds, taps, strict=True)]
        for block, y in zip(self.cross_blocks, reversed(keys), strict=True):
            x = block(x, y)
        return self.norm(x)


def _default_decoder_dim(embed_dim: int, heads: int) -> int:
    if embed_dim in RELEASED_DECODER_DIM:
        return RELEASED_DECODER_DIM[embed_dim]
    # divisible by the heads, and by the 6 of the sin-cos table
    unit = math.lcm(6, heads)
    return max(unit, embed_dim // 2 // unit * unit)
