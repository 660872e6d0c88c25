"""Trainers that stock nnUNetv2_train and nnUNetv2_predict find by name."""

from nnunetv2_hiendmae.trainers.trainers import nnUNetTrainer_HiEndMAE, nnUNetTrainer_MAE3D, nnUNetTrainer_ViTUNETR

__all__ = ["nnUNetTrainer_HiEndMAE", "nnUNetTrainer_MAE3D", "nnUNetTrainer_ViTUNETR"]
