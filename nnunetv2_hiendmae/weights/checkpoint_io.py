"""Reading files that others made: nothing in them is ever executed, and no tensor is read before it is needed."""

import argparse
import hashlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.files import refuse_folder
from nnunetv2_hiendmae.weights.metadata import DIGEST_KEY, NO_DIGEST

# the ways in which torch names what it refuses to unpickle
_OFFENDER = re.compile(
    r"(?:GLOBAL|unsupported class|unrecognized function|but got <class) ['`\"]?((?:[A-Za-z_]\w*\.)+\w+)"
)
SAFETENSORS = ".safetensors"
_PICKLE_START = b"\x80"
_ZIP_START = b"PK\x03\x04"
_MOST_COMPRESSED = 4
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _NumpyType:
    """Stands for `numpy.dtype`: keeps what a file says, and asks numpy for nothing."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, content: bytes) -> Any:
    """Stands for numpy's function of this name: a number or text, as Python's; ValueError for any other type."""
    if not re.fullmatch(r"[biufcSU]\d{1,4}", kind.code) or kind.order not in "=<>|":
        raise ValueError(f"a numpy scalar of type {printable(kind.code)}, which no weights need")
    return np.frombuffer(content, f"{kind.order}{kind.code}", count=1)[0].item()


def _called(stand_in: Any, name: str) -> Any:
    """A stand-in under the name that files call it by."""
    stand_in.__module__, _, stand_in.__qualname__ = name.rpartition(".")
    return stand_in


# numpy's scalars, which many programs save beside weights; the function's name in numpy 1 and in 2
_NUMPY = [_called(_NumpyType, "numpy.dtype")]
_NUMPY += [
    _called(lambda kind, content: _numpy_scalar(kind, content), f"numpy.{core}.multiarray.scalar")
    for core in ("core", "_core")
]


def read_checkpoint(path: Path, *, check_sums: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of a PyTorch or safetensors file, and the text metadata of the latter. `check_sums`: reads the whole file
    once more, where it holds checksums.

    Zip files and safetensors are mapped into memory: their tensors take none until they are used. Pickles may hold
    tensors, plain containers, numpy's scalars and `argparse.Namespace`, nothing else.

    Raises:
        UserError: no such file, damaged, of no such kind, or it asks for code to be run.
    """
    path = Path(path)
    check_source(path)
    with path.open("rb") as f:
        start = f.read(9)
    # by content, an 8-byte length and JSON; by name only what is damaged and neither a zip file nor a pickle
    if start[8:] != b"{" and (path.suffix != SAFETENSORS or start.startswith((_ZIP_START, _PICKLE_START))):
        if check_sums and start.startswith(_ZIP_START):
            _check_records(path)
        return _read_pickle(path), {}
    return read_safetensors(path, check_digest=check_sums)


def read_safetensors(path: Path, *, check_digest: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which are mapped, and text metadata; refuses what is damaged or of another kind (UserError).
    `check_digest`: reads the whole file, where one of ours says what its digest is."""
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        if check_digest and DIGEST_KEY in header:
            _check_digest(path, header[DIGEST_KEY])
    except (SafetensorError, ValueError, OSError) as e:
        told = f"{path} is not a readable safetensors file ({_one_line(e)}); download or write it again"
        raise UserError(told) from e
    return tensors, header


def _check_digest(path: Path, stored: str) -> None:
    with path.open("rb") as f:
        size = f.read(8)
        header = f.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(size + header.replace(stored.encode(), NO_DIGEST.encode(), 1))
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != stored:
        raise ValueError("its bytes are not those that were written: their digest differs")


def check_source(path: Path) -> None:
    """Refuses what is no file (UserError)."""
    refuse_folder(path)
    if not path.is_file():
        raise UserError(f"no file {path}; give a checkpoint (.pth, .pt, .ckpt) or a .safetensors file")


def _check_records(path: Path) -> None:
    """Torch's zip format has a checksum of every record, which torch itself does not look at.

    Raises:
        UserError: one differs.
    """
    try:
        archive = zipfile.ZipFile(path)
    # no such archive: torch says what is wrong
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError):
        return
    with archive:
        records = archive.infolist()
        # torch can leave the checksums out; what claims to be far larger than the file would take for ever
        size = sum(record.file_size for record in records)
        if not any(record.CRC for record in records) or size > _MOST_COMPRESSED * path.stat().st_size:
            return
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OSError, EOFError) as e:
            damaged = str(e)
    if damaged:
        told = f"{path} is damaged: {printable(damaged)} is not what was written"
        raise UserError(f"{told}, nothing in it was executed; download it again")


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        # the authors' training arguments: a plain record, which runs nothing of its own
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]), path.open("rb") as f:
            # torch decides by the name of a path, and maps nothing but paths
            source = f if path.suffix == SAFETENSORS else path
            mapped = source is path and _can_be_mapped(path)
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # torch and its zip reader raise many kinds for a damaged file
        offender = _OFFENDER.search(str(e)) if isinstance(e, pickle.UnpicklingError) else None
        if offender:
            raise UserError(
                f"{path} was refused: it asks for {offender[1]}, which weights never need and which could run code; "
                "nothing in it was executed; ask its authors for a file of tensors only, e.g. .safetensors"
            ) from e
        told = f"{path} is damaged or no PyTorch file ({_one_line(e)}), nothing in it was executed; download it again"
        raise UserError(told) from e
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, needed a dictionary of tensors; see its authors")
    if next(tensors_in(content), None) is None:
        keys = ", ".join(map(printable, list(content)[:8]))
        raise UserError(f"{path} holds no tensor, only {keys or 'an empty dictionary'}")
    return dict(content)


def _can_be_mapped(path: Path) -> bool:
    """Torch's zip format, uncompressed: mapped, a compressed record would be read as if it were the numbers."""
    with path.open("rb") as f:
        # at the start as well: anything may end like a zip file
        if f.read(len(_ZIP_START)) != _ZIP_START:
            return False
        try:
            return all(record.compress_type == zipfile.ZIP_STORED for record in zipfile.ZipFile(f).infolist())
        except zipfile.BadZipFile:
            return False


def _one_line(error: Exception) -> str:
    """What torch says, without its advice to load unsafely."""
    lines = (line.strip() for line in str(error).splitlines() if "weights_only" not in line)
    told = next(filter(None, lines), type(error).__name__)
    return printable(told.removeprefix("WeightsUnpickler error: ").partition(". ")[0], 200)


def is_weight(key: Any, value: Any) -> bool:
    """Whether an entry of a dictionary is one of a state_dict."""
    return isinstance(key, str) and isinstance(value, Tensor)


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested containers with its dotted name; containers that hold themselves end."""
    pending, seen = [(name, content)], set()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            yield name, value
            continue
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            items = list(value.items())
        elif isinstance(value, list | tuple | set):
            items = list(enumerate(value))
        else:
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        pending += [(f"{name}.{key}" if name else str(key), item) for key, item in reversed(items)]


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuses what is no plain tensor of floating-point numbers (UserError); reads none of them."""
    kind = None
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = f"a {'quantised' if tensor.is_quantized else 'sparse'} tensor"
    elif tensor.device.type == "meta":
        kind = "a tensor without numbers"
    elif tensor.dtype not in FLOATS:
        kind = f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"a tensor of shape {tuple(tensor.shape)} over fewer numbers"
    if kind:
        raise UserError(f"{printable(name)} is {kind}, needed plain float16, bfloat16, float32 or float64")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity (UserError), also where a float64 is too large for float32."""
    if not torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor).all():
        raise UserError(
            f"{printable(name)} holds NaN or infinity: the file is damaged or its training diverged; download it again "
            "or take an earlier one"
        )
