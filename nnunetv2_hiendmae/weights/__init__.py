"""Weights on disk: encoder files, what is in them, and fitting them to another network."""

from nnunetv2_hiendmae.weights.encoder_file import (
    EncoderMetadata,
    load_encoder,
    load_into,
    load_report,
    read_metadata,
    save_encoder,
)
from nnunetv2_hiendmae.weights.report import LoadReport

__all__ = [
    "EncoderMetadata",
    "LoadReport",
    "load_encoder",
    "load_into",
    "load_report",
    "read_metadata",
    "save_encoder",
]
