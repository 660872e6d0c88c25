"""The README's way from DICOM to nnU-Net's raw format, run as it stands there."""

import json
import locale
import re
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunet_data import make_dataset
from test_run import fork_commands
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, with_discovery
from nnunetv2_hiendmae.pretraining.hiendmae import HiEndMAE

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def write_dicom_series(
    folder: Path, voxels: np.ndarray, spacing: tuple[float, float, float], uid: str, missing: tuple[int, ...] = ()
) -> None:
    """Slices as CT DICOM files with a rescale intercept, named so that the names do not sort like the positions."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    volume = sitk.GetImageFromArray(voxels)
    volume.SetSpacing(spacing)
    for z in set(range(volume.GetDepth())) - set(missing):
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


@pytest.fixture
def same_locale():
    """Reading DICOM sets this process's locale to C, in which later tests would read their files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def test_dicom_to_raw(tmp_path, monkeypatch, same_locale, capsys):
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1000, (20, 24, 28)).astype(np.int16)
    write_dicom_series(tmp_path / "dicom" / "patient 1" / "ct", voxels, (0.8, 0.8, 2.5), "1.2.3.4")
    write_dicom_series(tmp_path / "dicom" / "patient 1" / "scout", voxels[:1], (0.8, 0.8, 2.5), "1.2.3.5")
    # ITK would write both, with the spacing wrong
    for number, missing in enumerate([(7,), (3, 4, 12)]):
        gaps = tmp_path / "dicom" / "patient 2" / f"gaps{number}"
        write_dicom_series(gaps, voxels, (0.8, 0.8, 2.5), f"1.2.3.{6 + number}", missing)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("DICOM_FOLDER", str(tmp_path / "dicom"))

    exec(compile(blocks("README.md")[0], "README.md", "exec"), {})

    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [re.findall(r"(gaps\d) .*to ([\d.]+) mm", line) for line in left_out] == [
        [("gaps0", "5.00")],
        [("gaps1", "7.50")],
    ]
    dataset = tmp_path / "raw" / "Dataset100_UnlabelledCT"
    assert [p.name for p in (dataset / "imagesTr").iterdir()] == ["patient-1_ct_0_0000.nii.gz"]
    image = sitk.ReadImage(str(dataset / "imagesTr" / "patient-1_ct_0_0000.nii.gz"))
    assert np.allclose(image.GetSpacing(), (0.8, 0.8, 2.5))
    assert np.array_equal(sitk.GetArrayFromImage(image), voxels)
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 1


def test_the_hours_of_the_example_are_computed_right():
    """From its own command: crops, FLOP as PyTorch counts them, and the figures of docs/benchmarks.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^hiendmae pretrain -d 100 .*$", text, re.MULTILINE)
    epochs, batch = (int(re.search(rf"{flag} (\d+)", line)[1]) for flag in ("--epochs", "--batch-size"))
    crops = epochs * HiEndMAE.recipe.steps_per_epoch * batch
    method = HiEndMAE(PRESETS["vit_base_p16"])
    image, ids = torch.rand(1, 1, *method.spec.img_size), torch.arange(method.spec.num_tokens)[None]
    with FlopCounterMode(display=False) as counter:
        method({"image": image, "ids_shuffle": ids})["loss"].backward()
    flop = counter.get_total_flops()
    said = f"{crops / 1e6:.2f} million crops, {flop / 1e9:.1f} GFLOP each there and back (counted)"
    assert said in text and f"{crops * flop / 1e17:.1f}·10¹⁷ FLOP" in text
    figures = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "| hiendmae | 768 | 2 | 9 | 101.61 / 122.95 | 0.678 " in figures
    assert "| ours, with augmentation | 357 |" in figures
    assert f"{crops * flop / 20e12 / 3600:.1f} hours on one GPU that keeps up 20 TFLOP/s" in text
    assert f"{20e12 / 312e12:.0%}".replace("%", " %") in text
    assert f"{crops / 357 / 3600:.0f} hours of one core" in text
    assert f"{crops * 0.678 / 2 / 86400:.0f} days" in text


@pytest.mark.slow
def test_python_page(nnunet, tmp_path, monkeypatch, capsys):
    """docs/python_api.md, all of it, one block after the other in one namespace, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(EXT_TRAINER_VARIABLE, with_discovery(None))
    fork_commands(monkeypatch)
    make_dataset(nnunet, 100, cases=4, with_labels=False)
    name = make_dataset(nnunet, 200)
    (tmp_path / "labels.csv").write_text("case,label\ncase_000,a\ncase_001,b\ncase_002,a\ncase_003,b\n")
    # a finished fold of stock nnU-Net, to compare
    fold = nnunet.results / name / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "validation"
    fold.mkdir(parents=True)
    rows = [
        {"prediction_file": f"case_{i:03d}.nii.gz", "metrics": {"1": {"Dice": 0.5 + i / 10}, "2": {"Dice": 0.25}}}
        for i in range(2)
    ]
    (fold / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    labels = {"background": 0, "organ": 1, "lesion": 2}
    (fold.parents[1] / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))

    notebook = {"__name__": "__main__"}
    for number, code in enumerate(blocks("docs/python_api.md")):
        exec(compile(code, f"python_api.md, block {number}", "exec"), notebook)

    said = capsys.readouterr().out
    assert "4 cases preprocessed, 0 broken" in said and "nnUNetv2_train 200 3d_fullres 0" in said
    assert "mae3d (3.0, 3.0, 3.0) (-175.0, 250.0)" in said
    # mean over classes of the first case, then of the second
    assert "0.4" in said.split("nnUNetTrainer__nnUNetPlans__3d_fullres")[1]
    assert notebook["tokens"].shape == (1, 1 + 8, 96) and [m.shape[1] for m in notebook["maps"]] == [96] * 4
    assert len(notebook["table"].read_text().splitlines()) == 1 + 4
    assert set(notebook["results"]["dice"]) == {"hiendmae", "scratch"}
