"""Encoder files without torch: `hiendmae inspect` answers at once where there is nothing to mend."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from nnunetv2_hiendmae.architectures import KINDS
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.metadata import DIGEST_KEY, METADATA_KEY, NO_DIGEST, EncoderMetadata, header_metadata
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# number types that load unchanged → their integers, and the exponent's bits, which are all set in NaN and infinity
_FLOATS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header tells it."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    def numel(self) -> int:
        return math.prod(self.shape)


def look_into(path: Path) -> tuple[EncoderMetadata, LoadReport, str] | None:
    """Metadata, account of the tensors and sha256 of an encoder file that is as it was written and would load as it
    stands; reads it once. None for everything else, where `translate_checkpoint` says what is wrong."""
    try:
        # refuses what is no safetensors file, and tensors that overlap or leave gaps
        with safe_open(path, "np") as f:
            header = f.metadata() or {}
        if METADATA_KEY not in header:
            return None
        with path.open("rb") as f:
            start = f.read(8)
            start += f.read(int.from_bytes(start, "little"))
            stored = _tensors(start[8:])
            metadata = header_metadata(header, METADATA_KEY, path, stored)
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            if metadata is None or shapes != KINDS[metadata.spec.kind].tensor_shapes(metadata.spec):
                return None
            digest = _read_all(f, start, header.get(DIGEST_KEY), stored)
    except (SafetensorError, UserError, ValueError, LookupError, TypeError, OSError):
        return None
    records = tuple(TensorRecord(name, name) for name in stored)
    return (metadata, LoadReport(records), digest) if digest else None


def _tensors(text: bytes) -> dict[str, _Stored]:
    """Tensors by name, in the order of the file."""
    told = {name: about for name, about in json.loads(text).items() if name != "__metadata__"}
    order = sorted(told, key=lambda name: told[name]["data_offsets"])
    sizes = {name: np.diff(told[name]["data_offsets"]).item() for name in order}
    return {name: _Stored(told[name]["dtype"], tuple(told[name]["shape"]), sizes[name]) for name in order}


def _read_all(f: BinaryIO, start: bytes, written: str | None, stored: dict[str, _Stored]) -> str | None:
    """sha256 of a file that is read up to its tensors; None: it is not what was written, or a number is not finite."""
    whole, ours = hashlib.sha256(start), None
    if written is not None:
        ours = hashlib.sha256(start.replace(written.encode(), NO_DIGEST.encode(), 1))
    for tensor in stored.values():
        kind, exponent = _FLOATS[tensor.dtype]
        for block in _blocks(f, tensor.size):
            whole.update(block)
            if ours:
                ours.update(block)
            if ((np.frombuffer(block, kind) & exponent) == exponent).any():
                return None
    if f.read(1) or (ours and ours.hexdigest() != written):
        return None
    return whole.hexdigest()


def _blocks(f: BinaryIO, size: int) -> Iterator[bytes]:
    for begin in range(0, size, _BLOCK_BYTES):
        yield f.read(min(_BLOCK_BYTES, size - begin))
