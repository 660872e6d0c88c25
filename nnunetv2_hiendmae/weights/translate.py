"""From the content of a file to an encoder's tensors, its spec, and an account of every tensor on both sides."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.axes import REVERSED, permute_axes
from nnunetv2_hiendmae.weights.finding import Found, is_weight
from nnunetv2_hiendmae.weights.foreign import check_finite, check_plain, tensors_in
from nnunetv2_hiendmae.weights.layouts import Hints, size_notes
from nnunetv2_hiendmae.weights.matching import expected_tensors, mismatch, named
from nnunetv2_hiendmae.weights.positions import check_decoder_table, is_sincos, position_notes
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord, printable


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


@dataclass(frozen=True)
class EncoderDraft:
    """A foreign state_dict as an encoder of ours.

    Args:
        state: tensors, views of the file's where they did not change.
        records: of every tensor of the state_dict and of the encoder.
        notes: what a user should look at.
    """

    state: dict[str, Tensor]
    spec: EncoderSpec
    records: list[TensorRecord]
    notes: list[str]


def translate_found(found: Found, hints: Hints) -> EncoderDraft:
    """Names, shapes, axes (see `Hints.reverse_axes`: from (x, y, z) to (z, y, x)) and numbers of a foreign state_dict.

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
    check_state(draft, spec, "download the file again, or say what it is with --format")
    formula = is_sincos(draft.tensors["pos_embed"], spec.grid)
    # "sincos" says that the table is fixed, not that it is the formula of its grid: with permuted axes it no longer is
    spec = spec.with_(pos_embed="sincos" if formula else "learned")
    state, spec = finish(draft, spec, hints.reverse_axes)
    notes = position_notes(spec, given=hints.img_size is not None, formula=formula, fixed=found.format.fixed_positions)
    notes += size_notes(found.format.name, spec, hints.sizes)
    return EncoderDraft(state, spec, [*draft.records(), *dropped], notes)


def finish(draft: Draft, spec: EncoderSpec, reverse_axes: bool = False) -> tuple[dict[str, Tensor], EncoderSpec]:
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


def check_state(draft: Draft, spec: EncoderSpec, mend: str) -> None:
    """
    Args:
        mend: what the user can do.

    Raises:
        UserError: the tensors are not exactly those of the spec's encoder, or not finite; names up to three.
    """
    if wrong := mismatch(draft.tensors, expected_tensors(spec), draft.sources):
        raise UserError(f"{wrong}; {mend}")
    for name, tensor in draft.tensors.items():
        check_finite(draft.sources[name] or name, tensor)


def _renamed(found: Found) -> tuple[Draft, list[TensorRecord]]:
    """Tensors by our names, and records of those that are not the encoder's."""
    draft, dropped, unknown = Draft(), [], []
    for name, source in found.names.items():
        ours = found.format.layout.rename(name)
        if ours is None:
            reason = found.format.reason_to_drop(name)
            if reason is None and not found.format.is_outside(name, found.names):
                unknown.append(printable(source))
            dropped.append(TensorRecord(source, None, "dropped", reason or _OUTSIDE))
            continue
        if ours in draft.tensors:
            both = f"{printable(source)} and {printable(draft.sources[ours])}"
            raise UserError(f"{both} are both {ours}; which one is meant? take the other out of the file")
        check_plain(source, found.state[source])
        draft.tensors[ours], draft.sources[ours] = found.state[source], source
    if unknown:
        raise UserError(
            f"{named(unknown)} would be lost, and the encoder's output might change: a {found.format.name} encoder has "
            "no such tensor; see --format, or take it out of the file if it is no part of the encoder"
        )
    head = found.format.head_on_cls
    if head and "cls_token" not in draft.tensors and any(re.fullmatch(head, name) for name in found.names):
        raise UserError("cls_token is missing, although there is a head that reads it; download the file again")
    if "pos_embed" in draft.tensors:
        check_decoder_table(found.names, found.state, draft.sources["pos_embed"], draft.tensors["pos_embed"])
    return draft, dropped


_OUTSIDE = "outside the encoder, whose tensors have a prefix of their own"


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


_OTHER_CONTAINERS = {
    "teacher": "the momentum teacher; --use-teacher takes it",
    "student": "the student; the teacher was asked for",
    "optimizer": "state of the optimizer",
}


def account_for_rest(content: Mapping[str, Any], path: Sequence[str]) -> LoadReport:
    """Everything in a file beside the tensors of the state_dict that the keys of `path` lead to."""
    rest, level, prefix = [], content, ""
    for key in path:
        rest += [(k, f"{prefix}{k}", v) for k, v in level.items() if k != key]
        level, prefix = level[key], f"{prefix}{key}."
    rest += [(k, f"{prefix}{k}", v) for k, v in level.items() if not is_weight(k, v)]
    records, entries = [], []
    for key, name, value in rest:
        reason = _OTHER_CONTAINERS.get(str(key), f"'{name}' is not the encoder's state_dict")
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
