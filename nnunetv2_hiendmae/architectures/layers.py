"""What encoders share: what each has to say of itself, patch embedding, positions, blocks, initialisation."""

import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import ClassVar

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.kinds import Kind
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import resample_positions, sincos_positions


class Axes(Enum):
    """How a tensor lies along the axes of the volume."""

    NONE = "not at all"
    KERNEL = "of a convolution: (out, in, d, h, w)"
    TOKENS = "(A, N, E): a row per token of the grid, in raster order"
    OFFSETS = "(A, N', E): a row per offset between two tokens, in raster order of 2g - 1 offsets an axis"
    ROTARY = "(E, …) of queries or keys: every head's channels are three equal blocks, each turned along one axis"

    def rows(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Rows per axis that a table of this kind has for a token grid."""
        return tuple(grid) if self is Axes.TOKENS else tuple(2 * g - 1 for g in grid)


def axes_of(name: str, declared: Mapping[str, Axes]) -> Axes | None:
    """The first declaration whose pattern is the whole name; None: nobody declared this tensor."""
    return next((axes for pattern, axes in declared.items() if re.fullmatch(pattern, name)), None)


# tensors of `transformer_blocks`, LayerScale left out
BLOCK_TENSORS = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"


class Encoder(Kind, nn.Module):
    """A kind of encoder: what pretraining, segmentation, plans and weights on disk need of it.

    `forward(x, idx_keep=None)` takes a volume (B, C, D, H, W), each axis a multiple of the patch, and the visible
    tokens (B, K) in raster numbering (None: all N in raster order). It gives their tokens (B, [1+]K, E), CLS first if
    there is one, and the list of the taps' outputs. `feature_maps(x)` gives dense maps (B, width, d, h, w) from fine to
    coarse. Everything else that differs between kinds is declared here and in its `Kind`, and nowhere else asked by
    name.

    Attributes:
        input_kernel: name of the weight that reads the image's channels.
        axes: pattern of tensor names → how they lie along the volume's axes; the first that fits counts.
        masked_only, dense_only: patterns of names that only the form of pretraining, or only that of fine-tuning has.
    """

    input_kernel: ClassVar[str]
    axes: ClassVar[dict[str, Axes]]
    masked_only: ClassVar[str] = ""
    dense_only: ClassVar[str] = ""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with CLS, else 0."""
        return int(self.spec.cls_token)

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Position table (1, N, E) of a grid, resampled where it is not the spec's."""
        return resample_positions(self.pos_embed, self.spec.grid, grid)


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
    block = partial(Block, spec.embed_dim, spec.num_heads, spec.mlp_ratio, qkv_bias=True, init_values=layer_scale)
    return nn.ModuleList(block(norm_layer=norm, drop_path=rate) for rate in drop_paths)


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform linears and patch embedding (as a matrix), zero biases, tokens N(0, 0.02)."""
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
