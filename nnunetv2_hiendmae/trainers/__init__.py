"""Trainers that stock nnUNetv2_train and nnUNetv2_predict find by name."""

from nnunetv2_hiendmae.trainers import trainers
from nnunetv2_hiendmae.trainers.trainers import *  # noqa: F403

__all__ = [*trainers.__all__]
