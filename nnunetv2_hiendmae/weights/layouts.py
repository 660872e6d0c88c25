"""How foreign programs name and shape the tensors of an encoder, and which spec the shapes tell; a grid is read off the
sin-cos formula where positions are that, never made up."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, ViTEncoder
from nnunetv2_hiendmae.architectures.layers import axes_of
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import ConvertOptions

State = Mapping[str, Tensor]
Triple = tuple[int, int, int]
# width → attention heads and transformer blocks of the encoders that were released
Sizes = Mapping[int, tuple[int, int]]
# tensors by our names, options whose `axes` are decided, released sizes, questions → the spec, in the file's order of
# axes. What neither shapes nor options tell becomes a question, and the spec has a stand-in that fits the shapes: so
# damage is told before anything is asked. UserError: a tensor is missing, or the options contradict the shapes
InferSpec = Callable[[State, ConvertOptions, Sizes, list[str]], EncoderSpec]
# a table this close to the sin-cos one was never trained
_TOLERANCE = 1e-4


def needed_tensor(state: State, name: str, axes: int) -> Tensor:
    """A tensor that is there and has so many axes, else UserError."""
    if name not in state:
        raise UserError(f"{name} is missing; download the file again, or say what it is with --format")
    if state[name].ndim != axes or 0 in state[name].shape:
        hint = " (a 2D network?)" if axes == 5 and state[name].ndim == 4 else ""
        raise UserError(f"{name} has shape {tuple(state[name].shape)}, needed {axes} axes, none empty{hint}")
    return state[name]


def count_blocks(state: State, prefix: str) -> int:
    """Blocks `prefix.0.…` to `prefix.n-1.…`: at least one, and none in between is missing."""
    found = {int(m[1]) for m in (re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.", name) for name in state) if m}
    missing = set(range(len(found) or 1)) - found
    if missing:
        raise UserError(f"{prefix}.{min(missing)} is missing; download the file again")
    return len(found)


def transformer_fields(
    state: State,
    width: int,
    options: ConvertOptions,
    sizes: Sizes,
    needed: list[str],
    first_layer: str = "blocks.0.mlp.fc1.weight",
) -> dict[str, int | float]:
    """Fields of the spec that tell the transformer's shape; `first_layer` is that of a block's MLP."""
    depth = count_blocks(state, "blocks")
    heads = options.num_heads or sizes.get(width, (None, None))[0]
    if heads is None:
        known = ", ".join(f"{h} at width {w}" for w, (h, _) in sizes.items()) or "none"
        needed.append(
            f"the number of attention heads is not in the file and not known for width {width} (known: {known}); "
            "give it with --num-heads H"
        )
    elif width % heads:
        needed.append(f"--num-heads {heads} does not divide the encoder's width {width}; give a divisor of it")
    heads = heads if heads and width % heads == 0 else 1
    ratio = needed_tensor(state, first_layer, 2).shape[0] / width
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}


def same_name(name: str) -> str | None:
    """Names of timm, which are ours."""
    return name if axes_of(name, ViTEncoder.axes) else None


def hiendmae_name(name: str) -> str | None:
    """Hi-End-MAE keeps its encoder under `encoder.` and the positions beside it."""
    if name == "encoder_pos_embed":
        return "pos_embed"
    inner = name.removeprefix("encoder.")
    return same_name(inner) if inner != name and inner != "pos_embed" else None


# MONAI's → ours; where two are the same, the last one is what MONAI's convolutional embedding has
MONAI_PARTS = (
    ("patch_embedding.position_embeddings", "pos_embed"),
    ("patch_embedding.patch_embeddings.1.", "patch_embed.proj."),
    ("patch_embedding.patch_embeddings.", "patch_embed.proj."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.linear1.", ".mlp.fc1."),
    (".mlp.linear2.", ".mlp.fc2."),
)


def monai_name(name: str) -> str | None:
    """MONAI's ViT; the last of the blocks of its MaskedAutoEncoderViT is the final norm."""
    if re.search(r"\.mlp\.fc|\.attn\.proj\.|^pos_embed|^patch_embed\.", name):
        return None
    for theirs, ours in MONAI_PARTS:
        name = name.replace(theirs, ours)
    return same_name(re.sub(r"^blocks\.\d+\.(weight|bias)$", r"norm.\1", name))


def monai_value(name: str, tensor: Tensor, spec: EncoderSpec) -> tuple[Tensor, str]:
    """The matrix of a "perceptron" patch embedding as a kernel; it runs over (p_d, p_h, p_w, C)."""
    if name != "patch_embed.proj.weight" or tensor.ndim != 2:
        return tensor, ""
    kernel = tensor.unflatten(1, (*spec.patch_size, spec.in_channels)).permute(0, 4, 1, 2, 3)
    return kernel, f"matrix over patches as a kernel of {spec.patch_size} voxels, {spec.in_channels} channel(s)"


def vit_spec(
    state: State,
    options: ConvertOptions,
    sizes: Sizes,
    needed: list[str],
    *,
    cls_token: bool | None,
    cls_row: bool | None,
    norm_eps: float = 1e-6,
) -> EncoderSpec:
    """An `InferSpec` of plain ViTs.

    Args:
        cls_token: whether the program's encoder has one; None: some do.
        cls_row: whether its position table has a row for it; None: some do.
        norm_eps: of its LayerNorms.
    """
    rows = needed_tensor(state, "pos_embed", 3).shape[1]
    if cls_token:
        needed_tensor(state, "cls_token", 3)
    has_cls = "cls_token" in state
    counts = [rows] * (not (has_cls and cls_row)) + [rows - 1] * (has_cls and cls_row is not False)
    (width, channels, *patch), grid = _kernel_and_grid(state, counts, options, needed)
    return EncoderSpec(
        tuple(g * p for g, p in zip(grid, patch, strict=True)),
        tuple(patch),
        **transformer_fields(state, width, options, sizes, needed),
        in_channels=channels,
        cls_token=has_cls,
        norm_eps=norm_eps,
    )


def _kernel_and_grid(
    state: State, counts: Sequence[int], options: ConvertOptions, needed: list[str]
) -> tuple[tuple[int, ...], Triple]:
    """Shape (E, C, patch) of the patch embedding, which may be stored as a matrix, and the token grid."""
    name, size, table = "patch_embed.proj.weight", options.img_size, state["pos_embed"]
    if name not in state or state[name].ndim != 2:
        kernel = tuple(needed_tensor(state, name, 5).shape)
        if options.patch_size not in (None, kernel[2:]):
            raise UserError(f"--patch-size {options.patch_size}: the file's patches are {kernel[2:]}; leave it out")
        return kernel, choose_grid(table, counts, kernel[2:], options, needed)
    width, values = needed_tensor(state, name, 2).shape
    # the matrix hides patch and channels: one channel and a cube, or what is said
    voxels = values if size is None else math.prod(size) // max(counts[-1], 1)
    patch = options.patch_size or (round(voxels ** (1 / 3)),) * 3
    voxels = math.prod(patch)
    if voxels >= 1 and values % voxels == 0 and (options.patch_size or size or voxels == values):
        before, grid = len(needed), choose_grid(table, counts, patch, options, needed)
        if len(needed) > before and options.patch_size is None:
            needed.append(f"and, because {name} is a matrix, --patch-size D H W if its patches are no cubes")
        return (width, values // voxels, *patch), grid
    needed.append(
        f"{name} is a matrix over {values} values a patch, which is no cube; give the patch in voxels with "
        f"--patch-size D H W{'' if size else ', and the crop that the encoder was trained on with --img-size D H W'}"
    )
    return (width, 1, values, 1, 1), (counts[-1], 1, 1)


# ---- MiM's hybrid encoder -------------------------------------------------------------------------------------------

# voxels of a token: four stages that halve
_MIM_PATCH = (16, 16, 16)
_STEM_STAGES = 3
_LEAF = r"\.(weight|bias)"
_CONV_BLOCK = {"conv1": "pw1", "attn": "dw", "conv2": "pw2"}
_MIM_NAMES = (
    (rf"patch_embed([1-{_STEM_STAGES}])\.(proj|norm){_LEAF}", lambda m: f"stages.{int(m[1]) - 1}.embed.{m[2]}.{m[3]}"),
    (rf"patch_embed4\.(proj|norm){_LEAF}", lambda m: f"embed.{m[1]}.{m[2]}"),
    (rf"patch_embed5{_LEAF}", lambda m: f"embed_linear.{m[1]}"),
    (
        rf"blocks([1-{_STEM_STAGES}])\.(\d{{1,6}})\.(norm1|norm2|conv1|conv2|attn|mlp\.fc1|mlp\.fc2){_LEAF}",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{_CONV_BLOCK.get(m[3], m[3])}.{m[4]}",
    ),
    (r"blocks4\.(.*)", lambda m: same_name(f"blocks.{m[1]}")),
    (rf"stage([1-{_STEM_STAGES}])_output_decode{_LEAF}", lambda m: f"fusions.{int(m[1]) - 1}.proj.{m[2]}"),
    (rf"norm{_LEAF}|pos_embed", lambda m: m[0]),
)
_MIM_MATRIX = re.compile(r"stages\.\d\.blocks\.\d+\.(pw1|pw2|mlp\.fc1|mlp\.fc2)\.weight")


def mim_name(name: str) -> str | None:
    """Stages 1 to 3 are convolutions, stage 4 is the transformer."""
    matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in _MIM_NAMES)
    return next((ours(match) for match, ours in matches if match), None)


def mim_value(name: str, tensor: Tensor, _spec: EncoderSpec) -> tuple[Tensor, str]:
    """1×1×1 convolutions are linear layers with us."""
    if not _MIM_MATRIX.fullmatch(name) or tensor.ndim != 5 or tensor.shape[2:] != (1, 1, 1):
        return tensor, ""
    return tensor.flatten(1), "1×1×1 convolution as a matrix"


def mim_spec(state: State, options: ConvertOptions, sizes: Sizes, needed: list[str]) -> EncoderSpec:
    """Widths, depths and grid of the pretraining network: an `InferSpec`."""
    table = needed_tensor(state, "pos_embed", 3)
    kernels = [needed_tensor(state, f"stages.{i}.embed.proj.weight", 5) for i in range(_STEM_STAGES)]
    grid = choose_grid(table, [table.shape[1]], _MIM_PATCH, options, needed)
    transformer = transformer_fields(state, table.shape[2], options, sizes, needed)
    layers = [needed_tensor(state, f"stages.{i}.blocks.0.mlp.fc1.weight", 5).shape[:2] for i in range(_STEM_STAGES)]
    ratio = transformer["mlp_ratio"]
    # as timm's Mlp does, for which a width of 0 is that of its input
    if any(hidden != (int(width * ratio) or width) for hidden, width in layers):
        told = ", ".join(f"{hidden / width:g}" for hidden, width in layers)
        raise UserError(
            f"the MLP ratios of its stages differ ({told}, {ratio:g}): encoders here have one ratio for all stages"
        )
    return EncoderSpec(
        tuple(g * p for g, p in zip(grid, _MIM_PATCH, strict=True)),
        _MIM_PATCH,
        **transformer,
        kind="convvit",
        in_channels=kernels[0].shape[1],
        stem_dims=tuple(k.shape[0] for k in kernels),
        stem_depths=tuple(count_blocks(state, f"stages.{i}.blocks") for i in range(_STEM_STAGES)),
    )


def choose_grid(
    table: Tensor, counts: Sequence[int], patch: Sequence[int], options: ConvertOptions, needed: list[str]
) -> Triple:
    """Token grid, in the file's axis order, of a position table.

    A given crop decides; without one the grid of the sin-cos formula that the table is, then a cube; else `needed`.

    Args:
        table: (A, R, E) as in the file, perhaps with a row for CLS put first.
        counts: how many of its last rows may be patches.
    """
    if options.img_size is not None:
        return _given_grid(table, counts, patch, options)
    for count in counts:
        if count > 0 and (grid := _sincos_grid(table[:, table.shape[1] - count :])):
            return grid
    for count in counts:
        edge = round(max(count, 0) ** (1 / 3))
        if count > 0 and edge**3 == count:
            return (edge, edge, edge)
    if counts[-1] < 1:
        raise UserError(f"pos_embed has shape {tuple(table.shape)}, needed a row for every token")
    needed.append(
        f"pos_embed has positions for {' or '.join(map(str, counts))} tokens, which is no cube; give the crop in "
        "voxels that the encoder was trained on with --img-size D H W"
    )
    return (counts[-1], 1, 1)


def _given_grid(table: Tensor, counts: Sequence[int], patch: Sequence[int], options: ConvertOptions) -> Triple:
    order = -1 if options.axes == "xyz" else 1
    img_size = options.img_size[::order]
    grid = tuple(s // p for s, p in zip(img_size, patch, strict=True))
    count = math.prod(grid)
    if any(s % p for s, p in zip(img_size, patch, strict=True)) or count not in counts:
        raise UserError(
            f"--img-size does not fit: patches of {tuple(patch)[::order]} voxels give a grid of {grid[::order]}, "
            f"the file has positions for {' or '.join(map(str, counts))} tokens"
        )
    # in our order of channels alone: permuted axes may look like MONAI's order
    formula = _grid_of_ours(table[:, table.shape[1] - count :], first=grid)
    if formula not in (None, grid):
        fits = " ".join(str(g * p) for g, p in list(zip(formula, patch, strict=True))[::order])
        raise UserError(
            f"--img-size {' '.join(map(str, options.img_size))} does not fit: the file's sin-cos positions are those "
            f"of another grid; give --img-size {fits}, or leave it out"
        )
    return grid


def _sincos_grid(rows: Tensor) -> Triple | None:
    """Grid whose sin-cos table these rows (1, N, E) are, ours or MONAI's; None where they are no such table."""
    return _grid_of_ours(rows) or _grid_of_ours(_monai_channels(rows))


def _monai_channels(rows: Tensor) -> Tensor:
    """Channels of MONAI's sin-cos table, whose axes go 1, 0, 2, in the order 0, 1, 2, and back."""
    pair = 2 * (rows.shape[2] // 6)
    return torch.cat([rows[..., pair : 2 * pair], rows[..., :pair], rows[..., 2 * pair :]], dim=2)


def _grid_of_ours(rows: Tensor, first: Triple | None = None) -> Triple | None:
    """The same of our order of channels alone; `first`: the grid to try first."""
    if rows.shape[0] != 1 or rows.shape[2] < 6:
        return None
    # the last row holds sine and cosine of the last index of each axis: few grids of so many tokens share it
    step = rows.shape[2] // 6
    last = rows[0, -1, : 6 * step : step]
    count = rows.shape[1]
    divisors = sorted({d for i in range(1, math.isqrt(count) + 1) if count % i == 0 for d in (i, count // i)})
    grids = [(a, b, count // (a * b)) for a in divisors for b in divisors if count % (a * b) == 0]
    for grid in [first, *grids] if first else grids:
        corner = torch.tensor([wave(g - 1) for g in grid for wave in (math.sin, math.cos)])
        if _close(last, corner) and _close(rows, sincos_positions(grid, rows.shape[2])):
            return grid
    return None


def is_sincos(rows: Tensor, grid: Sequence[int]) -> bool:
    """Whether rows (1, N, E) are our sin-cos table of a grid, or MONAI's, up to the rounding of their number type."""
    if rows.shape[2] < 6:
        return False
    table = sincos_positions(grid, rows.shape[2])
    return _close(rows, table) or _close(rows, _monai_channels(table))


def _close(rows: Tensor, table: Tensor) -> bool:
    tolerance = max(_TOLERANCE, torch.finfo(rows.dtype).eps)
    return rows.shape == table.shape and (rows.float() - table).abs().max().item() <= tolerance
