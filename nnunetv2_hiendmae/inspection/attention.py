"""`hiendmae attention`: where in an image the token of one voxel looks, as pictures and where it lies."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from nibabel.orientations import apply_orientation
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import split_shuffle
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.figures import grey_limits, save_figure, show_grey
from nnunetv2_hiendmae.files import ENCODER, write_text
from nnunetv2_hiendmae.inspection import volumes as vol
from nnunetv2_hiendmae.inspection.reconstruct import load_run
from nnunetv2_hiendmae.pretraining.hiendmae import CrossAttention, HiEndMAE
from nnunetv2_hiendmae.training.volumes import crop_and_pad
from nnunetv2_hiendmae.weights import load_encoder, read_metadata
from nnunetv2_hiendmae.weights.hub import local_file

MEAN = "mean"
RECORD = "attention.json"
# of the crop's extent, shown around it
MARGIN = 0.2
# array axes towards feet, back, left: slices then have the head or the front up, and the patient's right at the left
PICTURE_AXES = "IPL"
WEIGHT_COLOURS = "inferno"
PLANE_INCHES = 3.4
CROSS = {"marker": "+", "color": "cyan", "markersize": 12, "markeredgewidth": 1.5}


def attention_pictures(
    image: Sequence[Path],
    source: str | Path,
    output: Path,
    *,
    voxel: Sequence[int] | None = None,
    point_mm: Sequence[float] | None = None,
    cls: bool = False,
    cross: bool = False,
    layers: Sequence[int] | None = None,
    heads: Sequence[int | str] = (MEAN,),
    seed: int = 0,
) -> list[Path]:
    """Writes, per layer and head, `<name>.png` and `<name>.nii.gz` (the map on the image's own grid, linear between
    patch centres, zero outside the crop), and `attention.json` with the exact sums.

    Args:
        image: a raw image, one file per channel.
        source: an encoder file, or the folder of a run, which stands for its encoder file.
        voxel: whose token asks: (D, H, W) index in the file's array.
        point_mm: instead of `voxel`, a world position (X, Y, Z) as in NIfTI, x to the patient's right.
        cls: the CLS token asks; the voxel only decides where the crop lies.
        cross: cross-attention of a Hi-End-MAE run's decoder, of a masked patch, to the encoder's layers.
        layers: 0-based blocks; None: the encoder's last, or all of the decoder's cross blocks.
        heads: numbers, or "mean" over all.
        seed: decides which other patches are masked (`cross` only).

    Returns:
        The PNG files.

    Raises:
        UserError: a file, layer, head or voxel that does not exist, wrong channels, a negative seed, or a method
            without such layers.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}, needed 0 or more")
    source = local_file(source)
    encoder_file = source / ENCODER if source.is_dir() else source
    metadata = read_metadata(encoder_file)
    spec, volumes = metadata.spec, vol.known_format(metadata)
    network = _load_decoder(source) if cross else load_encoder(encoder_file)[0]
    blocks = _choose_blocks(network, layers, heads)
    if cls and not spec.cls_token:
        raise UserError(f"--cls, but the encoder of {encoder_file} has no CLS token; leave --cls out")
    raw = vol.read_image(image, volumes)
    point = _query_point(raw.grid.turned(raw.to_stored), voxel, point_mm)
    crop, crop_grid, token = _cut(*vol.preprocess(raw, volumes), spec, point)
    rows = _rows(network, crop, blocks, token, cls, seed)
    maps = {name: weights.numpy() for layer, row in rows.items() for name, weights in _by_head(layer, row, heads)}
    record = {
        "image": [str(f) for f in image],
        "query": "CLS" if cls else "patch",
        "query_token": None if cls else token,
        "point_mm": [round(float(p), 4) for p in point],
        "crop_spacing_mm": [round(s, 4) for s in crop_grid.spacing_mm],
        "maps": {name: _sums(row[-spec.num_tokens :], row[: -spec.num_tokens]) for name, row in maps.items()},
    }
    write_text(output / RECORD, json.dumps(record, indent=2) + "\n")
    # of the whole image, where it is no CT
    limits = grey_limits(raw.data[0], volumes.window_hu if volumes.is_ct(0) else None)
    patches = {name: row[-spec.num_tokens :].reshape(spec.grid) for name, row in maps.items()}
    return [_write(output / name, weights, raw, crop_grid, point, limits) for name, weights in patches.items()]


@torch.no_grad()
def encoder_attention(encoder: nn.Module, image: Tensor, blocks: Sequence[int], query: int | None) -> list[Tensor]:
    """Self-attention of one token in some of an encoder's blocks, all tokens visible.

    Args:
        encoder: in eval mode.
        image: (1, C, D, H, W) of any size the encoder takes.
        blocks: 0-based.
        query: token in raster numbering; None: the CLS token.

    Returns:
        Per block (heads, [1+]N), CLS first if there is one; every row sums to one, but for what register tokens get.
    """
    registers = encoder.spec.register_tokens
    row = registers + (0 if query is None else encoder.num_prefix_tokens + query)
    layers = [encoder.blocks[i].attn for i in blocks]
    with _recording(layers, row) as rows:
        # what fine-tuning runs: it works for every kind of encoder
        encoder.feature_maps(image)
    return [rows[layer][:, registers:] for layer in layers]


@torch.no_grad()
def decoder_cross_attention(
    method: HiEndMAE, image: Tensor, ids_shuffle: Tensor, blocks: Sequence[int], query: int | None
) -> list[Tensor]:
    """What a token of Hi-End-MAE's decoder attends to in the encoder's layers.

    Args:
        image: (1, C, D, H, W) of the encoder's size.
        ids_shuffle: (1, N) token permutation, visible tokens first.
        blocks: 0-based cross blocks; block i reads tap −1−i, the deepest first.
        query: token in raster numbering, visible or masked; None: the CLS token.

    Returns:
        Per block (heads, [1+]N) in raster order, CLS first if there is one: zero at masked tokens, which the encoder
        has not seen; every row sums to one.
    """
    prefix = method.encoder.num_prefix_tokens
    keep, _ = split_shuffle(ids_shuffle, method.visible)
    row = 0 if query is None else prefix + int((ids_shuffle[0] == query).nonzero())
    layers = [method.cross_blocks[i].cross_attn for i in blocks]
    with _recording(layers, row) as rows:
        method.predict(image, ids_shuffle)
    seen = torch.cat([torch.arange(prefix, device=keep.device), prefix + keep[0]])
    length, seeing = prefix + ids_shuffle.shape[1], [rows[layer] for layer in layers]
    return [weights.new_zeros(len(weights), length).index_copy(1, seen, weights) for weights in seeing]


@contextmanager
def _recording(layers: Sequence[nn.Module], row: int) -> Iterator[dict[nn.Module, Tensor]]:
    """One row (heads, M) of the attention weights softmax(q·kᵀ/√d + bias) of each layer's last call, by layer.

    timm's layers hand their weights, with the bias of relative positions in them, to `attn_drop` where they do not run
    fused; ours always run fused, so theirs are computed from what they are given.
    """
    rows: dict[nn.Module, Tensor] = dict.fromkeys(layers)

    def keep(layer: nn.Module, weights: Tensor) -> None:
        rows[layer] = weights[0, :, row]

    with ExitStack() as undo:
        for layer in layers:
            if isinstance(layer, CrossAttention):
                hook = layer.register_forward_pre_hook(lambda layer, args: keep(layer, _cross_weights(layer, *args)))
            else:
                undo.callback(setattr, layer, "fused_attn", layer.fused_attn)
                layer.fused_attn = False
                hook = layer.attn_drop.register_forward_pre_hook(lambda _, args, layer=layer: keep(layer, args[0]))
            undo.callback(hook.remove)
        yield rows


def _cross_weights(layer: CrossAttention, queries: Tensor, keys: Tensor) -> Tensor:
    """Queries (B, N, F), keys (B, M, F) → (B, heads, N, M)."""
    q = layer.q(queries).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    k, _ = layer.kv(keys).unflatten(2, (2, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


def _load_decoder(run_dir: Path) -> HiEndMAE:
    if not run_dir.is_dir():
        raise UserError("--cross shows a run's decoder, an encoder file has none; give the folder of a hiendmae run")
    _, method = load_run(run_dir)
    if isinstance(method, HiEndMAE):
        return method
    raise UserError(
        f"{run_dir} is a run of {method.name}, whose decoder has no cross-attention; needed one of {HiEndMAE.name}, or "
        "leave --cross out for the encoder's self-attention"
    )


def _choose_blocks(network: nn.Module, layers: Sequence[int] | None, heads: Sequence[int | str]) -> list[int]:
    """Numbers of the asked blocks, each once, after a look whether these and the heads are there."""
    cross = isinstance(network, HiEndMAE)
    there = [b.cross_attn for b in network.cross_blocks] if cross else [b.attn for b in network.blocks]
    last, last_head = len(there) - 1, there[0].num_heads - 1
    for layer in layers or ():
        if not 0 <= layer <= last:
            kind = "cross blocks of the decoder" if cross else "layers of the encoder"
            raise UserError(f"--layers {layer} does not exist, the {kind} are 0 to {last}")
    for head in heads:
        if head != MEAN and not (isinstance(head, int) and 0 <= head <= last_head):
            raise UserError(f"--heads {head} does not exist, needed 0 to {last_head} or {MEAN}")
    if layers is None:
        return list(range(len(there))) if cross else [last]
    return list(dict.fromkeys(layers))


def _query_point(grid: vol.Grid, voxel: Sequence[int] | None, point_mm: Sequence[float] | None) -> np.ndarray:
    """World position of the query in an image: the voxel's centre, or the point itself."""
    at = grid.to_index(point_mm) if voxel is None else np.array(voxel)
    if all(-0.5 <= a < s - 0.5 for a, s in zip(at, grid.shape, strict=True)):
        return np.asarray(point_mm, float) if voxel is None else grid.to_world(voxel)
    if voxel is not None:
        raise UserError(f"--voxel {_listed(voxel)} is outside the image, whose array is {_listed(grid.shape)}")
    middle = grid.to_world([(s - 1) / 2 for s in grid.shape]).round(1)
    raise UserError(f"--point {_listed(point_mm)} mm is outside the image, whose middle is at {_listed(middle)} mm")


def _listed(values: Iterable[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def _cut(volume: np.ndarray, grid: vol.Grid, spec: EncoderSpec, point: np.ndarray) -> tuple[Tensor, vol.Grid, int]:
    """Crop (1, C, D, H, W) around a world position, inside the volume wherever that is large enough, as crops are in
    pretraining; its grid; and the token of the position."""
    size, patch = np.array(spec.img_size), np.array(spec.patch_size)
    centre = np.floor(grid.to_index(point) + 0.5).astype(int)
    room = np.array(grid.shape) - size
    lower = np.where(room > 0, np.clip(centre - size // 2, 0, np.maximum(room, 0)), -(-room // 2))
    at = centre - lower
    if not all(0 <= a < s for a, s in zip(at, size, strict=True)):
        raise UserError("the query lies in the empty border of the image, which nnU-Net cuts off; choose one inside")
    crop = torch.from_numpy(crop_and_pad(volume, lower, size, lambda: volume.min(axis=(1, 2, 3))))[None]
    return crop, grid.cropped(lower, size), int(np.ravel_multi_index(tuple(at // patch), spec.grid))


def _rows(
    network: nn.Module, crop: Tensor, blocks: Sequence[int], token: int, cls: bool, seed: int
) -> dict[str, Tensor]:
    """Attention (heads, [1+]N) of the token at the query, or of CLS, in each block, by the block's name."""
    query, spec = None if cls else token, network.spec
    if not isinstance(network, HiEndMAE):
        rows = encoder_attention(network, crop, blocks, query)
        return {f"layer{i:02d}": row for i, row in zip(blocks, rows, strict=True)}
    ids_shuffle = np.random.default_rng(seed).permutation(spec.num_tokens)
    # the last one is always masked
    ids_shuffle = torch.from_numpy(np.append(ids_shuffle[ids_shuffle != token], token))[None]
    rows = decoder_cross_attention(network, crop, ids_shuffle, blocks, query)
    return {f"cross{i}_layer{spec.taps[-1 - i]:02d}": row for i, row in zip(blocks, rows, strict=True)}


def _by_head(layer: str, row: Tensor, heads: Sequence[int | str]) -> Iterator[tuple[str, Tensor]]:
    for head in heads:
        yield (f"{layer}_{MEAN}", row.mean(0)) if head == MEAN else (f"{layer}_head{head:02d}", row[head])


def _sums(patches: np.ndarray, prefix: np.ndarray) -> dict[str, float]:
    return {"sum_over_patches": float(patches.sum()), "on_cls": float(prefix.sum()), "largest": float(patches.max())}


def _write(
    stem: Path, weights: np.ndarray, raw: vol.RawImage, crop: vol.Grid, point: np.ndarray, limits: tuple[float, float]
) -> Path:
    spread, turn = vol.resample(weights, crop.resized(weights.shape), raw.grid), raw.to_stored
    vol.write_nifti(stem.with_suffix(".nii.gz"), apply_orientation(spread, turn), raw.grid.turned(turn))
    shown, picture = raw.grid.covered(crop, MARGIN), stem.with_suffix(".png")
    part = raw.grid.cropped([s.start for s in shown], [s.stop - s.start for s in shown])
    _draw_planes(picture, raw.data[0][shown], spread[shown], part, point, limits)
    return picture


def _draw_planes(
    path: Path, image: np.ndarray, overlay: np.ndarray, part: vol.Grid, point: np.ndarray, limits: tuple[float, float]
) -> None:
    """Writes a PNG: axial, coronal and sagittal slices through a world position in mm, above the image alone with the
    position marked, below with the map over it, both (D, H, W) on `part`. Patient's right is at the left, front and
    head are up."""
    from matplotlib.figure import Figure

    change = part.turn_to(PICTURE_AXES)
    image, overlay = (apply_orientation(a, change) for a in (image, overlay))
    turned = part.turned(change)
    at = [min(max(round(float(i)), 0), n - 1) for i, n in zip(turned.to_index(point), turned.shape, strict=True)]
    strongest = float(overlay.max())

    extent = np.array(turned.shape) * turned.spacing_mm
    heights, widths = (extent[1], extent[0], extent[0]), (extent[2], extent[2], extent[1])
    scale = PLANE_INCHES / extent.max()
    figure = Figure(figsize=(scale * sum(widths) + 1.6, 2 * scale * max(heights) + 1.0), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=widths)
    for across, name in enumerate(("axial", "coronal", "sagittal")):
        rows, columns = [axis for axis in range(3) if axis != across]
        picture, weights = (np.take(a, at[across], axis=across) for a in (image, overlay))
        aspect = turned.spacing_mm[rows] / turned.spacing_mm[columns]
        above, below = axes[:, across]
        show_grey(above, picture, limits, aspect, name)
        show_grey(below, picture, limits, aspect)
        # weak attention lets the image through
        opacity = 0.75 * np.sqrt(weights / max(strongest, 1e-12))
        percent = {"cmap": WEIGHT_COLOURS, "vmin": 0, "vmax": strongest * 100}
        drawn = below.imshow(weights * 100, alpha=opacity, aspect=aspect, **percent)
        for axis in (above, below):
            axis.plot(at[columns], at[rows], **CROSS)
    bar = figure.colorbar(drawn, ax=axes[1, :], shrink=0.8)
    bar.set_label("attention on a patch, % of all", fontsize=8)
    figure.suptitle(f"{path.stem}, at {', '.join(f'{p:.1f}' for p in point)} mm", fontsize=10)
    save_figure(figure, path)
