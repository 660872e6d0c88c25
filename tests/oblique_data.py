"""CT-like images whose axes are oblique, anisotropic, permuted and flipped, with one marked voxel."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunet_data import Folders
from run_data import TINY_OPTIONS, tiny_settings

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.preprocessing.preprocess import preprocess_datasets
from nnunetv2_hiendmae.training.run import claimed, save_state
from nnunetv2_hiendmae.training.volumes import find_cases

DATASET = "Dataset007_Oblique"
PLANS = "ObliquePlans"
READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
SPACING_XYZ = (0.8, 1.1, 3.0)
SHAPE = (14, 26, 22)
# index (D, H, W) in the file's array; zeros around the body are what nnU-Net cuts off
MARKED = (8, 15, 11)
BODY = (slice(2, 13), slice(3, 25), slice(1, 20))
WINDOW = (-1000.0, 1000.0)


def oblique_direction() -> np.ndarray:
    """Rotated by 20° and 15°, the file's axes permuted and flipped: its third one runs to the left."""
    (s, c), (t, u) = ((np.sin(a), np.cos(a)) for a in np.radians((20, 15)))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, u, -t], [0, t, u]])
    return turn @ np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def write_oblique(path: Path, blob_mm: float = 0.0, seed: int = 0) -> Path:
    """HU between -400 and 400, zero around the body; the marked voxel is 1000, or the middle of a blob on -400."""
    rng = np.random.default_rng(seed)
    array = np.zeros(SHAPE, np.float32)
    if blob_mm:
        axes = np.meshgrid(*(np.arange(s) for s in SHAPE), indexing="ij")
        steps = zip(axes, MARKED, reversed(SPACING_XYZ), strict=True)
        squared = sum(((a - m) * s) ** 2 for a, m, s in steps)
        array[BODY] = (-400 + 1400 * np.exp(-squared / (2 * blob_mm**2)))[BODY]
    else:
        array[BODY] = rng.uniform(-400, 400, SHAPE)[BODY]
        array[MARKED] = 1000
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_XYZ)
    image.SetOrigin((-40.0, 25.0, 310.0))
    image.SetDirection(oblique_direction().ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def marked_world(path: Path) -> np.ndarray:
    """World position of the marked voxel, by SimpleITK, in NIfTI's convention."""
    image = sitk.ReadImage(str(path))
    return np.array(image.TransformIndexToPhysicalPoint(MARKED[::-1])) * (-1, -1, 1)


def write_dataset(folders: Folders, reader: str, spacing_dhw: tuple[float, ...], blob_mm: float = 0.0) -> Path:
    """One case, preprocessed for pretraining; returns its raw image."""
    folder = folders.raw / DATASET
    image = write_oblique(folder / "imagesTr" / "case_0000.nii.gz", blob_mm)
    description = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps({**description, "overwrite_image_reader_writer": reader}))
    preprocess_datasets([DATASET], plans_name=PLANS, spacing_mm=spacing_dhw, window_hu=WINDOW, num_processes=1)
    return image


def write_run(run_dir: Path, spec: EncoderSpec, method: str = "hiendmae", **options) -> Path:
    """A run folder with untrained weights, on the preprocessed oblique dataset."""
    options = {**TINY_OPTIONS[method], **options}
    settings = tiny_settings(method, datasets=(DATASET,), plans_name=PLANS, spec=spec, options=options)
    data = find_cases(settings.datasets, PLANS, settings.configuration)
    run_dir.mkdir()
    with claimed(run_dir, settings, data.digest()):
        save_state(run_dir, {"method": settings.build_method()}, step=1, optimizer={}, precision={})
    return run_dir
