"""How Primus names and shapes its tensors, in dynamic-network-architectures and in nnssl."""

import math
import re

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec, PrimusEncoder
from nnunetv2_hiendmae.architectures.kinds import LAYER_SCALE, MLP_RATIO, NORM_EPS
from nnunetv2_hiendmae.architectures.layers import axes_of
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.weights.layouts import Sizes, State, choose_grid, needed_tensor, transformer_fields

# at the start of some names of such an encoder
BLOCKS = r"eva\.blocks\.\d+\.(norm|attn|mlp)"
# what nnssl and nnU-Net call the sizes of the paper
NAMED = {f"Primus{size}": PRESETS[f"primus_{size.lower()}"] for size in "SBML"}
SIZES: Sizes = {spec.embed_dim: (spec.num_heads, spec.depth) for spec in NAMED.values()}
_STEM, _PATCHES = "down_projection.", "patch_embed."


def primus_name(name: str) -> str | None:
    """Their names → ours."""
    if name.startswith("eva."):
        ours = name.removeprefix("eva.")
    elif name.startswith(_STEM):
        ours = name.replace(_STEM, _PATCHES, 1)
    else:
        ours = name if name == "register_tokens" else ""
    return ours if axes_of(ours, PrimusEncoder.axes) else None


def theirs(name: str) -> str:
    """Our names → theirs, but for register tokens, which have no place of their own there."""
    return name.replace(_PATCHES, _STEM, 1) if name.startswith(_PATCHES) else f"eva.{name}"


def check_stem(names: list[str]) -> None:
    """Refuses the convolutional stems of later versions, by name (UserError)."""
    if any(re.match(r"down_projection\.(?!proj\.)", name) for name in names):
        version = "V3" if any("proj_to_tokens" in name for name in names) else "V2"
        raise UserError(
            f"it is a Primus{version}, whose patches go through convolutions: encoders here embed patches alone; use a "
            "PrimusS, B, M, L or X"
        )


def primus_spec(state: State, options: ConvertOptions, sizes: Sizes, needed: list[str]) -> EncoderSpec:
    """Widths, depth, grid, registers, LayerScale and norms: an `InferSpec`."""
    width, channels, *patch = needed_tensor(state, f"{_PATCHES}proj.weight", 5).shape
    if options.patch_size not in (None, tuple(patch)):
        raise UserError(f"--patch-size {options.patch_size}: the file's patches are {tuple(patch)}; leave it out")
    table = needed_tensor(state, "pos_embed", 3)
    registers = needed_tensor(state, "register_tokens", 3).shape[1] if "register_tokens" in state else 0
    grid = choose_grid(table, [table.shape[1] - registers], patch, options, needed)
    fields = transformer_fields(state, width, options, sizes, needed, "blocks.0.mlp.fc1_g.weight")
    return EncoderSpec(
        tuple(g * p for g, p in zip(grid, patch, strict=True)),
        tuple(patch),
        **{**fields, "mlp_ratio": _mlp_ratio(state["blocks.0.mlp.fc1_g.weight"].shape[0], width)},
        kind=PrimusEncoder.kind,
        in_channels=channels,
        pos_embed="learned",
        norm_eps=NORM_EPS,
        register_tokens=registers,
        layer_scale=LAYER_SCALE if "blocks.0.gamma_1" in state else None,
        inner_norm="blocks.0.attn.norm.weight" in state,
    )


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that makes `int(width · ratio)` so many hidden channels: theirs if it does."""
    ratios = (MLP_RATIO, hidden / width, math.nextafter(hidden / width, math.inf))
    return next(ratio for ratio in ratios if int(width * ratio) == hidden)
