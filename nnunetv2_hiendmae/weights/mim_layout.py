"""MiM's hybrid encoder: names, shapes and spec (METHODS §3)."""

import re

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.weights.layouts import (
    Hints,
    State,
    choose_heads,
    count_blocks,
    needed,
)
from nnunetv2_hiendmae.weights.positions import choose_grid

# voxels of a token: four stages that halve
PATCH = (16, 16, 16)
STEM_STAGES = 3

_LEAF = r"\.(weight|bias)"
_RULES = (
    (rf"patch_embed([1-{STEM_STAGES}])\.(proj|norm){_LEAF}", lambda m: f"stages.{int(m[1]) - 1}.embed.{m[2]}.{m[3]}"),
    (rf"patch_embed4\.(proj|norm){_LEAF}", lambda m: f"embed.{m[1]}.{m[2]}"),
    (rf"patch_embed5{_LEAF}", lambda m: f"embed_linear.{m[1]}"),
    (
        rf"blocks([1-{STEM_STAGES}])\.(\d{{1,6}})\.(norm1|norm2|conv1|conv2|attn|mlp\.fc1|mlp\.fc2){_LEAF}",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{_CONV_BLOCK.get(m[3], m[3])}.{m[4]}",
    ),
    (
        rf"blocks4\.(\d{{1,6}})\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2){_LEAF}",
        lambda m: f"blocks.{m[1]}.{m[2]}.{m[3]}",
    ),
    (rf"stage([1-{STEM_STAGES}])_output_decode{_LEAF}", lambda m: f"fusions.{int(m[1]) - 1}.proj.{m[2]}"),
    (rf"norm{_LEAF}", lambda m: m[0]),
    (r"pos_embed", lambda m: m[0]),
)
_CONV_BLOCK = {"conv1": "pw1", "attn": "dw", "conv2": "pw2"}
_MATRIX = re.compile(r"stages\.\d\.blocks\.\d+\.(pw1|pw2|mlp\.fc1|mlp\.fc2)\.weight")


def mim_name(name: str) -> str | None:
    """Stages 1 to 3 are convolutions, stage 4 is the transformer."""
    for pattern, ours in _RULES:
        if match := re.fullmatch(pattern, name):
            return ours(match)
    return None


def mim_value(name: str, tensor: Tensor, _spec: EncoderSpec) -> tuple[Tensor, str]:
    """1×1×1 convolutions are linear layers with us."""
    if not _MATRIX.fullmatch(name) or tensor.ndim != 5 or tensor.shape[2:] != (1, 1, 1):
        return tensor, ""
    return tensor.flatten(1), "1×1×1 convolution as a matrix"


def mim_spec(state: State, hints: Hints) -> EncoderSpec:
    """Widths, depths and grid of the pretraining network.

    Raises:
        UserError: a tensor is missing, or shapes do not tell the grid or the heads.
    """
    table = needed(state, "pos_embed", 3)
    rows, width = table.shape[1:]
    kernels = [needed(state, f"stages.{i}.embed.proj.weight", 5) for i in range(STEM_STAGES)]
    grid = choose_grid(table, [rows], PATCH, hints.file_size, reverse_axes=hints.reverse_axes)
    return EncoderSpec(
        tuple(g * p for g, p in zip(grid, PATCH, strict=True)),
        PATCH,
        embed_dim=width,
        depth=count_blocks(state, "blocks"),
        num_heads=choose_heads(width, hints),
        kind="convvit",
        in_channels=kernels[0].shape[1],
        mlp_ratio=needed(state, "blocks.0.mlp.fc1.weight", 2).shape[0] / width,
        taps=(),
        cls_token=False,
        stem_dims=tuple(k.shape[0] for k in kernels),
        stem_depths=tuple(count_blocks(state, f"stages.{i}.blocks") for i in range(STEM_STAGES)),
    )
