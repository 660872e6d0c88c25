"""Comparing tensors with those that an encoder has."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import build_encoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.weights.report import printable

_MOST_NAMED = 3


def expected_tensors(spec: EncoderSpec) -> dict[str, Tensor]:
    """Names and shapes of a spec's encoder, on the meta device: takes no memory."""
    with torch.device("meta"):
        return build_encoder(spec).state_dict()


def mismatch(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], sources: Mapping[str, str | None] | None = None
) -> str | None:
    """What is missing, left over, of another shape or no floating-point number, up to three of it in words; None: all
    as expected.

    Args:
        sources: what a tensor is called in messages, None or missing: as in `state`.
    """
    called = {k: printable((sources or {}).get(k) or k) for k in state}
    wrong = [f"{k} is missing" for k in expected if k not in state]
    wrong += [f"{called[k]} is unexpected" for k in state if k not in expected]
    wrong += [
        f"{called[k]} has shape {tuple(state[k].shape)}, needed {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    wrong += [
        f"{called[k]} holds {str(v.dtype).removeprefix('torch.')}, needed floating-point numbers"
        for k, v in state.items()
        if not v.is_floating_point()
    ]
    return named(wrong, "; ") if wrong else None


def named(items: list[str], separator: str = ", ") -> str:
    """The first three, and how many more there are."""
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return f"{separator.join(items[:_MOST_NAMED])}{more}"
