"""How foreign programs name and shape the tensors of an encoder, and which spec the shapes tell."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.positions import choose_grid

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Attention heads and transformer blocks of an encoder that was released."""

    heads: int
    depth: int


@dataclass(frozen=True)
class Hints:
    """What shapes cannot tell.

    Args:
        heads: attention heads, None: those of `sizes`, if the width is there.
        img_size: crop (D, H, W) that the positions belong to, None: not said.
        reverse_axes: the file's axes are the other way round.
        sizes: what was released, by width.
    """

    heads: int | None = None
    img_size: tuple[int, int, int] | None = None
    reverse_axes: bool = False
    sizes: Mapping[int, Size] = field(default_factory=dict)

    @property
    def file_size(self) -> tuple[int, int, int] | None:
        """`img_size` in the file's axis order."""
        return self.img_size[::-1] if self.img_size and self.reverse_axes else self.img_size


@dataclass(frozen=True)
class Layout:
    """Names and shapes of one family of programs.

    Args:
        rename: a name without wrappers → our name of it, None where it is not the encoder's.
        spec: our names → the spec, in the file's axis order.
        value: our name, tensor, spec → tensor in our shape and what was done to it ("" for nothing).
    """

    rename: Callable[[str], str | None]
    spec: Callable[[State, Hints], EncoderSpec]
    value: Callable[[str, Tensor, EncoderSpec], tuple[Tensor, str]]


def needed(state: State, name: str, axes: int) -> Tensor:
    """
    Raises:
        UserError: the tensor is not there, or has another number of axes.
    """
    if name not in state:
        raise UserError(f"{name} is missing; download the file again, or say what it is with --format")
    if state[name].ndim != axes or 0 in state[name].shape:
        hint = " (a 2D network?)" if axes == 5 and state[name].ndim == 4 else ""
        raise UserError(f"{name} has shape {tuple(state[name].shape)}, needed {axes} axes, none empty{hint}")
    return state[name]


def count_blocks(state: State, prefix: str) -> int:
    """Blocks `prefix.0.…` to `prefix.n-1.…`.

    Raises:
        UserError: one in between is missing, or there is none.
    """
    found = {int(m[1]) for m in (re.match(rf"{re.escape(prefix)}\.(\d{{1,6}})\.", name) for name in state) if m}
    missing = set(range(len(found) or 1)) - found
    if missing:
        raise UserError(f"{prefix}.{min(missing)} is missing; download the file again")
    return len(found)


def choose_heads(width: int, hints: Hints) -> int:
    """
    Raises:
        UserError: neither given nor known for this width, or no divisor of it.
    """
    heads = hints.heads or (hints.sizes[width].heads if width in hints.sizes else None)
    if heads is None:
        known = ", ".join(f"{s.heads} at width {w}" for w, s in hints.sizes.items()) or "none"
        raise UserError(
            f"the number of attention heads is not in the file and not known for width {width} (known: {known}); "
            "give it with --num-heads H"
        )
    if heads < 1 or width % heads:
        raise UserError(f"--num-heads {heads} does not divide the encoder's width {width}; give a divisor of it")
    return heads


def size_notes(name: str, spec: EncoderSpec, sizes: Mapping[int, Size]) -> list[str]:
    """Where an encoder of a released width differs from what was released.

    Args:
        name: of the format.
    """
    usual, notes = sizes.get(spec.embed_dim), []
    if usual is None:
        return notes
    if spec.depth != usual.depth:
        notes.append(
            f"{spec.depth} blocks: {name} encoders of width {spec.embed_dim} that were released have {usual.depth}; "
            "was one lost?"
        )
    if spec.num_heads != usual.heads:
        notes.append(
            f"{spec.num_heads} heads: {name} encoders of width {spec.embed_dim} that were released have {usual.heads}"
        )
    return notes


def same_name(name: str) -> str | None:
    """Names of timm, which are ours."""
    return name if _VIT_NAME.fullmatch(name) else None


_VIT_NAME = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d{1,6}\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


def unchanged(_name: str, tensor: Tensor, _spec: EncoderSpec) -> tuple[Tensor, str]:
    """Shapes that are ours."""
    return tensor, ""


def vit_spec(
    *, cls_token: bool | None, cls_row: bool | None, norm_eps: float = 1e-6
) -> Callable[[State, Hints], EncoderSpec]:
    """Spec of a plain ViT.

    Args:
        cls_token: whether the program's encoder has one; None: some do.
        cls_row: whether its position table has a row for it; None: some do.
        norm_eps: of its LayerNorms.
    """

    def infer(state: State, hints: Hints) -> EncoderSpec:
        rows = needed(state, "pos_embed", 3).shape[1]
        if cls_token:
            needed(state, "cls_token", 3)
        has_cls = "cls_token" in state
        counts = [rows] * (not (has_cls and cls_row)) + [rows - 1] * (has_cls and cls_row is not False)
        kernel, grid = _kernel_and_grid(state, counts, hints)
        width, channels, *patch = kernel
        return EncoderSpec(
            tuple(g * p for g, p in zip(grid, patch, strict=True)),
            tuple(patch),
            embed_dim=width,
            depth=count_blocks(state, "blocks"),
            num_heads=choose_heads(width, hints),
            in_channels=channels,
            mlp_ratio=needed(state, "blocks.0.mlp.fc1.weight", 2).shape[0] / width,
            cls_token=has_cls,
            norm_eps=norm_eps,
        )

    return infer


def _kernel_and_grid(state: State, counts: Sequence[int], hints: Hints) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Shape (E, C, patch) of the patch embedding, which may be stored as a matrix, and the token grid."""
    name, size = "patch_embed.proj.weight", hints.file_size
    table = state["pos_embed"]
    if name not in state or state[name].ndim != 2:
        kernel = tuple(needed(state, name, 5).shape)
        return kernel, choose_grid(table, counts, kernel[2:], size, reverse_axes=hints.reverse_axes)
    width, values = state[name].shape
    # the matrix hides patch and channels: one channel and a cube, or what the crop says
    voxels = values if size is None else math.prod(size) // max(counts[-1], 1)
    edge = round(voxels ** (1 / 3))
    if voxels < 1 or edge**3 != voxels or values % voxels:
        raise UserError(
            f"{name} is a matrix over {values} values a patch, which is no cube of one channel; give the crop in "
            "voxels that the encoder was trained on with --img-size D H W"
        )
    patch = (edge, edge, edge)
    grid = choose_grid(table, counts, patch, size, reverse_axes=hints.reverse_axes)
    return (width, values // voxels, *patch), grid


_HIENDMAE_POSITIONS = "encoder_pos_embed"


def hiendmae_name(name: str) -> str | None:
    """Hi-End-MAE keeps its encoder under `encoder.` and the positions beside it."""
    if name == _HIENDMAE_POSITIONS:
        return "pos_embed"
    inner = name.removeprefix("encoder.")
    return same_name(inner) if inner != name and inner != "pos_embed" else None


def backbone_name(name: str) -> str | None:
    """GL-MAE's student and teacher, with or without the `backbone.` of its training program."""
    return same_name(name.removeprefix("backbone."))


_MONAI_PARTS = (
    ("patch_embedding.position_embeddings", "pos_embed"),
    ("patch_embedding.patch_embeddings.1.", "patch_embed.proj."),
    ("patch_embedding.patch_embeddings.", "patch_embed.proj."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.linear1.", ".mlp.fc1."),
    (".mlp.linear2.", ".mlp.fc2."),
)


def monai_name(name: str) -> str | None:
    """MONAI's ViT, alone or as `vit.` of a UNETR."""
    name = name.removeprefix("vit.")
    if re.search(r"\.mlp\.fc|\.attn\.proj\.|^pos_embed|^patch_embed\.", name):
        return None
    for theirs, ours in _MONAI_PARTS:
        name = name.replace(theirs, ours)
    return same_name(name)


def monai_value(name: str, tensor: Tensor, spec: EncoderSpec) -> tuple[Tensor, str]:
    """The matrix of a "perceptron" patch embedding as a kernel; it runs over (p_d, p_h, p_w, C)."""
    if name != "patch_embed.proj.weight" or tensor.ndim != 2:
        return tensor, ""
    kernel = tensor.unflatten(1, (*spec.patch_size, spec.in_channels)).permute(0, 4, 1, 2, 3)
    return kernel, f"matrix over patches as a kernel of {spec.patch_size} voxels, {spec.in_channels} channel(s)"
