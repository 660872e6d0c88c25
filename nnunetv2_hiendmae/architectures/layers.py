"""What encoders share: what each has to say of itself, patch embedding, positions, blocks, initialisation."""

import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.kinds import Kind
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import resample_positions, sincos_positions, token_grid


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
        segments: methods that pretraining may compile or compute twice, besides the blocks in lists called blocks.
            Other modules may have the attribute too.
        masked_only, dense_only: patterns of names that only the form of pretraining, or only that of fine-tuning has.
    """

    input_kernel: ClassVar[str]
    axes: ClassVar[dict[str, Axes]]
    segments: ClassVar[tuple[str, ...]] = ()
    masked_only: ClassVar[str] = ""
    dense_only: ClassVar[str] = ""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with CLS, else 0."""
        return int(self.spec.cls_token)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Where all maps have one resolution: the taps, then the normed output, the order in which a UNETR decoder uses
        them."""
        tokens, taps = self(x)
        grid = token_grid(x.shape[2:], self.spec.patch_size)
        return [t[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for t in [*taps, tokens]]

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


# Of a GPU's fused attention kernels, flash attention (16 bits, no mask) has its widths padded by PyTorch; the one for
# float32 and for masks takes multiples of 4 or 8 alone. With others, the released decoder's 33 for one, PyTorch falls
# back to one that holds all N x N weights. Zeros behind queries and keys change no product, those behind values are cut
# off again. The CPU's takes any width, and was 0 to 13 % slower with padding.
ANY_WIDTH_DEVICES = ("cpu",)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of queries (B, heads, N, d) to keys and values (B, heads, M, d) → (B, heads, N, d), in one kernel."""
    width = q.shape[-1]
    if width % 8 == 0 or q.device.type in ANY_WIDTH_DEVICES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)[..., :width]


class FusedAttention(Attention):
    """timm's self-attention, without dropout and norms, by `attend`."""

    @classmethod
    def of(cls, built: Attention) -> "FusedAttention":
        """The same layer: timm's blocks build their own."""
        made = cls.__new__(cls)
        made.__dict__.update(built.__dict__)
        return made

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, E) → (B, N, E)."""
        if not self.fused_attn or x.device.type in ANY_WIDTH_DEVICES:
            return super().forward(x, **({} if attn_mask is None else {"attn_mask": attn_mask}))
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, attn_mask).transpose(1, 2).flatten(2))


def transformer_block(width: int, num_heads: int, mlp_ratio: float, norm_eps: float, **more: Any) -> Block:
    """A pre-norm block, whatever the width of its heads; `more` are further arguments of timm's."""
    norm = partial(nn.LayerNorm, eps=norm_eps)
    block = Block(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm, **more)
    block.attn = FusedAttention.of(block.attn)
    return block


def transformer_blocks(
    spec: EncoderSpec, drop_paths: Sequence[float], layer_scale: float | None = None
) -> nn.ModuleList:
    """The spec's pre-norm blocks, one per entry of `drop_paths`; `layer_scale` is the start of LayerScale's γ."""
    block = partial(transformer_block, spec.embed_dim, spec.num_heads, spec.mlp_ratio, spec.norm_eps)
    return nn.ModuleList(block(init_values=layer_scale, drop_path=rate) for rate in drop_paths)


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
