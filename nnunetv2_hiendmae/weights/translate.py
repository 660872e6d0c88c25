"""From the content of a file to an encoder's tensors, its spec, and an account of every tensor on both sides."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, PrimusEncoder
from nnunetv2_hiendmae.architectures.layers import Axes, axes_of
from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.options.commands import HWD, ConvertOptions
from nnunetv2_hiendmae.weights.adapt import expected_tensors, mismatch, permute_axes, rotary_permuted
from nnunetv2_hiendmae.weights.checkpoint_io import check_finite, check_plain, is_weight, tensors_in
from nnunetv2_hiendmae.weights.find import ForeignEncoder
from nnunetv2_hiendmae.weights.formats import OUTSIDE
from nnunetv2_hiendmae.weights.layouts import is_sincos
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord


@dataclass
class Translation:
    """An encoder's tensors on their way into our names and shapes.

    Args:
        state: by our names, views of the file's where they did not change.
        records: of each, by our name.
        dropped: records of the state_dict's other tensors.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, TensorRecord] = field(default_factory=dict)
    dropped: list[TensorRecord] = field(default_factory=list)

    def take(self, source: str, tensor: Tensor, name: str) -> None:
        """A tensor of the file, as it is. Refuses what is not plain numbers and a second one of a name (UserError)."""
        if name in self.state:
            both = f"{printable(source)} and {printable(self.records[name].name)}"
            raise UserError(f"{both} are both {name}; which one is meant? take the other out of the file")
        check_plain(source, tensor)
        self.state[name], self.records[name] = tensor, TensorRecord(source, name)

    def drop(self, source: str, reason: str) -> None:
        """A tensor of the file that is not the encoder's."""
        self.dropped.append(TensorRecord(source, None, "dropped", reason))

    def put(self, name: str, tensor: Tensor, detail: str) -> None:
        """Replaces or adds a tensor and notes what was done."""
        self.state[name] = tensor
        self.records[name] = self.records.get(name, TensorRecord(None, name, "fresh")).changed(detail)

    def check(self, spec: EncoderSpec, mend: str) -> None:
        """Refuses all but the tensors of the spec's encoder, and numbers that are not finite (UserError, with what the
        user can do); notes which tensors change when they are written."""
        sources = {k: record.name for k, record in self.records.items()}
        if wrong := mismatch(self.state, expected_tensors(spec, self.state), sources):
            raise UserError(f"{wrong}; {mend}")
        for name, tensor in self.state.items():
            check_finite(sources[name], tensor)
            if tensor.dtype == torch.float64:
                # the numbers change when they are written: a second copy here could be as large as the file
                self.put(name, tensor, "float64 → float32")

    def permute_axes(self, spec: EncoderSpec, order: Sequence[int], told: str) -> EncoderSpec:
        """To the encoder of volumes whose axis i was `order[i]`; gives its spec. `told`: that in words."""
        permuted, moved = permute_axes(self.state, spec, order)
        for name, tensor in permuted.items():
            if tensor is not self.state[name]:
                self.put(name, tensor, told)
        return moved

    def report(self, content: Mapping[str, Any], path: Sequence[str]) -> LoadReport:
        """Account of everything in a file, whose state_dict the keys of `path` lead to."""
        rest, level, prefix = [], content, ""
        for key in path:
            rest += [(k, f"{prefix}{k}", v) for k, v in level.items() if k != key]
            level, prefix = level[key], f"{prefix}{key}."
        rest += [(k, f"{prefix}{k}", v) for k, v in level.items() if not is_weight(k, v)]
        dropped, entries = self.dropped.copy(), []
        for key, name, value in rest:
            reason = _OTHER_CONTAINERS.get(str(key), f"'{name}' is not the encoder's state_dict")
            inner = [TensorRecord(inside, None, "dropped", reason) for inside, _ in tensors_in(value, name)]
            dropped += inner
            if not inner:
                entries.append((name, _what(value)))
        return LoadReport((*self.records.values(), *dropped), tuple(entries))


_TEACHER = "the momentum teacher; --use-teacher takes it"
_STUDENT = "the student; the teacher was asked for"
# why what has such a key in a file, or what is such a part of a method of ours, is not read
_OTHER_CONTAINERS = {"teacher": _TEACHER, "student": _STUDENT, "optimizer": "state of the optimizer"}
_OTHER_PARTS = {"teacher_encoder": _TEACHER, "encoder": _STUDENT}


def _what(value: Any) -> str:
    if isinstance(value, argparse.Namespace):
        return f"Namespace of {len(vars(value))} values"
    if isinstance(value, Mapping | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def translate_own(state: Mapping[str, Any], prefix: str, spec: EncoderSpec) -> Translation:
    """Tensors of a file of ours, which have our names behind a prefix; refuses all but the encoder's (UserError)."""
    translation = Translation()
    for name, tensor in state.items():
        if not is_weight(name, tensor):
            continue
        if name.startswith(prefix):
            translation.take(name, tensor, name.removeprefix(prefix))
        else:
            reason = _OTHER_PARTS.get(name.partition(".")[0], "not a part of the encoder")
            translation.drop(name, reason)
    translation.check(spec, "write it again with hiendmae pretrain or hiendmae convert")
    return translation


def translate_foreign(found: ForeignEncoder, options: ConvertOptions) -> tuple[Translation, EncoderSpec, bool]:
    """Names, shapes, axes and numbers of a foreign state_dict, as ours. `options`: whose `axes` are decided.

    Returns:
        The tensors, their spec, and whether the file's positions are the sin-cos table of their grid.

    Raises:
        UserError: a tensor is missing, has the wrong shape or no finite numbers, nothing explains what one is for, or
            shapes do not tell the spec and the options do not either.
    """
    entry, translation = found.format, _renamed(found)
    needed: list[str] = []
    spec = entry.spec(translation.state, options, entry.sizes, needed)
    if entry.value:
        for name, tensor in list(translation.state.items()):
            translation.put(name, *entry.value(name, tensor, spec))
    _split_cls_row(translation, spec)
    _split_register_rows(translation, spec)
    if entry.library:
        _fill_qkv_bias(translation, spec)
    translation.check(spec, "download the file again, or say what it is with --format")
    if needed:
        raise UserError("; ".join(needed))
    if options.token_order == HWD:
        _reorder_tokens(translation, spec)
    # of a kind that trains its positions they may be anything, the formula too
    formula = spec.pos_embed != "learned" and is_sincos(translation.state["pos_embed"], spec.grid)
    # "sincos" says that the table is fixed, not that it is the formula of its grid: with permuted axes it no longer is
    spec = spec.with_(pos_embed="sincos" if formula else "learned")
    if options.axes == "xyz":
        spec = translation.permute_axes(spec, (2, 1, 0), "axes (x, y, z) → (z, y, x)")
    return translation, spec, formula


def _renamed(found: ForeignEncoder) -> Translation:
    """Tensors by our names, as they are in the file."""
    entry, translation, unknown = found.format, Translation(), []
    for name, source in found.names.items():
        if ours := entry.rename(name):
            translation.take(source, found.state[source], ours)
        elif reason := entry.reason_to_drop(name):
            translation.drop(source, reason)
        else:
            unknown.append(printable(source))
    for name, source in found.outside.items():
        translation.drop(source, entry.reason_to_drop(name) or OUTSIDE)
    if unknown:
        raise UserError(
            f"{some(unknown)} would be lost, and the encoder's output might change: a {entry.name} encoder has no such "
            "tensor; see --format, or take it out of the file if it is no part of the encoder"
        )
    head = entry.head_on_cls
    if head and "cls_token" not in translation.state and any(re.fullmatch(head, name) for name in found.names):
        raise UserError("cls_token is missing, although there is a head that reads it; download the file again")
    if "pos_embed" in translation.state:
        _check_decoder_table(found, translation.records["pos_embed"].name)
    return translation


def _check_decoder_table(found: ForeignEncoder, table: str) -> None:
    """Encoder and decoder of one program have positions for the same tokens."""
    shape = tuple(found.state[table].shape)
    source = found.names.get("decoder_pos_embed")
    other = tuple(found.state[source].shape) if source else shape
    if other[1:-1] != shape[1:-1]:
        raise UserError(
            f"{printable(table)} has shape {shape}, but {printable(source)} {other}: needed the same number of "
            "positions; download the file again"
        )


def _split_cls_row(translation: Translation, spec: EncoderSpec) -> None:
    """Our position tables have no row for CLS: added to the token, the sum that enters the blocks is the same."""
    table = translation.state["pos_embed"]
    if not spec.cls_token or table.shape[1] != spec.num_tokens + 1:
        return
    row, rows = table[:, :1], table[:, 1:]
    translation.put("pos_embed", rows, f"the row of CLS taken off, {spec.num_tokens} remain")
    token = translation.state["cls_token"]
    # a token of another shape is refused later, and must not be stretched here
    if row.any() and token.shape == row.shape:
        # in float32, in which the sum of two 16-bit numbers has a place
        translation.put("cls_token", token.float() + row.float(), "its position, row 0 of pos_embed, added")


def _split_register_rows(translation: Translation, spec: EncoderSpec) -> None:
    """As `_split_cls_row`: the position of a register token is part of the token."""
    count, table = spec.register_tokens, translation.state["pos_embed"]
    if not count or table.shape[1] != spec.num_tokens + count:
        return
    tokens = translation.state["register_tokens"]
    if tokens.shape == table[:, :count].shape:
        added = f"their positions, rows 0 to {count - 1} of pos_embed, added"
        translation.put("register_tokens", tokens.float() + table[:, :count].float(), added)
    told = f"the rows of {count} register tokens taken off, {spec.num_tokens} remain"
    translation.put("pos_embed", table[:, count:], told)


def _reorder_tokens(translation: Translation, spec: EncoderSpec) -> None:
    """Weights of a network whose sequence index was (j1·g0 + j0)·g2 + j2, as those of raster order.

    It turned a head's first block of channels by the axis that lay slowest in its sequence, the second of the volume.
    So positions and these blocks are exchanged; patches are not, which the order of the sequence does not touch. Only
    for g0 = g1: else its table of angles had rows for other cells than its tokens.

    Raises:
        UserError: the first two axes of the grid differ.
    """
    first, second, third = spec.grid
    if first != second:
        raise UserError(
            f"its tokens lie in the order hwd on a grid of {spec.grid}: where the first two sides differ, its rotary "
            "positions belonged to other places than its tokens, which no encoder here does; if the order is another "
            "one, give --token-order whd"
        )
    for name, tensor in list(translation.state.items()):
        axes = axes_of(name, PrimusEncoder.axes)
        if axes is Axes.TOKENS:
            rows = tensor.unflatten(1, (second, first, third)).transpose(1, 2).flatten(1, 3)
            translation.put(name, rows, "tokens from the order hwd to whd")
        elif axes is Axes.ROTARY:
            turned = rotary_permuted(tensor, spec.num_heads, (1, 0, 2))
            translation.put(name, turned, "rotary channels from the order hwd to whd")


def _fill_qkv_bias(translation: Translation, spec: EncoderSpec) -> None:
    if "blocks.0.attn.qkv.weight" not in translation.state:
        return
    names = [f"blocks.{i}.attn.qkv.bias" for i in range(spec.depth)]
    if any(name in translation.state for name in names):
        return
    for name in names:
        zeros = torch.zeros(3 * spec.embed_dim)
        translation.put(name, zeros, "the file's encoder has no qkv bias: zeros are the same")
