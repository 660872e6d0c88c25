"""The plain ViT encoder that pretraining and fine-tuning share."""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import (
    patchify,
    resample_positions,
    sincos_positions,
    take_tokens,
)


class PatchEmbed(nn.Module):
    """Linear embedding of patches. The weight has the shape of a convolution kernel (E, C, p_d, p_h, p_w),
    as every foreign checkpoint has it, but is applied as a matrix: only visible patches are ever multiplied."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.patch_size = spec.patch_size
        self.proj = nn.Conv3d(spec.in_channels, spec.embed_dim, spec.patch_size, spec.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, K, P) → (B, K, E)."""
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class ViTEncoder(nn.Module):
    """Pre-norm vision transformer over 3D patches (METHODS §0, §2).

    `pos_embed` is stored with the weights: a foreign or trained table travels with the file. It holds no CLS
    row, the CLS token's position is zero.
    """

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec
        e = spec.embed_dim
        norm = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.patch_embed = PatchEmbed(spec)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, e)) if spec.cls_token else None
        self.pos_embed = nn.Parameter(
            sincos_positions(spec.grid, e).to(torch.get_default_device()),
            requires_grad=spec.pos_embed == "learned",
        )
        drop_path = torch.linspace(0, spec.drop_path_rate, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(e, spec.num_heads, spec.mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=drop_path[i])
            for i in range(spec.depth)
        )
        self.norm = norm(e)
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
        positions = self.positions([s // p for s, p in zip(x.shape[2:], self.spec.patch_size, strict=True)])
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
        grid = [s // p for s, p in zip(x.shape[2:], self.spec.patch_size, strict=True)]
        prefix = self.num_prefix_tokens
        return [t[:, prefix:].transpose(1, 2).unflatten(2, grid) for t in [*taps, tokens]]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with CLS, else 0."""
        return int(self.cls_token is not None)

    def positions(self, grid: list[int]) -> Tensor:
        """Position table (1, N, E) of a grid, resampled where it is not the spec's."""
        return resample_positions(self.pos_embed, self.spec.grid, grid)


def init_transformer(module: nn.Module) -> None:
    """METHODS §0: Xavier-uniform linears and patch embedding (as a matrix), zero biases, tokens N(0, 0.02)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, PatchEmbed):
            # as a matrix (E, P): init's fan computation for a 5D kernel would differ
            bound = math.sqrt(6.0 / (child.proj.weight.shape[0] + child.proj.weight[0].numel()))
            nn.init.uniform_(child.proj.weight, -bound, bound)
            nn.init.zeros_(child.proj.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


def build_encoder(spec: EncoderSpec) -> ViTEncoder:
    """Encoder of a spec, freshly initialised."""
    return {"vit": ViTEncoder}[spec.kind](spec)
