"""Volumes in memory in place of preprocessed cases (`training.views.Volume`)."""

import numpy as np

from nnunetv2_hiendmae.training.volumes import crop_and_pad


class ArrayVolume:
    """Values (C, D, H, W), 0 outside; everything is foreground, unless a mask (D, H, W) says otherwise."""

    spacing_mm = (1.0, 1.0, 1.0)

    def __init__(self, values: np.ndarray, foreground: np.ndarray | None = None):
        self.values, self.shape, self.foreground = values, values.shape[1:], foreground

    def read(self, lower, size):
        return crop_and_pad(self.values, lower, size, lambda: np.zeros(len(self.values))).copy()

    def is_foreground(self, voxel):
        return self.foreground is None or bool(self.foreground[tuple(voxel)])


def numbered(shape: tuple[int, int, int], first: int = 0) -> np.ndarray:
    """Every voxel (1, D, H, W) holds its raster number, so that a crop tells where it was cut."""
    return np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(1, *shape)
