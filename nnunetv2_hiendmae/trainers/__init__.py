"""Trainers that stock nnUNetv2_train and nnUNetv2_predict find by name."""

from nnunetv2_hiendmae.trainers.trainers import (
    nnUNetTrainer_GLMAE,
    nnUNetTrainer_HiEndMAE,
    nnUNetTrainer_MAE3D,
    nnUNetTrainer_MiM,
    nnUNetTrainer_ViTUNETR,
)

__all__ = [
    "nnUNetTrainer_GLMAE",
    "nnUNetTrainer_HiEndMAE",
    "nnUNetTrainer_MAE3D",
    "nnUNetTrainer_MiM",
    "nnUNetTrainer_ViTUNETR",
]
