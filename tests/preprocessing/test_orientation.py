"""Images that lie in different directions, and files that are inflated before they are read."""

import gzip
import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nnunet_data import make_dataset, read_arrays, save_tiny_encoder

from nnunetv2_hiendmae import pretrain
from nnunetv2_hiendmae.planning.finetune import plan_finetuning
from nnunetv2_hiendmae.preprocessing.cases import BrokenCaseError, checked_files
from nnunetv2_hiendmae.preprocessing.preprocess import preprocess_datasets

PLANS = "HiEndMAEPretrain"
SHAPE = (20, 24, 30)


def body(shift=0):
    """An image (x, y, z) that looks different from every side."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in SHAPE), indexing="ij")
    return (-150 + 100 * x + 150 * y**2 + 120 * z**3 + shift).astype(np.float32)


def turned(axes, degrees=0.0):
    """The same body in the world, stored along other axes, and turned about z."""
    angle = np.deg2rad(degrees)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:2, :2] = 1.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    image = nibabel.Nifti1Image(body(), affine).as_reoriented(turn)
    assert np.allclose(image.affine, affine @ inv_ornt_aff(turn, SHAPE))
    return image


def dataset(nnunet, images, number=1, with_labels=False, **extra):
    name = make_dataset(nnunet, number, cases=len(images), with_labels=with_labels, extra_json=extra)
    for case, image in enumerate(images):
        nibabel.save(image, nnunet.raw / name / "imagesTr" / f"case_{case:03d}_0000.nii.gz")
        if with_labels:
            label = nibabel.Nifti1Image((image.get_fdata() > 0).astype(np.uint8), image.affine)
            nibabel.save(label, nnunet.raw / name / "labelsTr" / f"case_{case:03d}.nii.gz")
    return name


def run(*names, **settings):
    return preprocess_datasets(names, **{"spacing_mm": (1.5,) * 3, "num_processes": 1, **settings})


def reader(nnunet, name):
    return json.loads((nnunet.preprocessed / name / f"{PLANS}.json").read_text())["image_reader_writer"]


def test_cases_that_lie_differently_are_turned_and_this_is_said(nnunet, caplog):
    """LPS, RAS, sagittal, and RAS that is 17° oblique."""
    images = [turned("LPS"), turned("RAS"), turned("PIR"), turned("RAS", 17)]
    name = dataset(nnunet, images)
    with caplog.at_level(logging.WARNING):
        assert run(name).done == 4
    assert "1 LPS (Dataset001_Toy/case_000), 2 RAS (" in caplog.text and "1 PIR" in caplog.text
    assert "NibabelIOWithReorient turns them all to RAS" in caplog.text
    assert reader(nnunet, name) == "NibabelIOWithReorient"
    first, *others = read_arrays(nnunet, name).values()
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-6)
    # nnU-Net's (z, y, x) of RAS
    np.testing.assert_allclose(first[0], (np.clip(body(), -175, 250).T + 175) / 425, atol=1e-6)
    assert run(name).skipped == 4


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_where_all_agree_arrays_stay_as_stored(nnunet, caplog, axes):
    name = dataset(nnunet, [turned(axes), turned(axes)])
    with caplog.at_level(logging.WARNING):
        run(name)
    assert "directions" not in caplog.text and reader(nnunet, name) == "SimpleITKIO"
    stored = np.asarray(turned(axes).dataobj).T
    np.testing.assert_allclose(
        read_arrays(nnunet, name)["case_000"][0], (np.clip(stored, -175, 250) + 175) / 425, atol=1e-6
    )


def test_directions_are_compared_over_all_datasets_of_a_run(nnunet):
    one, other = dataset(nnunet, [turned("LPS")] * 2), dataset(nnunet, [turned("RAS")] * 2, 2)
    run(one, other)
    assert [reader(nnunet, name) for name in (one, other)] == ["NibabelIOWithReorient"] * 2
    np.testing.assert_allclose(read_arrays(nnunet, one)["case_000"], read_arrays(nnunet, other)["case_000"], atol=1e-6)


def test_pretraining_warns_where_datasets_were_preprocessed_one_by_one(nnunet, caplog):
    names = dataset(nnunet, [turned("LPS")] * 2), dataset(nnunet, [turned("RAS")] * 2, 2)
    for name in names:
        run(name)
    crop = {"encoder": "vit_nano_p8", "crop_size": (16, 16, 16), "method": "mae3d"}
    short = {"epochs": 1, "steps_per_epoch": 1, "batch_size": 2, "workers": 0, "device": "cpu"}
    with caplog.at_level(logging.WARNING):
        pretrain(names, **crop, **short)
    assert f"{names[0]} SPL, {names[1]} SAR; hiendmae preprocess" in caplog.text
    caplog.clear()
    pretrain(names[:1], **crop, **short, name="one")
    assert "directions" not in caplog.text


def test_a_reader_that_dataset_json_asks_for_stays(nnunet, caplog):
    name = dataset(nnunet, [turned("LPS"), turned("RAS")], overwrite_image_reader_writer="SimpleITKIO")
    with caplog.at_level(logging.WARNING):
        run(name)
    assert "different directions" in caplog.text and "stay so" in caplog.text
    assert reader(nnunet, name) == "SimpleITKIO"


def test_a_sheared_image_among_them_is_read_too(nnunet):
    """ITK has no direction for it; nibabel reads and turns it."""
    sheared = turned("LPS")
    affine = sheared.affine.copy()
    affine[0, 1] += 0.004
    name = dataset(nnunet, [turned("RAS"), turned("LPS"), nibabel.Nifti1Image(sheared.get_fdata(), affine)])
    assert run(name).done == 3


def test_plan_warns_of_a_reader_that_leaves_images_as_they_lie(nnunet, tmp_path, caplog):
    images = [turned("LPS"), turned("RAS")] * 3
    name = dataset(nnunet, images, with_labels=True)
    encoder = save_tiny_encoder(tmp_path / "e.safetensors", image_reader_writer="SimpleITKIO")
    with caplog.at_level(logging.WARNING):
        plan_finetuning(name, encoder, num_processes=1)
    assert "3 LPS" in caplog.text and "--reader NibabelIOWithReorient turns them all to RAS" in caplog.text
    caplog.clear()
    plan_finetuning(name, encoder, reader="NibabelIOWithReorient", plans_name="Turned", num_processes=1)
    assert "directions" not in caplog.text


# ---- files are inflated once


def nifti(path, array=None):
    nibabel.save(nibabel.Nifti1Image(body() if array is None else array, np.eye(4)), path)
    return path


def test_a_compressed_file_is_inflated_once_and_nothing_stays(tmp_path):
    file, scratch = nifti(tmp_path / "case_0000.nii.gz"), tmp_path / "scratch"
    scratch.mkdir()
    with checked_files([str(file)], scratch) as (plain,):
        assert plain.endswith("case_0000.nii") and plain.startswith(str(scratch))
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(sitk.ReadImage(plain)), sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        )
    assert not list(scratch.iterdir())


def test_other_files_are_read_where_they_are(tmp_path):
    file = nifti(tmp_path / "case_0000.nii")
    with checked_files([str(file)]) as files:
        assert files == [str(file)]


def test_bytes_behind_the_compressed_image_are_nothing_to_it(tmp_path):
    file = nifti(tmp_path / "case_0000.nii.gz")
    file.write_bytes(file.read_bytes() + b"rubbish")
    with checked_files([str(file)]) as (plain,):
        np.testing.assert_array_equal(np.asarray(nibabel.load(plain).dataobj), body())


def test_no_more_is_written_than_the_header_announces(tmp_path):
    file = tmp_path / "case_0000.nii.gz"
    content = gzip.decompress(nifti(file).read_bytes())
    file.write_bytes(gzip.compress(content + bytes(50_000_000)))
    with checked_files([str(file)]) as (plain,):
        assert Path(plain).stat().st_size == len(content)


def test_a_changed_byte_is_noticed(tmp_path):
    """The checksum of gzip, which neither ITK nor nibabel looks at."""
    content = bytearray(nifti(tmp_path / "good.nii.gz").read_bytes())
    file = tmp_path / "case_0000.nii.gz"
    # stored, not deflated: any byte can change without breaking the stream
    stored = bytearray(gzip.compress(gzip.decompress(bytes(content)), 0))
    stored[len(stored) // 2] ^= 1
    file.write_bytes(bytes(stored))
    with (
        pytest.raises(BrokenCaseError, match=r"case_0000\.nii\.gz is truncated or damaged: CRC"),
        checked_files([str(file)]),
    ):
        pass


def test_the_reason_names_the_users_file(nnunet):
    """A reader names the file that it was given, which is the inflated one."""
    name = make_dataset(nnunet, 1, cases=2, with_labels=False)
    broken = nnunet.raw / name / "imagesTr" / "case_001_0000.nii.gz"
    broken.write_bytes(gzip.compress(b"no image at all"))
    summary = run(name, spacing_mm=(3, 3, 3))
    ((_, case, reason),) = summary.broken
    assert case == "case_001" and ".partial" not in reason and "case_001_0000.nii.gz" in reason
