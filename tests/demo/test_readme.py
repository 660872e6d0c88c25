"""The README's way from DICOM to nnU-Net's raw format, run as it stands there."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.volume_format import VolumeFormat

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def write_dicom_series(folder: Path, voxels: np.ndarray, spacing: tuple[float, float, float], uid: str) -> None:
    """Slices as CT DICOM files with a rescale intercept, named so that the names do not sort like the positions."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    volume = sitk.GetImageFromArray(voxels)
    volume.SetSpacing(spacing)
    for z in range(volume.GetDepth()):
        image = volume[:, :, z]
        position = "\\".join(map(str, volume.TransformIndexToPhysicalPoint((0, 0, z))))
        tags = {
            "0008|0008": "DERIVED\\SECONDARY", "0008|0060": "CT", "0008|0031": time.strftime("%H%M%S"),
            "0020|000e": uid, "0020|000d": "1.2.3", "0020|0032": position, "0020|0013": str(z),
            "0020|0037": "1\\0\\0\\0\\1\\0", "0028|1052": "-1024", "0028|1053": "1", "0018|0050": str(spacing[2]),
            "0008|0018": f"{uid}.{z}", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        }  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"slice{(z * 7) % 31:02d}.dcm"))
        writer.Execute(image)


def test_dicom_to_raw(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1000, (20, 24, 28)).astype(np.int16)
    write_dicom_series(tmp_path / "dicom" / "patient 1" / "ct", voxels, (0.8, 0.8, 2.5), "1.2.3.4")
    write_dicom_series(tmp_path / "dicom" / "patient 1" / "scout", voxels[:1], (0.8, 0.8, 2.5), "1.2.3.5")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("DICOM_FOLDER", str(tmp_path / "dicom"))

    exec(compile(blocks("README.md")[0], "README.md", "exec"), {})

    dataset = tmp_path / "raw" / "Dataset100_UnlabelledCT"
    assert [p.name for p in (dataset / "imagesTr").iterdir()] == ["patient-1_ct_0_0000.nii.gz"]
    image = sitk.ReadImage(str(dataset / "imagesTr" / "patient-1_ct_0_0000.nii.gz"))
    assert np.allclose(image.GetSpacing(), (0.8, 0.8, 2.5))
    assert np.array_equal(sitk.GetArrayFromImage(image), voxels)
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 1


@pytest.mark.slow
def test_python_page(tmp_path, monkeypatch, capsys):
    from nnunetv2_hiendmae.architectures import PRESETS, build_encoder
    from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder

    monkeypatch.chdir(tmp_path)
    spec = PRESETS["vit_nano_p8"]
    volume = VolumeFormat(
        (3.0,) * 3, (-175.0, 250.0), normalization_schemes=("CTNormalization",), channel_names=("CT",)
    )
    metadata = EncoderMetadata(spec, "hiendmae", volume)
    save_encoder(tmp_path / "encoder.safetensors", build_encoder(spec).state_dict(), metadata)
    for code in blocks("docs/python_api.md")[:2]:
        exec(compile(code, "python_api.md", "exec"), {})
    assert "hiendmae" in capsys.readouterr().out
