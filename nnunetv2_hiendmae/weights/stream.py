"""Writing safetensors one tensor at a time: however large the state, only one tensor is ever copied."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_hiendmae.files import replacing

# by torch dtype: the format's name, and its place in the file (wide types first, as the format's own writer does)
_DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors (views of any strides, on any device) and text metadata, in one step; float64 as float32.

    The bytes depend on names, values and metadata only, not on the order of `tensors`.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
        ValueError: a tensor of a type that the format does not have.
    """
    unknown = [f"{k} is {v.dtype}" for k, v in tensors.items() if _stored(v) not in _DTYPES]
    if unknown:
        raise ValueError(f"safetensors cannot hold {unknown[0]}")
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(_stored(tensors[name])), name))
    header, offset = {"__metadata__": dict(metadata)}, 0
    for name in order:
        tensor = tensors[name]
        dtype = _stored(tensor)
        end = offset + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for name in order:
            f.write(_bytes(tensors[name]))


def _stored(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.float64 else tensor.dtype


def _bytes(tensor: Tensor) -> memoryview:
    # as bytes, because numpy has no bfloat16
    plain = tensor.detach().to("cpu", _stored(tensor)).contiguous()
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())
