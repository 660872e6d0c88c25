"""Which grid a foreign position table belongs to: read off the sin-cos formula where it is one, never made up."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import ConvertOptions

Triple = tuple[int, int, int]
# a table this close to ours was never trained
_TOLERANCE = 1e-4


def choose_grid(table: Tensor, counts: Sequence[int], patch: Sequence[int], options: ConvertOptions) -> Triple:
    """Token grid, in the file's axis order, of a position table.

    A given crop decides; without one the grid of the sin-cos formula that the table is, then a cube.

    Args:
        table: (A, R, E) as in the file, perhaps with a row for CLS put first.
        counts: how many of its last rows may be patches.

    Raises:
        UserError: a crop that does not fit, or no crop given and neither sin-cos nor a cube.
    """
    if options.img_size is not None:
        return _given_grid(table, counts, patch, options)
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


def _given_grid(table: Tensor, counts: Sequence[int], patch: Sequence[int], options: ConvertOptions) -> Triple:
    order, img_size = -1 if options.axes == "xyz" else 1, file_size(options)
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
            f"--img-size {' '.join(map(str, options.img_size))} does not fit: the file's sin-cos positions are those "
            f"of another grid; give --img-size {fits}, or leave it out"
        )
    return grid


def file_size(options: ConvertOptions) -> Triple | None:
    """The given crop in the file's axis order."""
    return options.img_size[::-1] if options.img_size and options.axes == "xyz" else options.img_size


def sincos_grid(rows: Tensor, first: Triple | None = None) -> Triple | None:
    """Grid whose sin-cos table these rows (1, N, E) are, `first` tried first; None where they are no such table."""
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
    divisors = sorted(d for i in range(1, math.isqrt(count) + 1) if count % i == 0 for d in {i, count // i})
    return ((a, b, count // (a * b)) for a in divisors for b in divisors if count % (a * b) == 0)
