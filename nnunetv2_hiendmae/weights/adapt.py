"""An encoder's weights for another network: of another grid, channel count or order of axes, without CLS, or dense."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pkgutil import resolve_name

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import ENCODERS, Encoder, EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.layers import Axes, axes_of
from nnunetv2_hiendmae.architectures.tokens import resample_positions
from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.weights.metadata import check_size
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# what may differ between a file and the network that reads it: none of it changes the shape of a block
ADAPTABLE = ("img_size", "in_channels", "taps", "pos_embed", "norm_eps", "drop_path_rate")


def expected_tensors(spec: EncoderSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of a spec's encoder, on the meta device: takes no memory. Refuses one that is too large to be
    that of `state` (ValueError)."""
    check_size(spec, state)
    with torch.device("meta"):
        return build_encoder(spec).state_dict()


def mismatch(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], sources: Mapping[str, str] | None = None
) -> str | None:
    """What is missing, left over, of another shape or no floating-point number, up to three of it in words, called as
    `sources` say; None: all as expected."""
    called = {k: printable((sources or {}).get(k, k)) for k in state}
    wrong = [f"{k} is missing" for k in expected if k not in state]
    wrong += [f"{called[k]} is unexpected" for k in state if k not in expected]
    shapes = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in expected.items() if k in state}
    wrong += [f"{called[k]} has shape {have}, needed {want}" for k, (have, want) in shapes.items() if have != want]
    types = {k: str(v.dtype).removeprefix("torch.") for k, v in state.items() if not v.is_floating_point()}
    wrong += [f"{called[k]} holds {kind}, needed floating-point numbers" for k, kind in types.items()]
    return some(wrong, separator="; ") or None


def check_compatible(
    source: EncoderSpec, target: EncoderSpec, mend: str = "run: hiendmae plan with this file again"
) -> None:
    """Refuses encoders that differ in something that weights cannot be adapted to (UserError)."""
    have, want = asdict(source), asdict(target)
    # a network may lack CLS and be dense where the file is otherwise, but not the other way round
    differing = {k: have[k] != want[k] for k in have if k not in ADAPTABLE}
    differing |= {"cls_token": target.cls_token and not source.cls_token, "dense": source.dense and not target.dense}
    told = ", ".join(f"{k} {have[k]} in the file, {want[k]} in the network" for k in differing if differing[k])
    if told:
        raise UserError(f"the encoder file does not fit the network: {told}; {mend}")


def adapt_state(
    state: Mapping[str, Tensor], source: EncoderSpec, encoder: Encoder
) -> tuple[dict[str, Tensor], LoadReport]:
    """Encoder weights of `source` as weights of `encoder`.

    Positions are resampled trilinearly, input channels are repeated and divided by their number, a CLS token that the
    encoder does not have is dropped (docs/methods.md, "Fine-tuning recipes"). The dense form of a convvit has no fusion
    and no final norm; its relative positions and LayerScale start as the encoder has them.

    Raises:
        UserError: see `check_compatible`.
    """
    target, adapted, records = encoder.spec, {}, []
    check_compatible(source, target)
    becomes_dense = target.dense and not source.dense
    for name, tensor in state.items():
        if name == "cls_token" and not target.cls_token:
            records.append(TensorRecord(name, None, "dropped", "the network has no CLS token"))
        elif becomes_dense and re.fullmatch(encoder.masked_only, name):
            reason = "only the masked form of pretraining fuses its stages and norms their sum"
            records.append(TensorRecord(name, None, "dropped", reason))
        else:
            adapted[name], detail = _fitted(name, tensor, source, encoder)
            records.append(TensorRecord(name, name).changed(detail))
    if becomes_dense:
        start = encoder.state_dict()
        fresh = [k for k in start if k not in adapted and re.fullmatch(encoder.dense_only, k)]
        records += [TensorRecord(None, k, "fresh", "not in pretraining: keeps its start value") for k in fresh]
        adapted |= {k: start[k] for k in fresh}
    return adapted, LoadReport(tuple(records))


def _fitted(name: str, tensor: Tensor, source: EncoderSpec, encoder: Encoder) -> tuple[Tensor, str]:
    """A tensor for the encoder's grid and channels, and what was done to it. In float32: a file may hold 16-bit
    numbers."""
    target, axes = encoder.spec, axes_of(name, encoder.axes)
    if axes in (Axes.TOKENS, Axes.OFFSETS) and source.grid != target.grid:
        grids = axes.rows(source.grid), axes.rows(target.grid)
        return resample_positions(tensor.float(), *grids), f"grid {grids[0]} → {grids[1]}, trilinear"
    if name != encoder.input_kernel or source.in_channels == target.in_channels:
        return tensor, ""
    have, want = source.in_channels, target.in_channels
    if have != 1:
        told = f"the encoder file has {have} input channels, the dataset {want}"
        raise UserError(f"{told}: only 1 can be spread over more")
    spread = tensor.float().repeat(1, want, 1, 1, 1) / want
    return spread, f"{have} → {want} input channels, repeated and divided by {want}"


def permute_axes(
    state: Mapping[str, Tensor], spec: EncoderSpec, order: Sequence[int]
) -> tuple[dict[str, Tensor], EncoderSpec]:
    """Weights and spec of the encoder that does with a permuted volume what this one does with the volume.

    A network of convolutions, patches and positions is equivariant to permuting axes, if the kernels' axes, the grids
    of its position tables, the windows of its relative positions and the blocks of channels that turn along an axis are
    permuted with the data. Works for encoders and for whole networks, whose encoder's names start with `encoder.`.
    Tensors that change are views, but for those of rotary channels. `order`: new axis i is the old axis `order[i]`, as
    in `volume.permute`.

    Raises:
        ValueError: `order` is no permutation, a table does not have the rows of the spec's grid, a kernel not five
            axes, or neither the encoder nor its network declares how a tensor lies along the axes.
    """
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"order {tuple(order)} is no permutation of 0, 1, 2")
    encoder = ENCODERS[spec.kind]
    declared = encoder.axes
    if any(name.startswith("encoder.") for name in state):
        declared = {rf"encoder\.({pattern})": axes for pattern, axes in encoder.axes.items()}
        for network in map(resolve_name, (*encoder.own_networks.values(), encoder.network)):
            declared |= {rf"(?!encoder\.)({pattern})": axes for pattern, axes in network.axes.items()}
    permuted = {k: _permuted(k, v, axes_of(k, declared), spec, order) for k, v in state.items()}
    img_size, patch_size = (tuple(size[i] for i in order) for size in (spec.img_size, spec.patch_size))
    return permuted, spec.with_(img_size=img_size, patch_size=patch_size)


def rotary_permuted(tensor: Tensor, num_heads: int, order: Sequence[int]) -> Tensor:
    """Rows (E, …) of queries or keys whose heads turn along permuted axes: block i of a head is the old `order[i]`."""
    blocks = tensor.unflatten(0, (num_heads, 3, -1))
    return torch.stack([blocks[:, i] for i in order], dim=1).flatten(0, 2)


def _permuted(name: str, tensor: Tensor, axes: Axes | None, spec: EncoderSpec, order: Sequence[int]) -> Tensor:
    if axes is None:
        raise ValueError(f"{name}: no class says how it lies along the volume's axes; declare it in `axes`")
    if axes is Axes.NONE:
        return tensor
    if axes is Axes.KERNEL:
        if tensor.ndim != 5:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, needed the five axes of a kernel")
        return tensor.permute(0, 1, *(2 + i for i in order))
    if axes is Axes.ROTARY:
        return rotary_permuted(tensor, spec.num_heads, order)
    rows = axes.rows(spec.grid)
    try:
        table = tensor.unflatten(1, rows)
    except RuntimeError as e:
        raise ValueError(f"{name} has {tensor.shape[1]} rows, needed a grid of {rows}") from e
    return table.permute(0, *(1 + i for i in order), 4).flatten(1, 3)
