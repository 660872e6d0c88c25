"""Masked-autoencoder pretraining of 3D vision transformers for nnU-Net v2."""

from importlib import import_module
from typing import Any

_PUBLIC = {"load_encoder": "nnunetv2_hiendmae.weights", "load_report": "nnunetv2_hiendmae.weights"}

__all__ = ["load_encoder", "load_report"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use only: `hiendmae env` runs in every shell start-up
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
