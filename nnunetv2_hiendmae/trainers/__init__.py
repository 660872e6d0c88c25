"""Trainers that stock nnUNetv2_train and nnUNetv2_predict find by name."""

from nnunetv2_hiendmae.trainers.trainers import *  # noqa: F403
from nnunetv2_hiendmae.trainers.trainers import __all__ as __all__
