"""MiM's hybrid encoder: convolutional stages, then a transformer (docs/methods.md, "MiM")."""

import math
from typing import ClassVar

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import layers
from nnunetv2_hiendmae.architectures.depthwise import DepthwiseConv3d
from nnunetv2_hiendmae.architectures.kinds import ConvViT
from nnunetv2_hiendmae.architectures.layers import BLOCK_TENSORS, Axes, Encoder, PatchEmbed
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import resample_positions, take_tokens, token_grid

# the transformer's norms use the spec's epsilon, all others PyTorch's default
CONV_NORM_EPS = 1e-5
HALF = (2, 2, 2)


def channels_last_patches(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(B, D, H, W, C) → (B, N, P), as `patchify`; gradients stay channels-last."""
    b, *size, c = x.shape
    (pd, ph, pw), (gd, gh, gw) = patch_size, token_grid(size, patch_size)
    x = x.reshape(b, gd, pd, gh, ph, gw, pw, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, gd * gh * gw, pd * ph * pw * c)


def hidden_voxels(idx_keep: Tensor, grid: list[int], factor: int) -> Tensor:
    """Keep indices (B, K) → bool (B, D, H, W, 1), true where hidden, with `factor` voxels per token edge."""
    b, (d, h, w) = len(idx_keep), grid
    hidden = torch.ones(b, d * h * w, dtype=torch.bool, device=idx_keep.device).scatter(1, idx_keep, False)
    blocks = hidden.reshape(b, d, 1, h, 1, w, 1).expand(-1, -1, factor, -1, factor, -1, factor)
    return blocks.reshape(b, d * factor, h * factor, w * factor, 1)


def relative_index(grid: list[int], device: torch.device) -> Tensor:
    """(N, N): row of the offset table, raster over 2g-1 offsets per axis, for query i and key j."""
    axes = torch.meshgrid(*(torch.arange(g, device=device) for g in grid), indexing="ij")
    index = torch.zeros((), dtype=torch.long, device=device)
    for axis, g in zip(axes, grid, strict=True):
        places = axis.reshape(-1)
        index = index * (2 * g - 1) + places[:, None] - places[None, :] + g - 1
    return index


class NormedEmbed(PatchEmbed):
    """Patches of 2³ voxels → norm → GELU: (B, K, P) → (B, K, out)."""

    segments = ("forward",)

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, HALF)
        self.norm = nn.LayerNorm(out_channels, eps=CONV_NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        return F.gelu(self.norm(super().forward(patches)))


class ConvBlock(nn.Module):
    """x += pw2(dw(pw1(norm x))), x += mlp(norm x), on channels-last maps: 1³ convolutions are linear layers."""

    segments = ("_mix", "_transform")

    def __init__(self, width: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=CONV_NORM_EPS)
        self.pw1 = nn.Linear(width, width)
        self.dw = DepthwiseConv3d(width, kernel_size=5)
        self.pw2 = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=CONV_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """(B, D, H, W, C) → the same; `hidden` voxels (B, D, H, W, 1) are zero for their neighbours."""
        x = x + self._mix(x, hidden)
        return x + self._transform(x)

    def _mix(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        y = self.pw1(self.norm1(x))
        if hidden is not None:
            y = y.masked_fill(hidden, 0)
        y = self.dw(y.movedim(-1, 1)).movedim(1, -1)
        return self.drop_path(self.pw2(y))

    def _transform(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))


class ConvStage(nn.Module):
    """Halves the map, then conv blocks."""

    def __init__(self, in_channels: int, width: int, mlp_ratio: float, drop_paths: list[float]):
        super().__init__()
        self.embed = NormedEmbed(in_channels, width)
        self.blocks = nn.ModuleList(ConvBlock(width, mlp_ratio, rate) for rate in drop_paths)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """(B, D, H, W, in) → (B, D/2, H/2, W/2, width)."""
        grid = token_grid(x.shape[1:4], HALF)
        x = self.embed(channels_last_patches(x, HALF)).unflatten(1, grid)
        for block in self.blocks:
            x = block(x, hidden)
        return x


class ConvViTEncoder(ConvViT, Encoder):
    """Convolutional stages at 1/2, 1/4, 1/8 and a transformer at 1/16 of the crop; no CLS, no taps.

    Two forms. For pretraining: `forward`, with fusion convolutions from the stages into the visible tokens and a
    final norm. `spec.dense`, for fine-tuning: only `feature_maps`, and the transformer has a learned relative
    position bias (`rel_pos_bias` holds one table per block, zero at start) and LayerScale (1 at start).

    Maps are channels-last inside, so that norms and 1³ convolutions work on rows without copies. Stochastic depth
    rises over all blocks, the convolutional ones first (ours). Depth-wise kernels keep PyTorch's initialisation,
    everything else is `init_transformer`.
    """

    input_kernel = "stages.0.embed.proj.weight"
    axes: ClassVar = {
        r"(embed|stages\.\d+\.embed|fusions\.\d+)\.proj\.weight|stages\.\d+\.blocks\.\d+\.dw\.weight": Axes.KERNEL,
        r"pos_embed": Axes.TOKENS,
        r"rel_pos_bias": Axes.OFFSETS,
        rf"{BLOCK_TENSORS}|blocks\.\d+\.ls[12]\.gamma|embed_linear\.weight": Axes.NONE,
        r"stages\.\d+\.blocks\.\d+\.(pw[12]|mlp\.fc[12])\.weight": Axes.NONE,
        r"(.*\.)?(norm|norm1|norm2)\.(weight|bias)|(embed|stages|fusions).*\.bias": Axes.NONE,
    }
    segments = ("_fused",)
    masked_only = r"fusions\..*|norm\.(weight|bias)"
    dense_only = r"rel_pos_bias|blocks\.\d+\.ls[12]\.gamma"

    def __init__(self, spec: EncoderSpec):
        super().__init__(spec)
        e, stem = spec.embed_dim, spec.stem_dims
        rates = iter(layers.drop_path_rates(spec.drop_path_rate, sum(spec.stem_depths) + spec.depth))
        self.stages = nn.ModuleList(
            ConvStage(in_channels, width, spec.mlp_ratio, [next(rates) for _ in range(depth)])
            for in_channels, width, depth in zip((spec.in_channels, *stem), stem, spec.stem_depths, strict=False)
        )
        self.embed = NormedEmbed(stem[-1], e)
        self.embed_linear = nn.Linear(e, e)
        self.pos_embed = layers.position_table(spec)
        self.blocks = layers.transformer_blocks(spec, list(rates), layer_scale=1.0 if spec.dense else None)
        if spec.dense:
            offsets = math.prod(2 * g - 1 for g in spec.grid)
            self.rel_pos_bias = nn.Parameter(torch.zeros(spec.depth, offsets, spec.num_heads))
        else:
            factors = [2 << i for i in reversed(range(len(stem)))]
            self.fusions = nn.ModuleList(PatchEmbed(c, e, (f, f, f)) for c, f in zip(stem, factors, strict=True))
            self.norm = nn.LayerNorm(e, eps=spec.norm_eps)
        layers.init_transformer(self)

    def forward(self, x: Tensor, idx_keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """See `Encoder`: tokens after fusion and the final norm, each computed from visible voxels alone; no taps.

        Raises:
            ValueError: the encoder is the dense form.
        """
        if self.spec.dense:
            raise ValueError("a dense ConvViTEncoder has no masked forward: use feature_maps, or dense=False")
        grid = token_grid(x.shape[2:], self.spec.patch_size)
        maps = self._stage_maps(x, grid, idx_keep)
        tokens = self._transformer(maps[-1], grid, idx_keep)
        for stage_map, fusion in zip(maps, self.fusions, strict=True):
            tokens = tokens + self._fused(fusion, stage_map, idx_keep)
        return self.norm(tokens), []

    def _fused(self, fusion: PatchEmbed, stage_map: Tensor, idx_keep: Tensor | None) -> Tensor:
        """A stage's output in the visible tokens."""
        return fusion(take_tokens(channels_last_patches(stage_map, fusion.patch_size), idx_keep))

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Dense maps (B, width, d, h, w) for segmentation, fine to coarse: each convolutional stage's, then the
        transformer's (B, E, d, h, w), none of them normed."""
        grid = token_grid(x.shape[2:], self.spec.patch_size)
        maps = self._stage_maps(x, grid, None)
        tokens = self._transformer(maps[-1], grid, None)
        return [m.movedim(-1, 1) for m in maps] + [tokens.transpose(1, 2).unflatten(2, grid)]

    def _stage_maps(self, x: Tensor, grid: list[int], idx_keep: Tensor | None) -> list[Tensor]:
        """Outputs (B, D', H', W', width) of the convolutional stages."""
        x, maps = x.movedim(1, -1), []
        for i, stage in enumerate(self.stages):
            factor = 1 << (len(self.stages) - i)
            x = stage(x, None if idx_keep is None else hidden_voxels(idx_keep, grid, factor))
            maps.append(x)
        return maps

    def _transformer(self, x: Tensor, grid: list[int], idx_keep: Tensor | None) -> Tensor:
        """Last stage's map → tokens (B, K, E) of the last block."""
        patches = take_tokens(channels_last_patches(x, HALF), idx_keep)
        tokens = self.embed_linear(self.embed(patches)) + take_tokens(self.positions(grid), idx_keep)
        biases = self._relative_biases(grid) if self.spec.dense else [None] * len(self.blocks)
        for block, bias in zip(self.blocks, biases, strict=True):
            tokens = block(tokens, attn_mask=bias)
        return tokens

    def _relative_biases(self, grid: list[int]) -> tuple[Tensor, ...]:
        """One bias (1, heads, N, N) per block; the tables are resampled where the grid is not the spec's."""
        source, target = (Axes.OFFSETS.rows(size) for size in (self.spec.grid, grid))
        tables = resample_positions(self.rel_pos_bias, source, target).transpose(1, 2)
        return tables[:, :, relative_index(grid, tables.device)].split(1)
