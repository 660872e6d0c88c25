"""From the content of a file to an encoder's tensors, its spec, and an account of every tensor on both sides."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import build_encoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.axes import REVERSED, permute_axes
from nnunetv2_hiendmae.weights.foreign import check_finite, check_plain, tensors_in
from nnunetv2_hiendmae.weights.formats import Found, is_weight
from nnunetv2_hiendmae.weights.layouts import Hints
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# a table this close to ours was never trained
_SINCOS_TOLERANCE = 1e-4
# what a name looks like whose loss would change the encoder's output, if no rule says that it may be left out
_ENCODER_LIKE = re.compile(
    r"(encoder|backbone|vit)\..*"
    r"|(blocks?\d*|layers?\d*|stages?\d*\w*|\w*patch_embed\w*|embed\w*|norm\w*|fusions?|\w*pos_embed\w*|rel_pos\w*"
    r"|\w*token\w*|gamma\w*|ls\d?|rope\w*|attn\w*|mlp\w*)(\..*)?"
)


@dataclass
class Draft:
    """An encoder's tensors on their way, by our names.

    Args:
        sources: where each came from, None where there is no tensor in the file.
        details: what was done to each.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str | None] = field(default_factory=dict)
    details: dict[str, list[str]] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor, detail: str, source: str | None = None) -> None:
        """Replaces or adds a tensor and notes what was done."""
        self.tensors[name] = tensor
        self.sources.setdefault(name, source)
        self.details.setdefault(name, []).append(detail)

    def records(self) -> list[TensorRecord]:
        """A line for each."""
        return [self._record(name, source) for name, source in self.sources.items()]

    def _record(self, name: str, source: str | None) -> TensorRecord:
        details = "; ".join(self.details.get(name, ()))
        if source is None:
            return TensorRecord(None, name, "fresh", details)
        return TensorRecord(source, name, "adapted" if details else "loaded", details)


def translate_found(
    found: Found, hints: Hints, reverse_axes: bool
) -> tuple[dict[str, Tensor], EncoderSpec, list[TensorRecord]]:
    """A foreign state_dict as an encoder of ours.

    Args:
        reverse_axes: from (x, y, z) to (z, y, x).

    Returns:
        Tensors (views of the file's where they did not change), their spec, and a record of every tensor of the
        state_dict and of the encoder.

    Raises:
        UserError: a tensor is missing, has the wrong shape or no finite numbers, nothing explains what one is for, or
            shapes do not tell the spec and the hints do not either.
    """
    draft, dropped = _renamed(found)
    spec = found.format.layout.spec(draft.tensors, hints)
    for name, tensor in draft.tensors.items():
        value, detail = found.format.layout.value(name, tensor, spec)
        if detail:
            draft.put(name, value, detail)
    _split_cls_row(draft, spec)
    if found.format.zero_qkv_bias:
        _fill_qkv_bias(draft, spec)
    check_state(draft, spec)
    if not _is_sincos(draft.tensors["pos_embed"], spec):
        spec = spec.with_(pos_embed="learned")
    return *finish(draft, spec, reverse_axes), [*draft.records(), *dropped]


def finish(draft: Draft, spec: EncoderSpec, reverse_axes: bool) -> tuple[dict[str, Tensor], EncoderSpec]:
    """Axes and number types; the draft is checked already."""
    for name, tensor in draft.tensors.items():
        if tensor.dtype == torch.float64:
            # the numbers change when they are written: a second copy here could be as large as the file
            draft.details.setdefault(name, []).append("float64 → float32")
    if not reverse_axes:
        return draft.tensors, spec
    permuted, moved = permute_axes(draft.tensors, spec, REVERSED)
    for name, tensor in permuted.items():
        if tensor is not draft.tensors[name]:
            draft.details.setdefault(name, []).append("axes (x, y, z) → (z, y, x)")
    return permuted, moved


def check_state(draft: Draft, spec: EncoderSpec) -> None:
    """
    Raises:
        UserError: the tensors are not exactly those of the spec's encoder, or not finite; names up to three.
    """
    with torch.device("meta"):
        expected = build_encoder(spec).state_dict()
    state = draft.tensors
    wrong = [f"{k} is missing" for k in expected if k not in state]
    wrong += [f"{draft.sources[k]} is unexpected" for k in state if k not in expected]
    wrong += [
        f"{draft.sources[k]} has shape {tuple(state[k].shape)}, needed {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{'; '.join(wrong[:3])}{more}; download the file again, or say what it is with --format")
    for name, tensor in state.items():
        check_finite(draft.sources[name] or name, tensor)


def _renamed(found: Found) -> tuple[Draft, list[TensorRecord]]:
    """Tensors by our names, and records of those that are not the encoder's."""
    draft, dropped, unknown = Draft(), [], []
    for name, source in found.names.items():
        ours = found.format.layout.rename(name)
        if ours is None:
            reason = found.format.reason_to_drop(name)
            if reason is None and _ENCODER_LIKE.fullmatch(name):
                unknown.append(source)
            dropped.append(TensorRecord(source, None, "dropped", reason or "unknown, and outside the encoder"))
            continue
        if ours in draft.tensors:
            raise UserError(f"{source} and {draft.sources[ours]} are both {ours}; which one is meant?")
        check_plain(source, found.state[source])
        draft.tensors[ours], draft.sources[ours] = found.state[source], source
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{', '.join(unknown[:3])}{more} would be lost, and the encoder's output would change: a "
            f"{found.format.name} encoder has no such tensor; see --format"
        )
    head = found.format.head_on_cls
    if head and "cls_token" not in draft.tensors and any(re.fullmatch(head, name) for name in found.names):
        raise UserError("cls_token is missing, although there is a head that reads it; download the file again")
    return draft, dropped


def _split_cls_row(draft: Draft, spec: EncoderSpec) -> None:
    """Our position tables have no row for CLS: added to the token, the sum that enters the blocks is the same."""
    table = draft.tensors["pos_embed"]
    if not spec.cls_token or table.shape[1] != spec.num_tokens + 1:
        return
    row, rows = table[:, :1], table[:, 1:]
    draft.put("pos_embed", rows, f"the row of CLS taken off, {spec.num_tokens} remain")
    token = draft.tensors["cls_token"]
    # a token of another shape is refused later, and must not be stretched here
    if row.any() and token.shape == row.shape:
        # in float32, in which the sum of two 16-bit numbers has a place
        total = token.float() + row.float()
        draft.put("cls_token", total, "its position, row 0 of pos_embed, added")


def _fill_qkv_bias(draft: Draft, spec: EncoderSpec) -> None:
    names = [f"blocks.{i}.attn.qkv.bias" for i in range(spec.depth)]
    if any(name in draft.tensors for name in names):
        return
    for name in names:
        draft.put(name, torch.zeros(3 * spec.embed_dim), "the file's encoder has no qkv bias: zeros are the same")


def _is_sincos(table: Tensor, spec: EncoderSpec) -> bool:
    if spec.embed_dim < 6:
        return False
    tolerance = max(_SINCOS_TOLERANCE, torch.finfo(table.dtype).eps)
    return (table.float() - sincos_positions(spec.grid, spec.embed_dim)).abs().max().item() <= tolerance


_OTHER_CONTAINERS = {
    "teacher": "the momentum teacher; --use-teacher takes it",
    "student": "the student; the teacher was asked for",
    "optimizer": "state of the optimizer",
}


def account_for_rest(content: Mapping[str, Any], container: str) -> LoadReport:
    """Everything in a file beside the tensors of the state_dict under `container` ("": the file itself)."""
    rest = [(str(k), v) for k, v in content.items() if container and k != container]
    state = content[container] if container else content
    rest += [(f"{container}.{k}".lstrip("."), v) for k, v in state.items() if not is_weight(k, v)]
    records, entries = [], []
    for name, value in rest:
        reason = _OTHER_CONTAINERS.get(name, f"'{name}' is not the encoder's state_dict")
        inner = [TensorRecord(inside, None, "dropped", reason) for inside, _ in tensors_in(value, name)]
        records += inner
        if not inner:
            entries.append((name, _what(value)))
    return LoadReport(tuple(records), tuple(entries))


def _what(value: Any) -> str:
    if isinstance(value, argparse.Namespace):
        return f"Namespace of {len(vars(value))} values"
    if isinstance(value, Mapping | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
