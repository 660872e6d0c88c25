"""`encoder.safetensors`: the only weights that fine-tuning reads."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnunetv2_hiendmae.architectures import Encoder, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import replacing
from nnunetv2_hiendmae.weights.adapt import adapt_state, expected_tensors, mismatch
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LONGEST_ERROR, LoadReport, TensorRecord, printable

METADATA_KEY = "hiendmae"
# what the format calls a number type, in the order in which its own writer puts tensors into the file: wide ones first
_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def save_encoder(path: Path, state: Mapping[str, Tensor], metadata: EncoderMetadata) -> None:
    """Writes an encoder's state_dict with its metadata, in one step and one tensor at a time; float64 as float32.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    write_safetensors(path, state, {METADATA_KEY: header})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors (views of any strides, on any device) and text metadata, in one step; float64 as float32.

    The bytes depend on names, values and metadata only, and one tensor is copied at a time. The format's own writer
    (0.8) puts several metadata in an order of chance, and needs a copy of all tensors that are strided or float64.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
        ValueError: a tensor of a type that the format does not have.
    """
    stored = {k: torch.float32 if v.dtype == torch.float64 else v.dtype for k, v in tensors.items()}
    if unknown := [f"{k} is {dtype}" for k, dtype in stored.items() if dtype not in _DTYPES]:
        raise ValueError(f"safetensors cannot hold {unknown[0]}")
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(stored[name]), name))
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * stored[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[stored[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            plain = tensors[name].detach().to("cpu", stored[name]).contiguous()
            # as bytes, because numpy has no bfloat16
            f.write(plain.reshape(-1).view(torch.uint8).numpy())


def is_encoder_file(path: Path) -> bool:
    """Whether a file is a safetensors file with our metadata; reads no tensor."""
    try:
        with safe_open(path, "pt") as f:
            return METADATA_KEY in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_metadata(path: Path) -> EncoderMetadata:
    """Metadata only; reads no tensor.

    Raises:
        UserError: no such file, or not an encoder file of ours.
    """
    return _open(path)[0]


def load_encoder(path: Path) -> tuple[Encoder, EncoderMetadata]:
    """Encoder of a file, with its weights, in eval mode on the CPU.

    Raises:
        UserError: no such file, not an encoder file of ours, or tensors missing.
    """
    metadata, state = _open(path)
    # before the encoder is built: what a header says may be of any size
    _check(state, expected_tensors(metadata.spec), path)
    encoder = build_encoder(metadata.spec)
    encoder.load_state_dict(state)
    return encoder.eval(), metadata


def load_report(path: Path) -> LoadReport:
    """What loading the file would do to each of its tensors; builds no encoder.

    Raises:
        UserError: as `load_encoder`.
    """
    metadata, state = _open(path)
    _check(state, expected_tensors(metadata.spec), path)
    return LoadReport(tuple(TensorRecord(k, k) for k in state))


def load_into(encoder: Encoder, path: Path) -> LoadReport:
    """Puts a file's weights into an encoder that may differ in grid, input channels, CLS or, for a convvit, in being
    the dense one. What a dense encoder has and the file has not keeps its values and is reported as fresh. The numbers
    become the encoder's number type.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    metadata, state = _open(path)
    state, report = adapt_state(state, metadata.spec, encoder)
    _check(state, encoder.state_dict(), path)
    encoder.load_state_dict(state)
    return report


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    if wrong := mismatch(state, expected):
        raise UserError(f"{path} does not hold the encoder its header describes: {wrong}")


def _open(path: Path) -> tuple[EncoderMetadata, dict[str, Tensor]]:
    """Metadata and tensors, which are mapped: they take no memory until they are used."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no encoder file at {path}; make one with: hiendmae pretrain or hiendmae convert")
    try:
        with safe_open(path, "pt") as f:
            header, state = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as e:
        raise _unreadable(path, e) from e
    metadata = header_metadata(header, METADATA_KEY, path)
    if metadata is None:
        raise UserError(
            f"{path} is a safetensors file but not an encoder file of ours; make one with: hiendmae convert"
        )
    return metadata, state


def header_metadata(header: Mapping[str, str], key: str, path: Path) -> EncoderMetadata | None:
    """Metadata of an encoder under a key of a safetensors file's header; None: there is no such key.

    Raises:
        UserError: the text is damaged.
    """
    try:
        return EncoderMetadata.from_json(header[key]) if key in header else None
    except ValueError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: Exception) -> UserError:
    told = printable(error, LONGEST_ERROR)
    return UserError(f"{path} is not a readable encoder file ({told}); download or write it again")
