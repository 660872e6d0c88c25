"""Fitting encoder weights to a network of another grid, channel count, without CLS, or in its dense form."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import resample_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

if TYPE_CHECKING:
    from nnunetv2_hiendmae.weights.encoder_file import Encoder

# what may differ between a file and the network that reads it: none of it changes the shape of a block
ADAPTABLE = ("img_size", "in_channels", "taps", "cls_token", "pos_embed", "norm_eps", "drop_path_rate", "dense")
# what a network may lack that the file has, but not the other way round
_ONLY_DOWN = "cls_token"
_ONLY_UP = "dense"
# tensors of a convvit that only its masked form, or only its dense form has
_MASKED_ONLY = re.compile(r"fusions\..*|norm\.(weight|bias)")
_DENSE_ONLY = re.compile(r"rel_pos_bias|blocks\.\d+\.ls[12]\.gamma")


def check_compatible(source: EncoderSpec, target: EncoderSpec) -> None:
    """
    Raises:
        UserError: the two encoders differ in something that weights cannot be adapted to.
    """
    have, want = source.to_dict(), target.to_dict()
    differing = [k for k in have if k not in ADAPTABLE and have[k] != want[k]]
    if want[_ONLY_DOWN] and not have[_ONLY_DOWN]:
        differing.append(_ONLY_DOWN)
    if have[_ONLY_UP] and not want[_ONLY_UP]:
        differing.append(_ONLY_UP)
    if differing:
        told = ", ".join(f"{k} {have[k]} in the file, {want[k]} in the plans" for k in differing)
        raise UserError(f"the encoder file does not fit the network: {told}; run: hiendmae plan with this file again")


def adapt_state(
    state: Mapping[str, Tensor], source: EncoderSpec, encoder: "Encoder"
) -> tuple[dict[str, Tensor], LoadReport]:
    """Encoder weights of `source` as weights of `encoder`.

    Positions are resampled trilinearly (METHODS §5), input channels are repeated and divided by their number,
    a CLS token that the encoder does not have is dropped. The dense form of a convvit has no fusion and no final norm;
    its relative positions and LayerScale start as the encoder has them.

    Raises:
        UserError: see `check_compatible`.
    """
    target, start = encoder.spec, encoder.state_dict()
    check_compatible(source, target)
    becomes_dense = target.dense and not source.dense
    adapted, records = {}, []
    for name, tensor in state.items():
        reason = _reason_to_drop(name, target, becomes_dense)
        if reason:
            records.append(TensorRecord(name, None, "dropped", reason))
            continue
        value, detail = _fitted(name, tensor, source, encoder)
        adapted[name] = value
        records.append(TensorRecord(name, name, "adapted" if detail else "loaded", detail))
    if becomes_dense:
        fresh = [k for k in start if k not in adapted and _DENSE_ONLY.fullmatch(k)]
        adapted |= {k: start[k] for k in fresh}
        records += [TensorRecord(None, k, "fresh", "not in pretraining: keeps its start value") for k in fresh]
    return adapted, LoadReport(tuple(records))


def _reason_to_drop(name: str, target: EncoderSpec, becomes_dense: bool) -> str | None:
    if name == "cls_token" and not target.cls_token:
        return "the network has no CLS token"
    if becomes_dense and _MASKED_ONLY.fullmatch(name):
        return "only the masked form of pretraining fuses its stages and norms their sum"
    return None


def _fitted(name: str, tensor: Tensor, source: EncoderSpec, encoder: "Encoder") -> tuple[Tensor, str]:
    target = encoder.spec
    # resampling and division in float32: a file may hold 16-bit numbers
    if name == "pos_embed" and source.grid != target.grid:
        return _resampled(tensor, source.grid, target.grid)
    if name == "rel_pos_bias" and source.grid != target.grid:
        offsets = ([2 * g - 1 for g in grid] for grid in (source.grid, target.grid))
        return _resampled(tensor, *offsets)
    if name == encoder.input_kernel and source.in_channels != target.in_channels:
        return _spread_channels(tensor.float(), source.in_channels, target.in_channels)
    return tensor, ""


def _resampled(table: Tensor, source_grid: tuple | list, target_grid: tuple | list) -> tuple[Tensor, str]:
    detail = f"grid {tuple(source_grid)} → {tuple(target_grid)}, trilinear"
    return resample_positions(table.float(), source_grid, target_grid), detail


def _spread_channels(kernel: Tensor, source: int, target: int) -> tuple[Tensor, str]:
    if source != 1:
        raise UserError(
            f"the encoder file has {source} input channels, the dataset {target}: only 1 can be spread over more"
        )
    return kernel.repeat(
        1, target, 1, 1, 1
    ) / target, f"{source} → {target} input channels, repeated and divided by {target}"
