"""`encoder.safetensors`, the only weights that fine-tuning reads: writing and loading it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import Encoder, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import refuse_folder, replacing
from nnunetv2_hiendmae.weights.adapt import adapt_state, expected_tensors, mismatch
from nnunetv2_hiendmae.weights.checkpoint_io import check_finite, read_safetensors
from nnunetv2_hiendmae.weights.hub import local_file
from nnunetv2_hiendmae.weights.metadata import DIGEST_KEY, METADATA_KEY, NO_DIGEST, EncoderMetadata, header_metadata
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# what the format calls a number type, in the order in which its own writer puts tensors into the file: wide ones first
_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def save_encoder(path: Path, state: Mapping[str, Tensor], metadata: EncoderMetadata, *, new: bool = False) -> None:
    """Writes an encoder's state_dict with its metadata, in one step and one tensor at a time; float64 as float32.
    `new`: see `files.replacing`.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    write_safetensors(path, state, {METADATA_KEY: header}, new=new)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, new: bool = False
) -> None:
    """Writes tensors (views of any strides, on any device) and text metadata with the digest of it all, in one step;
    float64 as float32. `new`: see `files.replacing`.

    The bytes depend on names, values and metadata only, and one tensor is copied at a time. The format's own writer
    (0.8) puts several metadata in an order of chance, and needs a copy of all tensors that are strided or float64.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
        ValueError: a tensor of a type that the format does not have.
    """
    metadata = {DIGEST_KEY: NO_DIGEST, **metadata}
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
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start)
    with replacing(path, new=new) as temporary, temporary.open("wb") as f:
        f.write(start)
        for name in order:
            plain = tensors[name].detach().to("cpu", stored[name]).contiguous()
            # as bytes, because numpy has no bfloat16
            block = plain.reshape(-1).view(torch.uint8).numpy()
            f.write(block)
            digest.update(block)
        f.seek(start.index(NO_DIGEST.encode()))
        f.write(digest.hexdigest().encode())


def read_metadata(path: Path) -> EncoderMetadata:
    """Metadata only; reads no tensor.

    Raises:
        UserError: no such file, or not an encoder file of ours.
    """
    return _open(path, whole=False)[0]


def check_encoder_file(path: Path) -> EncoderMetadata:
    """Metadata of a file whose tensors are those of the encoder that it describes: names, shapes, number types, finite
    numbers. Builds no encoder; reads the file once.

    Raises:
        UserError: as `load_encoder`.
    """
    return _open_whole(path)[0]


def load_encoder(path: Path) -> tuple[Encoder, EncoderMetadata]:
    """Encoder of a file, with its weights, in eval mode on the CPU.

    Raises:
        UserError: no such file, damaged, not an encoder file of ours, or not the tensors that its encoder needs.
    """
    metadata, state = _open_whole(path)
    encoder = build_encoder(metadata.spec)
    encoder.load_state_dict(state)
    return encoder.eval(), metadata


def load_report(path: Path) -> LoadReport:
    """What loading the file would do to each of its tensors; builds no encoder.

    Raises:
        UserError: as `load_encoder`.
    """
    return LoadReport(tuple(TensorRecord(k, k) for k in _open_whole(path)[1]))


def load_into(encoder: Encoder, path: Path) -> LoadReport:
    """Puts a file's weights into an encoder that may differ in grid, input channels, CLS or, for a convvit, in being
    the dense one. What a dense encoder has and the file has not keeps its values and is reported as fresh. The numbers
    become the encoder's number type.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    metadata, state = _open_whole(path)
    state, report = adapt_state(state, metadata.spec, encoder)
    encoder.load_state_dict(state)
    return report


def _open_whole(path: Path) -> tuple[EncoderMetadata, dict[str, Tensor]]:
    """As `_open`, of a file that is as it was written and holds finite tensors of the encoder that its header
    describes. No encoder is built before that is known."""
    metadata, state = _open(path, whole=True)
    if wrong := mismatch(state, expected_tensors(metadata.spec, state)):
        raise UserError(f"{path} does not hold the encoder its header describes: {wrong}")
    try:
        for name, tensor in state.items():
            check_finite(name, tensor)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return metadata, state


def _open(path: Path, *, whole: bool) -> tuple[EncoderMetadata, dict[str, Tensor]]:
    """Metadata and tensors, which are mapped: they take no memory until they are used. `whole`: reads the file for its
    digest."""
    path = local_file(path)
    refuse_folder(path)
    if not path.is_file():
        raise UserError(f"no encoder file at {path}; make one with: hiendmae pretrain or hiendmae convert")
    state, header = read_safetensors(path, check_digest=whole)
    if metadata := header_metadata(header, METADATA_KEY, path, state):
        return metadata, state
    raise UserError(f"{path} is a safetensors file but not an encoder file of ours; make one with: hiendmae convert")
