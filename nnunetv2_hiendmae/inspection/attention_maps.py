"""`hiendmae attention`: where in an image the token of one voxel looks, as pictures and where it lies."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nibabel.orientations import apply_orientation
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.inspection.attention import decoder_cross_attention, encoder_attention
from nnunetv2_hiendmae.inspection.geometry import Grid, resample, write_nifti
from nnunetv2_hiendmae.inspection.planes import Planes, draw_planes
from nnunetv2_hiendmae.inspection.runs import load_method, read_run
from nnunetv2_hiendmae.inspection.volumes import RawImage, preprocess, read_image, turn_to_stored, with_channels
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.hiendmae import HiEndMAE
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings
from nnunetv2_hiendmae.run_files import ENCODER
from nnunetv2_hiendmae.weights import EncoderMetadata, load_encoder, read_metadata

MEAN = "mean"
RECORD = "attention.json"


@dataclass(frozen=True)
class Query:
    """Whose attention is shown.

    Args:
        voxel: (D, H, W) index in the file's array.
        point_mm: (X, Y, Z) world position as in NIfTI, x to the patient's right; instead of `voxel`.
        cls: the CLS token asks; the voxel only decides where the crop lies.
    """

    voxel: tuple[int, int, int] | None = None
    point_mm: tuple[float, float, float] | None = None
    cls: bool = False


@dataclass(frozen=True, eq=False)
class Crop:
    """The crop that the network sees: normalised voxels (C, D, H, W), their grid, and the token of the query."""

    image: np.ndarray
    grid: Grid
    token: int


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention of one layer and head: weights of the patch tokens (d, h, w), and the rest of the row, CLS."""

    name: str
    weights: np.ndarray
    on_cls: float


def attention_pictures(
    image: Sequence[Path],
    output: Path,
    query: Query,
    *,
    encoder_file: Path | None = None,
    run_dir: Path | None = None,
    cross: bool = False,
    layers: Sequence[int] | None = None,
    heads: Sequence[int | str] = (MEAN,),
    seed: int = 0,
) -> list[Path]:
    """Writes, per layer and head, `<name>.png` and `<name>.nii.gz` (the map on the image's own grid, linear between
    patch centres, zero outside the crop), and `attention.json` with the exact sums.

    Args:
        image: a raw image, one file per channel.
        encoder_file, run_dir: exactly one of them; a run's self-attention is that of its encoder file.
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
    source = _source(encoder_file, run_dir)
    metadata = with_channels(read_metadata(source))
    settings = _cross_settings(run_dir) if cross else None
    blocks = _check_layers(metadata.spec, layers, cross)
    _check_heads(_num_heads(metadata.spec, settings), heads)
    if query.cls and not metadata.spec.cls_token:
        raise UserError(f"--cls, but the encoder of {source} has no CLS token; leave --cls out")
    raw = read_image(image, metadata)
    point = _query_point(raw, query)
    crop = _cut(raw, metadata, point)
    token = None if query.cls else crop.token
    tensor = torch.from_numpy(crop.image)[None]
    if settings is None:
        rows = encoder_attention(load_encoder(source)[0], tensor, blocks, token)
        names = [f"layer{i:02d}" for i in blocks]
    else:
        order = _order(metadata.spec.num_tokens, crop.token, seed)
        rows = decoder_cross_attention(load_method(run_dir, settings), tensor, order, blocks, token)
        names = [f"cross{i}_layer{metadata.spec.taps[-1 - i]:02d}" for i in blocks]
    maps = [m for name, row in zip(names, rows, strict=True) for m in _maps(name, row, heads, metadata.spec)]
    _write_record(output, image, query, point, crop, maps)
    return [_write(output, m, raw, crop, point, metadata) for m in maps]


def _source(encoder_file: Path | None, run_dir: Path | None) -> Path:
    if (encoder_file is None) == (run_dir is None):
        raise UserError("give either an encoder file (-w encoder.safetensors) or the folder of a run, not both or none")
    return run_dir / ENCODER if encoder_file is None else encoder_file


def _cross_settings(run_dir: Path | None) -> PretrainSettings:
    if run_dir is None:
        raise UserError("--cross shows a run's decoder, an encoder file has none; give the folder of a hiendmae run")
    settings = read_run(run_dir)
    if not issubclass(METHODS[settings.method], HiEndMAE):
        raise UserError(
            f"{run_dir} is a run of {settings.method}, whose decoder has no cross-attention; needed one of "
            f"{HiEndMAE.name}, or leave --cross out for the encoder's self-attention"
        )
    return settings


def _check_layers(spec: EncoderSpec, layers: Sequence[int] | None, cross: bool) -> list[int]:
    total = len(spec.taps) if cross else spec.depth
    if layers is None:
        return list(range(total)) if cross else [total - 1]
    wrong = [i for i in layers if not 0 <= i < total]
    if wrong:
        kind = "cross blocks of the decoder" if cross else "layers of the encoder"
        raise UserError(f"--layers {wrong[0]} does not exist, the {kind} are 0 to {total - 1}")
    return list(dict.fromkeys(layers))


def _num_heads(spec: EncoderSpec, settings: PretrainSettings | None) -> int:
    decoder_heads = settings.options.get("decoder_heads") if settings else None
    return spec.num_heads if decoder_heads is None else decoder_heads


def _check_heads(total: int, heads: Sequence[int | str]) -> None:
    wrong = [h for h in heads if h != MEAN and not (isinstance(h, int) and 0 <= h < total)]
    if wrong:
        raise UserError(f"--heads {wrong[0]} does not exist, needed 0 to {total - 1} or {MEAN}")


def _query_point(raw: RawImage, query: Query) -> np.ndarray:
    """World position of the query's voxel centre, or the point itself."""
    shape = raw.stored_grid.shape
    if query.voxel is not None:
        if not all(0 <= v < s for v, s in zip(query.voxel, shape, strict=True)):
            raise UserError(f"--voxel {_listed(query.voxel)} is outside the image, whose array is {_listed(shape)}")
        return raw.stored_grid.to_world(query.voxel)
    if raw.grid.nearest(query.point_mm) is None:
        middle = raw.grid.to_world([(s - 1) / 2 for s in raw.grid.shape])
        raise UserError(
            f"--point {_listed(query.point_mm)} mm is outside the image, whose middle is at "
            f"{_listed(round(float(m), 1) for m in middle)} mm"
        )
    return np.asarray(query.point_mm, float)


def _listed(values: Iterable[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def _cut(raw: RawImage, metadata: EncoderMetadata, point: np.ndarray) -> Crop:
    """Crop around the query; inside the volume wherever that is large enough, as crops are in pretraining."""
    volume, grid = preprocess(raw, metadata)
    size, patch = metadata.spec.img_size, metadata.spec.patch_size
    centre = np.floor(grid.to_index(point) + 0.5).astype(int)
    room = np.array(grid.shape) - size
    lower = np.where(room > 0, np.clip(centre - np.array(size) // 2, 0, np.maximum(room, 0)), -(-room // 2))
    at = centre - lower
    if not all(0 <= a < s for a, s in zip(at, size, strict=True)):
        raise UserError("the query lies in the empty border of the image, which nnU-Net cuts off; choose one inside")
    token = np.ravel_multi_index(tuple(at // patch), metadata.spec.grid)
    box = [[a, a + s] for a, s in zip(lower.tolist(), size, strict=True)]
    return Crop(crop_and_pad_nd(volume, box, 0).astype(np.float32), grid.cropped(lower, size), int(token))


def _order(tokens: int, masked: int, seed: int) -> Tensor:
    """Random token order (1, N) whose last token, which is always masked, is `masked`."""
    order = np.random.default_rng(seed).permutation(tokens)
    return torch.from_numpy(np.append(order[order != masked], masked))[None]


def _maps(name: str, row: Tensor, heads: Sequence[int | str], spec: EncoderSpec) -> list[AttentionMap]:
    made = []
    for head in dict.fromkeys(heads):
        weights = (row.mean(0) if head == MEAN else row[head]).numpy()
        patches = weights[-spec.num_tokens :]
        label = MEAN if head == MEAN else f"head{head:02d}"
        on_cls = float(weights[: -spec.num_tokens].sum())
        made.append(AttentionMap(f"{name}_{label}", patches.reshape(spec.grid), on_cls))
    return made


def _write(
    output: Path, made: AttentionMap, raw: RawImage, crop: Crop, point: np.ndarray, metadata: EncoderMetadata
) -> Path:
    tokens = crop.grid.resized(metadata.spec.grid)
    spread = resample(made.weights, tokens, raw.grid)
    stored = apply_orientation(spread, turn_to_stored(raw.properties))
    write_nifti(output / f"{made.name}.nii.gz", stored, raw.stored_grid)
    window = metadata.volume.window_hu if metadata.volume.is_ct(0) else None
    picture = output / f"{made.name}.png"
    draw_planes(picture, Planes(raw.data[0], spread, raw.grid, crop.grid), point, window, made.name)
    return picture


def _write_record(
    output: Path, image: Sequence[Path], query: Query, point: np.ndarray, crop: Crop, maps: Sequence[AttentionMap]
) -> None:
    record = {
        "image": [str(f) for f in image],
        "query": "CLS" if query.cls else "patch",
        "query_token": None if query.cls else crop.token,
        "point_mm": [round(float(p), 4) for p in point],
        "crop_spacing_mm": [round(s, 4) for s in crop.grid.spacing_mm],
        "maps": {
            m.name: {
                "sum_over_patches": float(m.weights.sum()),
                "on_cls": m.on_cls,
                "largest": float(m.weights.max()),
            }
            for m in maps
        },
    }
    write_text(output / RECORD, json.dumps(record, indent=2) + "\n")
