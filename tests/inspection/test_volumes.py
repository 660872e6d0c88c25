"""Grids: where a map lies on an image, and what it is there."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from oblique_data import READERS, oblique_direction

from nnunetv2_hiendmae.inspection.volumes import preprocess, read_image, resample
from nnunetv2_hiendmae.training.grids import Grid, reader_grid
from nnunetv2_hiendmae.volume_format import VolumeFormat


def grid(shape, spacing_mm=(1.0, 1.0, 1.0)) -> Grid:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = oblique_direction() * spacing_mm, (-210.5, 33.3, 871.9)
    return Grid(shape, affine)


def along_first_axis(values, source, target) -> list[float]:
    made = resample(np.array(values, float).reshape(-1, 1, 1), source, target)
    assert made.shape == target.shape and made.dtype == np.float32
    return made[:, 0, 0].tolist()


def test_linear_between_centres_and_constant_up_to_the_edge():
    source = grid((2, 1, 1), (4.0, 1.0, 1.0))
    # centres of the image's voxels lie at -2.5, -1.5, … mm, those of the map at 0 and 4, its edges at -2 and 6
    target = source.resized((8, 1, 1)).cropped((-1, 0, 0), (10, 1, 1))
    expected = [0, 10, 10, 12.5, 17.5, 22.5, 27.5, 30, 30, 0]
    assert along_first_axis([10, 30], source, target) == pytest.approx(expected, abs=1e-5)


def test_a_centre_on_the_edge_is_inside():
    """At both ends, and whatever rounding in oblique affines does to it."""
    source = grid((2, 1, 1), (3.0, 1.0, 1.0))
    # a step of two voxels from the lower edge: -1.5, 0.5, 2.5, 4.5 mm and beyond
    target = source.resized((3, 1, 1)).cropped((-1, 0, 0), (5, 1, 1))
    affine = target.affine.copy()
    affine[:3, 3] = target.to_world((0.5, 0, 0))
    target = Grid((5, 1, 1), affine)
    assert along_first_axis([10, 40], source, target) == pytest.approx([10, 15, 35, 40, 0], abs=1e-4)
    assert target.covered(source)[0] == slice(0, 4)
    # widened by a third of 6 mm there is one more voxel at the far end
    assert target.covered(source, 1 / 3)[0] == slice(0, 5)


def test_nothing_of_the_image_is_covered():
    source = grid((2, 2, 2))
    assert not resample(np.ones((2, 2, 2)), source, source.cropped((5, 0, 0), (3, 2, 2))).any()


def test_turned_axes_are_not_parallel():
    source = grid((2, 3, 4))
    with pytest.raises(ValueError, match="parallel"):
        resample(np.ones((2, 3, 4)), source, source.turned(np.array([[1, 1], [0, 1], [2, 1]])))


def test_resized_and_turned_grids_hold_the_same_box():
    source = grid((4, 6, 9), (2.0, 1.5, 0.5))
    corner = (-0.5, -0.5, -0.5)
    smaller = source.resized((2, 2, 3))
    assert smaller.spacing_mm == pytest.approx((4.0, 4.5, 1.5))
    assert smaller.to_world(corner) == pytest.approx(source.to_world(corner))
    turned = source.turned(np.array([[2, -1], [0, 1], [1, 1]]))
    assert turned.shape == (6, 9, 4) and turned.spacing_mm == pytest.approx((1.5, 0.5, 2.0))
    assert turned.to_world((2, 5, 0)) == pytest.approx(source.to_world((3, 2, 5)))
    assert turned.to_index(source.to_world((1, 4, 8))) == pytest.approx((4, 8, 2))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("stored", ["LPS", "RAS", "PIR", "SAL"])
def test_letters_of_a_slice(tmp_path, reader, stored):
    """A bar at each side of the patient, as SimpleITK turns it, is at the edge of the array that its letter names."""
    slices = np.zeros((9, 9, 9), np.float32)
    # array axes towards S, P, L
    for value, axis, at in ((1, 2, 0), (2, 2, 8), (3, 1, 0), (4, 1, 8), (5, 0, 8), (6, 0, 0)):
        middle = [4, 4, 4]
        middle[axis] = at
        slices[tuple(middle)] = value
    path = tmp_path / "image.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(sitk.GetImageFromArray(slices), stored), str(path))
    data, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(path)])
    middle = data[0, 4]
    seen = middle[0, 4], middle[8, 4], middle[4, 0], middle[4, 8]
    assert reader_grid(properties, data.shape[1:]).edges == "".join("?RLAPSI"[int(value)] for value in seen)


def test_no_letters_where_nobody_knows():
    assert reader_grid({"spacing": (1.0, 1.0, 1.0)}, (4, 4, 4)).cropped((1, 1, 1), (2, 2, 2)).edges == ""


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_a_file_that_the_encoders_reader_cannot_read_is_read_by_its_twin(tmp_path, ending):
    """NIfTI in pretraining, NRRD now; turned to the same orientation."""
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    files = [tmp_path / "x.nii.gz", tmp_path / f"x.{ending}"]
    for file in files:
        sitk.WriteImage(image, str(file))
    volumes = VolumeFormat(image_reader_writer="NibabelIOWithReorient", channel_names=("MR",))
    nifti, other = (read_image([file], volumes) for file in files)
    assert np.array_equal(nifti.data, other.data)
    assert np.array_equal(nifti.to_stored, other.to_stored)
    assert np.allclose(nifti.grid.affine, other.grid.affine)


def test_the_mask_of_the_encoders_z_scores_is_used(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, (8, 9, 10)).astype(np.float32)
    # a corner that the box of the image holds
    values[:4, :4, :4] = 0
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "x.nii.gz"))
    volumes = VolumeFormat((1, 1, 1), normalization_schemes=("ZScoreNormalization",), channel_names=("MR",))
    image = read_image([tmp_path / "x.nii.gz"], volumes)
    inside = values[values != 0]
    for mask, mean, sd in (((True,), inside.mean(), inside.std()), ((False,), values.mean(), values.std())):
        made = preprocess(image, replace(volumes, use_mask_for_norm=mask))[0][0]
        assert made[0, 0, 0] == (0 if mask[0] else pytest.approx(-mean / sd, abs=1e-4))
        assert made[-1, -1, -1] == pytest.approx((values[-1, -1, -1] - mean) / sd, abs=1e-4)


@pytest.mark.parametrize("reader", [None, "SimpleITKIO"])
def test_what_a_reader_says_is_told(tmp_path, caplog, reader):
    volumes = VolumeFormat(image_reader_writer=reader, channel_names=("MR",))
    values = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    image = nibabel.Nifti1Image(values, np.eye(4))
    nibabel.save(image, tmp_path / "x.nii.gz")
    read_image([tmp_path / "x.nii.gz"], volumes)
    assert not caplog.records
    image.set_qform(np.diag([2, 1, 1, 1]), 1)
    nibabel.save(image, tmp_path / "x.nii.gz")
    read_image([tmp_path / "x.nii.gz"], volumes)
    assert "x.nii.gz says: WARNING: " in caplog.text and "unexpected scales in sform" in caplog.text
