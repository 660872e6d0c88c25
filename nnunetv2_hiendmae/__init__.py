"""Masked-autoencoder pretraining of 3D vision transformers for nnU-Net v2."""

from importlib import import_module
from typing import Any

# public name → where it is; docs/python_api.md shows each in use
_PUBLIC = {
    "load_encoder": "weights:load_encoder",
    "load_report": "weights:load_report",
    "preprocess": "preprocessing.preprocess:preprocess_datasets",
    "pretrain": "pretraining.loop:pretrain",
    "convert": "weights:convert_checkpoint",
    "plan": "planning:plan_finetuning",
    "compare": "evaluation.compare:compare",
    "classify_train": "classification.train:train",
    "classify_predict": "classification.predict:predict",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    # imported on first use only: `hiendmae env` runs in every shell start-up
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(f"nnunetv2_hiendmae.{module}"), attribute)
    if name == "__version__":
        from importlib.metadata import version

        return version("nnunetv2_hiendmae")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
