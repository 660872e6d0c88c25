"""Which grid a foreign position table belongs to: read off the sin-cos formula where it is one, never made up."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.report import printable

Triple = tuple[int, int, int]
# a table this close to ours was never trained
_TOLERANCE = 1e-4
_DECODER_TABLE = re.compile(r"(backbone\.)?decoder_pos_embed")


def choose_grid(
    table: Tensor, counts: Sequence[int], patch: Sequence[int], img_size: Triple | None, *, reverse_axes: bool
) -> Triple:
    """Token grid, in the file's axis order, of a position table.

    A given crop decides; without one the grid of the sin-cos formula that the table is, then a cube.

    Args:
        table: (A, R, E) as in the file, perhaps with a row for CLS put first.
        counts: how many of its last rows may be patches.
        img_size: crop in the file's axis order.
        reverse_axes: whether the user counts axes the other way round, for messages.

    Raises:
        UserError: a crop that does not fit, or no crop given and neither sin-cos nor a cube.
    """
    if img_size is not None:
        return _given_grid(table, counts, patch, img_size, reverse_axes)
    for count in counts:
        if count > 0 and (grid := sincos_grid(table[:, table.shape[1] - count :])):
            return grid
    for count in counts:
        edge = round(max(count, 0) ** (1 / 3))
        if count > 0 and edge**3 == count:
            return (edge, edge, edge)
    raise UserError(
        f"pos_embed has positions for {' or '.join(map(str, counts))} tokens, which is no cube; give the crop in "
        "voxels that the encoder was trained on with --img-size D H W"
    )


def _given_grid(
    table: Tensor, counts: Sequence[int], patch: Sequence[int], img_size: Triple, reverse_axes: bool
) -> Triple:
    order = -1 if reverse_axes else 1
    grid = tuple(s // p for s, p in zip(img_size, patch, strict=True))
    count = math.prod(grid)
    if any(s % p for s, p in zip(img_size, patch, strict=True)) or count not in counts:
        raise UserError(
            f"--img-size does not fit: patches of {tuple(patch)[::order]} voxels give a grid of {grid[::order]}, "
            f"the file has positions for {' or '.join(map(str, counts))} tokens"
        )
    formula = sincos_grid(table[:, table.shape[1] - count :], first=grid)
    if formula not in (None, grid):
        fits = " ".join(str(g * p) for g, p in list(zip(formula, patch, strict=True))[::order])
        raise UserError(
            f"--img-size {' '.join(map(str, img_size[::order]))} does not fit: the file's sin-cos positions are those "
            f"of another grid; give --img-size {fits}, or leave it out"
        )
    return grid


def sincos_grid(rows: Tensor, first: Triple | None = None) -> Triple | None:
    """Grid whose sin-cos table these rows (1, N, E) are, None where they are no such table.

    Args:
        first: grid that is tried before the others.
    """
    if rows.shape[0] != 1 or rows.shape[2] < 6:
        return None
    # the last row holds sine and cosine of the last index of each axis: few grids of so many tokens share it
    step = rows.shape[2] // 6
    last = rows[0, -1, : 6 * step : step]
    for grid in (*((first,) if first else ()), *_grids(rows.shape[1])):
        corner = torch.tensor([wave(g - 1) for g in grid for wave in (math.sin, math.cos)])
        if _close(last, corner) and is_sincos(rows, grid):
            return grid
    return None


def is_sincos(rows: Tensor, grid: Sequence[int]) -> bool:
    """Whether rows (1, N, E) are our sin-cos table of a grid, up to the rounding of their number type."""
    width = rows.shape[2]
    return width >= 6 and _close(rows, sincos_positions(grid, width))


def _close(rows: Tensor, table: Tensor) -> bool:
    tolerance = max(_TOLERANCE, torch.finfo(rows.dtype).eps)
    return rows.shape == table.shape and (rows.float() - table).abs().max().item() <= tolerance


def _grids(count: int) -> Iterator[Triple]:
    divisors = [d for i in range(1, math.isqrt(count) + 1) if count % i == 0 for d in {i, count // i}]
    for a in sorted(divisors):
        for b in sorted(divisors):
            if count % (a * b) == 0:
                yield (a, b, count // (a * b))


def check_decoder_table(names: Mapping[str, str], state: Mapping[str, Tensor], table_name: str, table: Tensor) -> None:
    """Encoder and decoder of one program have positions for the same tokens.

    Args:
        names: name without wrappers → name in `state`.

    Raises:
        UserError: the decoder's table has another number of rows.
    """
    for name, source in names.items():
        other = tuple(state[source].shape)
        if _DECODER_TABLE.fullmatch(name) and other[1:-1] != tuple(table.shape[1:-1]):
            raise UserError(
                f"{printable(table_name)} has shape {tuple(table.shape)}, but {printable(source)} {other}: needed the "
                "same number of positions; download the file again"
            )


def position_notes(spec: EncoderSpec, *, given: bool, formula: bool, fixed: bool) -> list[str]:
    """What a reader should know about the grid.

    Args:
        spec: of the encoder in its final axis order.
        given: somebody said what the crop was.
        formula: the table is the sin-cos table of its grid.
        fixed: the method of this file never trains its table.
    """
    notes, size = [], " ".join(map(str, spec.img_size))
    if not given and formula and len(set(spec.grid)) > 1:
        notes.append(f"the crop {size} was read off the sin-cos positions, which are those of its grid {spec.grid}")
    if not given and not formula:
        notes.append(f"the grid was taken as a cube, the crop as {size}; --img-size says otherwise")
    if fixed and not formula:
        notes.append("positions are not the sin-cos table that this method has: they are kept as they are")
    return notes
