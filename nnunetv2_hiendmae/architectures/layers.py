"""What the two encoders share: patch embedding, position table, transformer blocks, initialisation."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import sincos_positions


class PatchEmbed(nn.Module):
    """Linear embedding of patches. The weight has the shape of a convolution kernel (E, C, p_d, p_h, p_w),
    as every foreign checkpoint has it, but is applied as a matrix: only visible patches are ever multiplied."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: Sequence[int]):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, embed_dim, tuple(patch_size), tuple(patch_size))

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Edge of a patch per axis."""
        return self.proj.kernel_size

    def forward(self, patches: Tensor) -> Tensor:
        """(B, K, P) → (B, K, E)."""
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


def position_table(spec: EncoderSpec) -> nn.Parameter:
    """Positions (1, N, E) of the spec's grid, trained if they are "learned"."""
    table = sincos_positions(spec.grid, spec.embed_dim).to(torch.get_default_device())
    return nn.Parameter(table, requires_grad=spec.pos_embed == "learned")


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """Stochastic depth, rising linearly from 0 to `rate` over the blocks."""
    return torch.linspace(0, rate, blocks, device="cpu").tolist()


def transformer_blocks(
    spec: EncoderSpec, drop_paths: Sequence[float], layer_scale: float | None = None
) -> nn.ModuleList:
    """The spec's pre-norm blocks, one per entry of `drop_paths`; `layer_scale` is the start of LayerScale's γ."""
    norm = partial(nn.LayerNorm, eps=spec.norm_eps)
    return nn.ModuleList(
        Block(
            spec.embed_dim,
            spec.num_heads,
            spec.mlp_ratio,
            qkv_bias=True,
            init_values=layer_scale,
            norm_layer=norm,
            drop_path=rate,
        )
        for rate in drop_paths
    )


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


def encoder_layers() -> dict[str, Any]:
    """Layers of a network with an `encoder`, from the bottom, as timm's `group_matcher` names them: what comes before
    the transformer, each of its blocks, and the final norm with all that is not the encoder. Relative position biases
    are among the last: they belong to every block at once, and pretraining has none."""
    # sorts after any block; timm's own 99999 would join the rest to the last block
    above = 9999
    return {
        "stem": r"^encoder\.(?!blocks\.|norm\.|rel_pos_bias)",
        "blocks": [(r"^encoder\.blocks\.(\d+)", None), (r".*", (above,))],
    }
