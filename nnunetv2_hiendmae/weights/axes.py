"""Array axes of weights: an encoder that read (x, y, z) arrays, made to read the same volume as (z, y, x).

A network of convolutions, patches and positions is equivariant to permuting axes, if the kernels' axes, the grids of
its position tables and the windows of its relative positions are permuted with the data (METHODS §5).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec

# what a file's arrays may have been; nnU-Net's are (z, y, x), called D, H, W
AXES = ("xyz", "dhw")
REVERSED = (2, 1, 0)


def permute_axes(
    state: Mapping[str, Tensor], spec: EncoderSpec, order: Sequence[int]
) -> tuple[dict[str, Tensor], EncoderSpec]:
    """Weights and spec of the encoder that does with a permuted volume what this one does with the volume.

    Works for both kinds of encoder, and for whole networks whose encoder's names start with `encoder.`. Tensors that
    change are views.

    Args:
        state: a state_dict; its five-dimensional tensors are kernels.
        order: new axis i is the old axis `order[i]`, as in `volume.permute`.

    Raises:
        ValueError: `order` is no permutation, or a table does not have the rows of the spec's grid.
    """
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"order {tuple(order)} is no permutation of 0, 1, 2")
    permuted = {name: _permute(name, tensor, spec, order) for name, tensor in state.items()}
    moved = spec.with_(
        img_size=tuple(spec.img_size[i] for i in order), patch_size=tuple(spec.patch_size[i] for i in order)
    )
    return permuted, moved


def _permute(name: str, tensor: Tensor, spec: EncoderSpec, order: Sequence[int]) -> Tensor:
    if tensor.ndim == 5:
        return tensor.permute(0, 1, *(2 + i for i in order))
    table = name.removeprefix("encoder.")
    if table == "pos_embed":
        return _permute_rows(name, tensor, spec.grid, order)
    if table == "rel_pos_bias":
        return _permute_rows(name, tensor, [2 * g - 1 for g in spec.grid], order)
    return tensor


def _permute_rows(name: str, table: Tensor, grid: Sequence[int], order: Sequence[int]) -> Tensor:
    """(A, N, E) with N in raster order of `grid`."""
    try:
        rows = table.unflatten(1, tuple(grid))
    except RuntimeError as e:
        raise ValueError(f"{name} has {table.shape[1]} rows, needed a grid of {tuple(grid)}") from e
    return rows.permute(0, *(1 + i for i in order), 4).flatten(1, 3)
