"""The embedded volumes, and finding the two datasets of a demo."""

import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.demo.datasets import EMBEDDED_DATA, TASKS, find_data, install, isotropic_spacing
from nnunetv2_hiendmae.errors import UserError

IMAGES = sorted(EMBEDDED_DATA.glob("*/*/images*/*.nii.gz"))
# task -> finest spacing (mm), darkest voxel, ends between which the brightest one lies
STORED = {"ct": (2.9, -1024, (300, 2047)), "brain": (1.99, 0, (100, 127))}
# from dark to bright: labels lie on the organs, vertebrae are denser than muscle, white matter is bright on T1
BRIGHTNESS = {"ct": ["back_muscle", "vertebrae"], "brain": ["CSF", "GM", "WM"]}


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.name)
def test_embedded_image(path):
    task = path.parents[2].name
    spacing, darkest, (low, high) = STORED[task]
    image = sitk.ReadImage(str(path))
    assert image.GetPixelID() == sitk.sitkInt16
    assert min(image.GetSpacing()) >= spacing
    voxels = sitk.GetArrayFromImage(image)
    assert voxels.min() == darkest
    assert low < voxels.max() <= high
    label = path.parents[1] / path.parent.name.replace("images", "labels") / path.name.replace("_0000", "")
    if label.is_file():
        truth = sitk.ReadImage(str(label))
        assert truth.GetSize() == image.GetSize()
        assert np.allclose(truth.GetOrigin(), image.GetOrigin())
        values = sitk.GetArrayFromImage(truth)
        classes = json.loads((path.parents[1] / "dataset.json").read_text())["labels"]
        assert set(np.unique(values)) <= set(classes.values())
        medians = [np.median(voxels[values == classes[c]]) for c in BRIGHTNESS[task]]
        assert medians == sorted(set(medians)) and medians[0] > (-50 if task == "ct" else 0)


def test_share_of_csf_is_as_the_report_says():
    told = [int(percent) / 100 for percent in re.findall(r"(\d+) %", TASKS["brain"])]
    for part, share in zip(("Tr", "Ts"), told, strict=True):
        files = find_data(None).finetuning.glob(f"labels{part}/*.nii.gz")
        counts = sum(np.bincount(sitk.GetArrayFromImage(sitk.ReadImage(str(f))).ravel(), minlength=4) for f in files)
        assert counts[1] / counts[1:].sum() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("task", "ids", "people", "spacing"),
    [("brain", ("903", "904"), ("SRI24", "MNI09a"), 2.0), ("ct", ("901", "902"), ("A", "B"), 3.0)],
)
def test_held_out_patient_is_never_pretrained_on(task, ids, people, spacing):
    data = find_data(None, task)
    assert data.held_out and data.task == task
    assert (data.pretraining_id, data.finetuning_id) == ids
    assert not list(data.pretraining.glob("imagesTs/*")) and not list(data.pretraining.glob("labels*"))
    for part, person in zip(("Tr", "Ts"), people, strict=True):
        assert {p.name.split("_")[0] for p in (data.finetuning / f"images{part}").glob("*.nii.gz")} == {person}
    seen = {p.name.split("_")[0] for p in (data.pretraining / "imagesTr").iterdir()}
    assert len(seen) >= 4 and people[1] not in seen
    assert isotropic_spacing(data) == spacing


def test_unknown_task():
    with pytest.raises(UserError, match="unknown task 'liver', needed one of brain, ct"):
        find_data(None, "liver")


@pytest.fixture
def own_data(tmp_path):
    """Copies of embedded datasets, as a user's folder."""
    shutil.copytree(EMBEDDED_DATA / "ct", tmp_path / "own")
    return tmp_path / "own"


def test_data_of_the_user(own_data, tmp_path):
    shutil.rmtree(own_data / "Dataset902_DemoAbdomen" / "labelsTs")
    data = find_data(own_data)
    assert not data.held_out and data.task is None and data.encoder is None
    install(data, tmp_path / "raw")
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == [data.pretraining.name, data.finetuning.name]
    assert (tmp_path / "raw" / data.finetuning.name / "dataset.json").is_file()


def test_two_datasets_are_needed(own_data):
    shutil.rmtree(own_data / "Dataset902_DemoAbdomen" / "labelsTr")
    with pytest.raises(UserError, match="2 nnU-Net datasets without and 0 with labels"):
        find_data(own_data)


def test_too_few_cases_need_splits(own_data):
    (own_data / "Dataset902_DemoAbdomen" / "splits_final.json").unlink()
    with pytest.raises(UserError, match=r"3 labelled cases.*splits_final\.json"):
        find_data(own_data)


def test_unreadable_label(own_data):
    (own_data / "Dataset902_DemoAbdomen" / "labelsTr" / "A_z1.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"A_z1.*take the case out of imagesTr and labelsTr") as refusal:
        isotropic_spacing(find_data(own_data))
    assert "--" not in str(refusal.value)  # the demo has no option for it


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", r"JSON.* python -m json\.tool"),
        (b"\xff\xfe", r"JSON.* python -m json\.tool"),
        (b"[]", r"object, got \[\].* needed an object such as"),
        (b'{"channel_names": {"0": "CT"}}', 'no "file_ending"'),
        (b'{"file_ending": ".nii.gz"}', 'no "channel_names"'),
        (b'{"file_ending": ".nii.gz", "channel_names": {"0": "CT"}}', '"labels" of .* is {}'),
        (b'{"file_ending": ".nii.gz", "channel_names": ["CT"]}', "channel_names: .*object, got "),
        # nnU-Net v1 had it the other way round
        (
            b'{"file_ending": ".nii.gz", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}}',
            "labels.0.*integer, got 'background'",
        ),
        (b'{"file_ending": ".nii.gz", "modality": {"0": "CT"}, "labels": {"background": 0}}', "at least one more"),
        (None, "is no file; needed an object such as"),
    ],
)
def test_unusable_dataset_json(own_data, content, told):
    path = own_data / "Dataset902_DemoAbdomen" / "dataset.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told) as refusal:
        find_data(own_data)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("channels", "ct"),
    [
        ({"channel_names": {"0": "CT"}}, True),
        ({"channel_names": {"0": "ct", "1": "PET"}}, True),
        ({"modality": {"0": "Ct"}}, True),
        ({"modality": {"0": "MRI"}}, False),
        ({"channel_names": {"1": "CT"}}, False),
    ],
)
def test_first_channel_is_ct(own_data, channels, ct):
    path = own_data / "Dataset902_DemoAbdomen" / "dataset.json"
    content = json.loads(path.read_text())
    del content["channel_names"]
    path.write_text(json.dumps({**content, **channels}))
    assert find_data(own_data).first_channel_is_ct is ct
