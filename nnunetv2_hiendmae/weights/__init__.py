"""Weights on disk: encoder files, what is in them, fitting them to another network, and what others' files hold."""

from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.weights.adapt import permute_axes
from nnunetv2_hiendmae.weights.convert import convert_checkpoint, translate_checkpoint
from nnunetv2_hiendmae.weights.encoder_file import (
    EncoderMetadata,
    check_encoder_file,
    load_encoder,
    load_into,
    load_report,
    read_metadata,
    save_encoder,
)
from nnunetv2_hiendmae.weights.report import LoadReport

__all__ = ["ConvertOptions", "EncoderMetadata", "LoadReport", "check_encoder_file", "convert_checkpoint"]
__all__ += ["load_encoder", "load_into", "load_report", "permute_axes", "read_metadata", "save_encoder"]
__all__ += ["translate_checkpoint"]
