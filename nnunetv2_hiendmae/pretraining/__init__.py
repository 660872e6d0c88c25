"""Pretraining: methods, the data they see, and the loop that trains them. What methods declare imports no torch; the
methods are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_hiendmae.pretraining.glmae import GLMAE
    from nnunetv2_hiendmae.pretraining.hiendmae import HiEndMAE
    from nnunetv2_hiendmae.pretraining.masked import MAE3D
    from nnunetv2_hiendmae.pretraining.method import Method
    from nnunetv2_hiendmae.pretraining.methods import METHODS
    from nnunetv2_hiendmae.pretraining.mim import MiM

# names of 0.1; further methods are in METHODS
__all__ = ["GLMAE", "MAE3D", "METHODS", "HiEndMAE", "Method", "MiM"]

# public name → its module, which imports torch and timm
_LATER = {"GLMAE": "glmae", "MAE3D": "masked", "METHODS": "methods", "HiEndMAE": "hiendmae"}
_LATER |= {"Method": "method", "MiM": "mim"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
