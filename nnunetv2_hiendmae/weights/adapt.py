"""Fitting encoder weights to a network of another grid, channel count or without CLS."""

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import resample_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# what may differ between a file and the network that reads it: none of it changes the shape of a block
ADAPTABLE = ("img_size", "in_channels", "taps", "cls_token", "pos_embed", "norm_eps", "drop_path_rate")


def check_compatible(source: EncoderSpec, target: EncoderSpec) -> None:
    """
    Raises:
        UserError: the two encoders differ in something that weights cannot be adapted to.
    """
    have, want = source.to_dict(), target.to_dict()
    differing = [k for k in have if k not in ADAPTABLE and have[k] != want[k]]
    if target.cls_token and not source.cls_token:
        differing.append("cls_token")
    if differing:
        told = ", ".join(f"{k} {have[k]} in the file, {want[k]} in the plans" for k in differing)
        raise UserError(f"the encoder file does not fit the network: {told}; run: hiendmae plan with this file again")


def adapt_state(
    state: dict[str, Tensor], source: EncoderSpec, target: EncoderSpec
) -> tuple[dict[str, Tensor], LoadReport]:
    """Encoder weights of `source` as weights of `target`.

    Positions are resampled trilinearly (METHODS §5), input channels are repeated and divided by their number,
    a CLS token that the target does not have is dropped.

    Raises:
        UserError: see `check_compatible`.
    """
    check_compatible(source, target)
    adapted, records = {}, []
    for name, tensor in state.items():
        value, detail = tensor, ""
        if name == "cls_token" and not target.cls_token:
            records.append(TensorRecord(name, None, "dropped", "the network has no CLS token"))
            continue
        if name == "pos_embed" and source.grid != target.grid:
            value = resample_positions(tensor, source.grid, target.grid)
            detail = f"grid {source.grid} → {target.grid}, trilinear"
        elif name == "patch_embed.proj.weight" and source.in_channels != target.in_channels:
            value, detail = _spread_channels(tensor, source.in_channels, target.in_channels)
        adapted[name] = value
        records.append(TensorRecord(name, name, "adapted" if detail else "loaded", detail))
    return adapted, LoadReport(tuple(records))


def _spread_channels(kernel: Tensor, source: int, target: int) -> tuple[Tensor, str]:
    if source != 1:
        raise UserError(
            f"the encoder file has {source} input channels, the dataset {target}: only 1 can be spread over more"
        )
    return kernel.repeat(
        1, target, 1, 1, 1
    ) / target, f"{source} → {target} input channels, repeated and divided by {target}"
