"""Overlays."""

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.figures import overlay_picture


def volume(path, voxels, direction=None):
    image = sitk.GetImageFromArray(voxels)
    if direction:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


def test_overlay(tmp_path):
    from matplotlib import colormaps
    from matplotlib.image import imread

    voxels = np.zeros((6, 20, 30), dtype=np.int16)
    mask = np.zeros(voxels.shape, dtype=np.uint8)
    mask[2:4, 2:10, 2:10] = 1
    overlay_picture(
        tmp_path / "picture.png", volume(tmp_path / "image.nii.gz", voxels),
        {"truth": volume(tmp_path / "truth.nii.gz", mask), "empty": volume(tmp_path / "empty.nii.gz", 0 * mask)},
        {"organ": 1, "background": 0}, window=(0, 1),
    )  # fmt: skip
    assert [p.name for p in tmp_path.glob("*.png")] == ["picture.png"]
    picture = imread(tmp_path / "picture.png")[..., :3]
    # over black, the overlay is its colour at its opacity; it is in the second of three columns only
    coloured = np.isclose(picture, 0.55 * np.array(colormaps["tab10"](0)[:3]), atol=0.02).all(axis=-1)
    columns = np.flatnonzero(coloured.any(axis=0)) / picture.shape[1]
    assert coloured.sum() > 500 and columns.min() > 0.3 and columns.max() < 0.7


def test_masks_need_the_grid_of_the_image(tmp_path):
    image = volume(tmp_path / "image.nii.gz", np.zeros((4, 5, 6), dtype=np.int16))
    mask = volume(tmp_path / "mask.nii.gz", np.zeros((4, 5, 5), dtype=np.uint8))
    with pytest.raises(UserError, match=r"\(4, 5, 5\).*\(4, 5, 6\)"):
        overlay_picture(tmp_path / "picture.png", image, {"truth": mask}, {"organ": 1})
    with pytest.raises(UserError, match="cannot read"):
        overlay_picture(tmp_path / "picture.png", tmp_path / "none.nii.gz", {"truth": mask}, {"organ": 1})
    assert not list(tmp_path.glob("*.png"))
