"""Trainers for encoders that a baseline of the papers pretrained; each insists on its own."""

from nnunetv2_hiendmae.recipes import MAIN_METHODS, RECIPES
from nnunetv2_hiendmae.trainers.trainers import _ViTTrainer

__all__ = sorted(recipe.trainer for method, recipe in RECIPES.items() if method not in MAIN_METHODS)


class nnUNetTrainer_SimMIM(_ViTTrainer):
    method = "simmim"


class nnUNetTrainer_SimCLR(_ViTTrainer):
    method = "simclr"


class nnUNetTrainer_Genesis(_ViTTrainer):
    method = "genesis"


class nnUNetTrainer_SwinPretexts(_ViTTrainer):
    method = "swinpretexts"
