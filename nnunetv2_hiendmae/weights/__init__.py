"""Weights on disk: encoder files, what is in them, fitting them to another network, and what others' files hold. What
reads headers imports no torch; the rest is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LoadReport

if TYPE_CHECKING:
    from nnunetv2_hiendmae.weights.adapt import permute_axes
    from nnunetv2_hiendmae.weights.convert import convert_checkpoint, translate_checkpoint
    from nnunetv2_hiendmae.weights.encoder_file import (
        check_encoder_file,
        load_encoder,
        load_into,
        load_report,
        read_metadata,
        save_encoder,
    )

__all__ = ["ConvertOptions", "EncoderMetadata", "LoadReport", "check_encoder_file", "convert_checkpoint"]
__all__ += ["load_encoder", "load_into", "load_report", "permute_axes", "read_metadata", "save_encoder"]
__all__ += ["translate_checkpoint"]

# public name → its module, which imports torch
_LATER = {"permute_axes": "adapt", "convert_checkpoint": "convert", "translate_checkpoint": "convert"}
_LATER |= dict.fromkeys(("check_encoder_file", "load_encoder", "load_into", "load_report"), "encoder_file")
_LATER |= dict.fromkeys(("read_metadata", "save_encoder"), "encoder_file")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
