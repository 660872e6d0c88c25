"""The embedded volumes, and finding the two datasets of a demo."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.demo.datasets import EMBEDDED_DATA, find_data, install, isotropic_spacing
from nnunetv2_hiendmae.errors import UserError

IMAGES = sorted(EMBEDDED_DATA.glob("*/images*/*.nii.gz"))


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.name)
def test_embedded_image(path):
    image = sitk.ReadImage(str(path))
    assert image.GetPixelID() == sitk.sitkInt16
    assert min(image.GetSpacing()) >= 2.9
    voxels = sitk.GetArrayFromImage(image)
    assert voxels.min() == -1024  # air
    assert 300 < voxels.max() <= 2047  # bone
    label = path.parents[1] / path.parent.name.replace("images", "labels") / path.name.replace("_0000", "")
    if label.is_file():
        truth = sitk.ReadImage(str(label))
        assert truth.GetSize() == image.GetSize()
        assert np.allclose(truth.GetOrigin(), image.GetOrigin())
        values = sitk.GetArrayFromImage(truth)
        classes = json.loads((path.parents[1] / "dataset.json").read_text())["labels"]
        assert set(np.unique(values)) <= set(classes.values())
        # labels lie on the organs: vertebrae are denser than muscle, and both are no air
        bone, muscle = (np.median(voxels[values == classes[c]]) for c in ("vertebrae", "back_muscle"))
        assert bone > muscle > -50


def test_held_out_patient_is_never_pretrained_on():
    data = find_data(None)
    assert data.held_out and data.embedded
    assert (data.pretraining_id, data.finetuning_id) == ("901", "902")
    assert not list(data.pretraining.glob("imagesTs/*")) and not list(data.pretraining.glob("labels*"))
    train = {p.name[0] for p in (data.finetuning / "imagesTr").glob("*.nii.gz")}
    test = {p.name[0] for p in (data.finetuning / "imagesTs").glob("*.nii.gz")}
    assert (train, test) == ({"A"}, {"B"})
    assert isotropic_spacing(data) == 3.0


@pytest.fixture
def own_data(tmp_path):
    """Copies of the embedded datasets, as a user's folder."""
    shutil.copytree(EMBEDDED_DATA, tmp_path / "own")
    return tmp_path / "own"


def test_data_of_the_user(own_data, tmp_path):
    shutil.rmtree(own_data / "Dataset902_DemoAbdomen" / "labelsTs")
    data = find_data(own_data)
    assert not data.held_out and not data.embedded
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
