"""Volumes as token sequences: patches, fixed positions, masking. Pure functions, any (D, H, W)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def token_grid(size: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    """Tokens per axis of a crop.

    Raises:
        ValueError: an axis is not divisible by the patch.
    """
    if any(s % p for s, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"crop {tuple(size)} is not divisible by the patch {tuple(patch_size)}")
    return [s // p for s, p in zip(size, patch_size, strict=True)]


def patchify(x: Tensor, patch_size: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) → (B, N, P). Tokens in raster order (D slowest); inside a patch (p_d, p_h, p_w, C).

    Raises:
        ValueError: a spatial axis is not divisible by the patch.
    """
    b, c, *size = x.shape
    (pd, ph, pw), (gd, gh, gw) = patch_size, token_grid(size, patch_size)
    x = x.reshape(b, c, gd, pd, gh, ph, gw, pw)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, gd * gh * gw, pd * ph * pw * c)


def take_patches(x: Tensor, patch_size: Sequence[int], index: Tensor | None) -> Tensor:
    """Patches `index` (B, K) of a volume (B, C, D, H, W) → (B, K, P), as `patchify` makes them; None: all of them.
    The others are never touched."""
    if index is None:
        return patchify(x, patch_size)
    b, c, *size = x.shape
    (pd, ph, pw), (gd, gh, gw) = patch_size, token_grid(size, patch_size)
    blocks = x.reshape(b, c, gd, pd, gh, ph, gw, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    rows = torch.arange(b, device=x.device)[:, None]
    return blocks[rows, index // (gh * gw), index // gw % gh, index % gw].flatten(2)


def unpatchify(patches: Tensor, grid: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """(B, N, P) → (B, C, D, H, W), the inverse of `patchify`."""
    (gd, gh, gw), (pd, ph, pw) = grid, patch_size
    b, c = patches.shape[0], patches.shape[2] // math.prod(patch_size)
    x = patches.reshape(b, gd, gh, gw, pd, ph, pw, c)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, gd * pd, gh * ph, gw * pw)


def sincos_positions(grid: Sequence[int], width: int) -> Tensor:
    """Fixed positions (1, N, width) in raster order, float32.

    With e = width // 6 and ω_k = 10000^(−k/e) the channels are
    [sin d·ω | cos d·ω | sin h·ω | cos h·ω | sin w·ω | cos w·ω]; what is left of a width that 6 does not
    divide stays zero (ours: the MAE decoder's 512).
    """
    if width < 6:
        raise ValueError(f"width {width} is too small for 3D sin-cos positions, needed at least 6")
    e = width // 6
    # float64 so that the table does not depend on the platform's float32 pow
    omega = 10000.0 ** (-torch.arange(e, dtype=torch.float64) / e)
    axes = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
    parts = []
    for axis in axes:
        angle = axis.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1)
    return F.pad(table, (0, width - 6 * e)).float()[None]


def resample_positions(table: Tensor, source_grid: Sequence[int], target_grid: Sequence[int]) -> Tensor:
    """Tables (T, N, E) of one grid → (T, N', E) of another, trilinear (align_corners=False). No CLS row."""
    if tuple(source_grid) == tuple(target_grid):
        return table
    volume = table.unflatten(1, tuple(source_grid)).permute(0, 4, 1, 2, 3).float()
    volume = F.interpolate(volume, size=tuple(target_grid), mode="trilinear", align_corners=False)
    return volume.permute(0, 2, 3, 4, 1).flatten(1, 3).to(table.dtype)


def split_shuffle(ids_shuffle: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Token permutation (B, N) → visible ones `ids_keep` (B, K) and masked ones `ids_mask` (B, N − K)."""
    return ids_shuffle[:, :visible], ids_shuffle[:, visible:]


def take_tokens(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Rows `index` (B, K) of tokens (B or 1, N, E) → (B, K, E); None: all of them, as they are."""
    if index is None:
        return tokens
    tokens = tokens.expand(index.shape[0], -1, -1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def put_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Inverse of `take_tokens` for a full permutation: row k of `tokens` goes to place `index[k]`."""
    return torch.empty_like(tokens).scatter(1, index[:, :, None].expand_as(tokens), tokens)


def patch_statistics(patches: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch (…, P), both (…, 1); 1e-6 stands inside the root.

    Hi-End-MAE takes the biased, MiM and MAE3D the unbiased variance.
    """
    var, mean = torch.var_mean(patches, dim=-1, correction=int(unbiased), keepdim=True)
    return mean, (var + 1e-6).sqrt()


def normalize_patches(patches: Tensor, unbiased: bool) -> Tensor:
    """Each patch (…, P) minus its own mean over its own standard deviation, see `patch_statistics`."""
    mean, deviation = patch_statistics(patches, unbiased)
    return (patches - mean) / deviation
