"""Tiny synthetic raw datasets in nnU-Net's format, and the folders that nnU-Net wants."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder

ORGAN, LESION, IGNORE = 1, 2, 3
TINY = EncoderSpec((24, 24, 24), (8, 8, 8), embed_dim=48, depth=3, num_heads=4)


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders below one root."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The three variables."""
        return {v: str(self.root / v) for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"


def make_folders(root: Path) -> Folders:
    """Creates the three folders below `root`."""
    folders = Folders(root)
    for path in folders.environment.values():
        Path(path).mkdir(parents=True)
    return folders


def make_dataset(
    folders: Folders,
    number: int,
    *,
    cases: int = 5,
    shape: tuple[int, int, int] = (32, 34, 30),
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5),
    channels: tuple[str, ...] = ("CT",),
    labels: dict | None = None,
    extra_json: dict | None = None,
    with_labels: bool = True,
    paint_ignore: bool = False,
    name: str = "Toy",
    seed: int = 0,
) -> str:
    """Writes `Dataset<number>_<name>`: an organ (box, 1) holding a brighter lesion (box, 2) in noise.

    Args:
        shape, spacing: (D, H, W).
        labels: dataset.json labels; default background, organ, lesion.
        with_labels: False leaves labelsTr out.
        paint_ignore: some voxels get label 3.

    Returns:
        The dataset's full name.
    """
    dataset_name = f"Dataset{number:03d}_{name}"
    folder = folders.raw / dataset_name
    for sub in ("imagesTr", "imagesTs", *(["labelsTr"] if with_labels else [])):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for case in range(cases):
        seg = np.zeros(shape, np.uint8)
        start = rng.integers(4, 8, 3)
        stop = [int(s) - 6 for s in shape]
        organ = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        seg[organ] = ORGAN
        lesion = tuple(slice(int(a) + 4, int(a) + 12) for a in start)
        seg[lesion] = LESION
        for channel, channel_name in enumerate(channels):
            scale, offset = (100.0, -900.0) if channel_name == "CT" else (10.0, 100.0)
            image = offset + scale * rng.standard_normal(shape) + 10 * scale * (seg > 0) + 3 * scale * (seg == LESION)
            write_image(folder / "imagesTr" / f"case_{case:03d}_{channel:04d}.nii.gz", image, spacing)
            if case == 0:
                write_image(folder / "imagesTs" / f"test_000_{channel:04d}.nii.gz", image, spacing)
        if paint_ignore:
            seg[:, :, :3] = IGNORE
        if with_labels:
            write_image(folder / "labelsTr" / f"case_{case:03d}.nii.gz", seg, spacing)
    dataset_json = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": labels or {"background": 0, "organ": ORGAN, "lesion": LESION},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **(extra_json or {}),
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return dataset_name


def write_fingerprint(
    folders: Folders,
    dataset_name: str,
    *,
    shape: tuple[int, int, int] = (32, 34, 30),
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5),
    channels: int = 1,
    cases: int = 5,
    extra: dict | None = None,
) -> Path:
    """A fingerprint as nnU-Net's extractor writes it, without reading any image."""
    properties = {"mean": 1.0, "median": 2.0, "std": 3.0, "min": -5.0, "max": 9.0}
    properties |= {"percentile_99_5": 8.0, "percentile_00_5": -4.0}
    fingerprint = {
        "spacings": [list(spacing)] * cases,
        "shapes_after_crop": [list(shape)] * cases,
        "foreground_intensity_properties_per_channel": {str(i): properties for i in range(channels)},
        "median_relative_size_after_cropping": 1.0,
        **(extra or {}),
    }
    path = folders.preprocessed / dataset_name / "dataset_fingerprint.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(fingerprint))
    return path


def save_tiny_encoder(
    path: Path,
    *,
    method: str = "hiendmae",
    spec: EncoderSpec = TINY,
    spacing_mm: tuple[float, float, float] | None = (1.5, 1.5, 1.5),
    window_hu: tuple[float, float] | None = (-175.0, 250.0),
    seed: int = 0,
    **metadata,
) -> Path:
    """Encoder file of a freshly built encoder whose weights depend on `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = build_encoder(spec)
    described = {"normalization_schemes": ("CTNormalization",), "channel_names": ("CT",), **metadata}
    seen = {f.name: described.pop(f.name) for f in fields(VolumeFormat) if f.name in described}
    volume = VolumeFormat(spacing_mm, window_hu, **seen)
    metadata = EncoderMetadata(spec, method, volume, **{"citations": ("@a{b}",), **described})
    save_encoder(path, encoder.state_dict(), metadata)
    return path


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)) -> None:
    """A file of an array (D, H, W) with that spacing; numbers that are not whole in float32."""
    image = sitk.GetImageFromArray(array.astype(np.float32) if array.dtype.kind == "f" else array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(image, str(path))


def read_arrays(folders: Folders, dataset_name: str, plans: str = "HiEndMAEPretrain") -> dict[str, np.ndarray]:
    """Preprocessed cases, read by nnU-Net as its trainers do."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder = str(folders.preprocessed / dataset_name / f"{plans}_3d_fullres")
    data = infer_dataset_class(folder)(folder)
    return {case: data.load_case(case)[0][:] for case in sorted(data.identifiers)}
