"""`hiendmae reconstruct`: files that lie on the image they were cut from."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from oblique_data import DATASET, READERS, SPACING_XYZ, marked_world, write_dataset, write_run

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import EncoderSpec

# larger than the body along every axis, and smaller
WHOLE = EncoderSpec((32, 32, 32), (8, 8, 8), embed_dim=24, depth=4, num_heads=2)
PART = EncoderSpec((8, 8, 8), (4, 4, 4), embed_dim=24, depth=4, num_heads=2)
TITLES = ("input", "masked", "reconstruction")


def spacing_of(reader: str) -> tuple[float, ...]:
    """The image's own spacing (D, H, W) as the reader has it: no resampling."""
    x, y, z = SPACING_XYZ
    # turned to RAS the file's axes are posterior, superior, left: third, first, second
    return (y, x, z) if "Reorient" in reader else (z, y, x)


def reconstruct(run_dir, output, *arguments):
    return cli.main(["reconstruct", str(run_dir), "-o", str(output), "-device", "cpu", *arguments])


def load(folder) -> dict[str, nibabel.Nifti1Image]:
    return {t: nibabel.load(folder / DATASET / f"case_crop_{t}.nii.gz") for t in TITLES}


def raw_at(image, made: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Raw HU at every voxel of `made`, through the world, and which of them are on a voxel of the image."""
    raw = nibabel.load(image)
    to_raw = np.linalg.inv(raw.affine) @ made.affine
    places = nibabel.affines.apply_affine(to_raw, np.moveaxis(np.indices(made.shape), 0, -1))
    index = np.rint(places).astype(int)
    assert np.abs(places - index).max() < 1e-3
    inside = ((index >= 0) & (index < raw.shape)).all(-1)
    values = raw.get_fdata()[tuple(np.moveaxis(index.clip(0, np.array(raw.shape) - 1), -1, 0))]
    return values, inside


@pytest.mark.parametrize("reader", READERS)
def test_the_files_lie_on_the_image(nnunet, tmp_path, reader):
    image = write_dataset(nnunet, reader, spacing_of(reader))
    for name, spec in (("whole", WHOLE), ("part", PART)):
        assert reconstruct(write_run(tmp_path / name, spec), tmp_path / f"{name}_out") == 0
        made = load(tmp_path / f"{name}_out")
        expected, inside = raw_at(image, made["input"])
        values = {t: i.get_fdata() for t, i in made.items()}
        body = inside & (expected != 0)
        assert body.sum() > 300
        assert np.abs(values["input"] - expected)[body].max() < 1e-3
        # visible voxels are those of the image, masked ones are one value, the reconstruction differs only there
        true, masked, made = (values[t][body] for t in TITLES)
        visible = masked > masked.min()
        assert 0.1 < visible.mean() < 0.6 and np.array_equal(masked[visible], true[visible])
        assert np.abs(made - true)[visible].max() < 1e-3 and np.abs(made - true)[~visible].mean() > 1
    values = load(tmp_path / "whole_out")["input"].get_fdata()
    brightest = np.unravel_index(values.argmax(), values.shape)
    found = nibabel.affines.apply_affine(load(tmp_path / "whole_out")["input"].affine, brightest)
    assert np.abs(found - marked_world(image)).max() < 1e-3
    # SimpleITK sees it at the same place
    other = sitk.ReadImage(str(tmp_path / "whole_out" / DATASET / "case_crop_input.nii.gz"))
    there = np.array(other.TransformIndexToPhysicalPoint([int(i) for i in brightest])) * (-1, -1, 1)
    assert np.abs(there - found).max() < 1e-3


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
def test_resampled_crops_lie_on_the_image(nnunet, tmp_path, reader):
    image = write_dataset(nnunet, reader, (1.3, 1.3, 1.3), blob_mm=3.0)
    spec = WHOLE.with_(img_size=(40, 40, 40))
    assert reconstruct(write_run(tmp_path / "run", spec), tmp_path / "out") == 0
    made = load(tmp_path / "out")["input"]
    weights = (made.get_fdata() + 300).clip(0)
    weights[weights < 600] = 0
    centre = [(np.indices(weights.shape)[a] * weights).sum() / weights.sum() for a in range(3)]
    found = nibabel.affines.apply_affine(made.affine, centre)
    # a tenth of the coarsest voxel; half of one would hide a shift by a rounded shape
    assert np.linalg.norm(found - marked_world(image)) < 0.3


def test_a_crop_depends_on_seed_and_case_only(nnunet, tmp_path):
    write_dataset(nnunet, "SimpleITKIO", spacing_of("SimpleITKIO"))
    run = write_run(tmp_path / "run", PART)
    for name, arguments in (("a", ["--case", f"{DATASET}/case"]), ("b", ["--cases", "3"]), ("c", ["--seed", "1"])):
        assert reconstruct(run, tmp_path / name, *arguments) == 0
    files = {n: (tmp_path / n / DATASET / "case_crop_input.nii.gz").read_bytes() for n in "abc"}
    assert files["a"] == files["b"] != files["c"]
    names = sorted(p.name for p in (tmp_path / "a" / DATASET).iterdir())
    assert names == ["case_crop.png", *(f"case_crop_{t}.nii.gz" for t in TITLES)]


def test_augmentation_is_left_out(nnunet, tmp_path):
    """GL-MAE's two kinds of views carry it inside; the untrained weights of both runs differ, the input must not."""
    write_dataset(nnunet, "SimpleITKIO", spacing_of("SimpleITKIO"))
    drawn = []
    for augment in (True, False):
        run = write_run(tmp_path / f"{augment}", WHOLE, "glmae", augment=augment)
        assert reconstruct(run, tmp_path / f"{augment}_out", "--view", "local") == 0
        picture = imread(tmp_path / f"{augment}_out" / DATASET / "case_local.png")
        # of the three columns, input, masked and reconstruction, the first
        drawn.append(picture[:, : picture.shape[1] // 3])
    assert np.array_equal(*drawn)


def test_bad_input(nnunet, tmp_path, capsys):
    write_dataset(nnunet, "SimpleITKIO", spacing_of("SimpleITKIO"))
    run = write_run(tmp_path / "run", PART)
    cases = [
        ([str(tmp_path)], "no run.json"),
        ([str(run), "--case", "Dataset007_Oblique/none"], "no case 'Dataset007_Oblique/none'"),
        ([str(run), "--cases", "0"], "--cases is 0"),
        ([str(run), "--view", "level9"], "one of crop"),
    ]
    for arguments, told in cases:
        assert reconstruct(arguments[0], tmp_path / "out", *arguments[1:]) == 2
        message = capsys.readouterr().err
        assert told in message and len(message.strip().splitlines()) == 1
    record = next((nnunet.preprocessed / DATASET).glob("*/case.pkl"))
    record.unlink()
    assert reconstruct(run, tmp_path / "out") == 2
    assert "does not say where case" in capsys.readouterr().err
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "method": "other"}))
    assert reconstruct(run, tmp_path / "out") == 2
    assert "run.json is damaged or of another version (--method is other" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
