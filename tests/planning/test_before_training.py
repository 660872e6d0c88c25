"""What nnU-Net would only notice in training, or never: `hiendmae plan` says it before work."""

import json

import pytest
import SimpleITK as sitk
from nnunet_data import make_dataset, save_tiny_encoder, write_fingerprint

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning import finetune
from nnunetv2_hiendmae.planning.dataset import read_raw_dataset
from nnunetv2_hiendmae.planning.finetune import plan_finetuning

WHOLE_FIRST = {"background": 0, "whole": [1, 2], "lesion": [2]}


@pytest.fixture
def encoder_file(tmp_path):
    return save_tiny_encoder(tmp_path / "encoder.safetensors")


@pytest.fixture
def planned(nnunet, encoder_file):
    """planned(**how the dataset is made) → name, with a fingerprint of stock nnU-Net's."""

    def make(**arguments):
        name = make_dataset(nnunet, 1, cases=5, **arguments)
        write_fingerprint(nnunet, name, channels=len(arguments.get("channels", ("CT",))))
        return name

    return make


@pytest.mark.parametrize(
    ("labels", "order", "told"),
    [
        (WHOLE_FIRST, None, r'the regions whole, lesion need as many numbers in "regions_class_order", got none'),
        (WHOLE_FIRST, [1], r"got \[1\]"),
        # as files whose keys were sorted have it
        (
            {"background": 0, "lesion": [2], "whole": [1, 2]},
            [1, 2],
            r"gives 1 to the region lesion, which is \[2\].*the region whole stands behind lesion",
        ),
        ({"background": 0, "ignore": 1, "organ": 2}, None, r'"ignore" is 1, and must be the highest'),
        ({"background": 0, "organ": 1, "ignore": "2"}, None, r'"ignore" is "2", and must be .*, the number 2'),
        ({"organ": 0, "lesion": [1, 2]}, [1], r'"background" must be among the labels'),
    ],
)
def test_labels_that_nnunet_refuses_or_predicts_wrongly(
    nnunet, planned, encoder_file, monkeypatch, labels, order, told
):
    name = planned(labels=labels, extra_json={} if order is None else {"regions_class_order": order})
    monkeypatch.setattr(finetune, "check_label_files", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=told):
        plan_finetuning(name, encoder_file)
    assert not list((nnunet.preprocessed / name).glob("nnUNetPlans*"))


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (WHOLE_FIRST, [1, 2]),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tumour": 2, "ignore": 4}, [1, 3, 2]),
        ({"background": 0, "left": [1, 2], "right": [2, 3]}, [1, 3]),
        ({"background": 0, "organ": "1", "lesion": [2]}, None),
    ],
)
def test_labels_that_nnunet_takes(planned, encoder_file, labels, order):
    plan_finetuning(planned(labels=labels, extra_json={"regions_class_order": order} if order else {}), encoder_file)


def test_a_case_that_lacks_a_channel_is_named(nnunet, planned, encoder_file):
    name = planned(channels=("CT", "MR"))
    (nnunet.raw / name / "imagesTr" / "case_003_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"than its 2 channels: case_003 \(1\); add .*CASE_0000.nii.gz and CASE_0001"):
        plan_finetuning(name, encoder_file)


@pytest.mark.parametrize("names", [{"CT": "0"}, {"1": "MR", "0": "CT"}, {"1": "CT"}])
def test_channels_whose_numbers_nnunet_does_not_look_at(nnunet, planned, names):
    name = planned(channels=tuple(map(str, range(len(names)))), extra_json={"channel_names": names})
    with pytest.raises(UserError, match=r'names the channels .*"0" of the files that end in _0000'):
        read_raw_dataset(name)


def test_channels_may_be_numbered_as_files_are(planned, encoder_file):
    name = planned(extra_json={"channel_names": {"0000": "CT"}})
    assert read_raw_dataset(name).channels == ("CT",)
    plan_finetuning(name, encoder_file)


def test_labels_that_lie_elsewhere_than_their_images(nnunet, planned, encoder_file, caplog):
    name = planned()
    plan_finetuning(name, encoder_file)
    assert "lie elsewhere" not in caplog.text
    for case, origin, direction in ((1, (7, 0, 0), (1, 1)), (2, (0.01, 0, 0), (1, 1)), (3, (0, 0, 0), (-1, -1))):
        path = str(nnunet.raw / name / "labelsTr" / f"case_{case:03d}.nii.gz")
        label = sitk.ReadImage(path)
        label.SetOrigin(origin)
        label.SetDirection((direction[0], 0, 0, 0, direction[1], 0, 0, 0, 1))
        sitk.WriteImage(label, path)
    plan_finetuning(name, encoder_file)
    assert f"2 labels of {name} lie elsewhere than their images: case_001 (up to 7 mm away), case_003 (" in caplog.text


def test_splits_that_do_not_fit(nnunet, planned, encoder_file, caplog):
    name = planned()
    splits = [
        {"train": ["case_000", "gone"], "val": ["case_001"]},
        {"train": ["case_000", "case_002"], "val": ["case_002"]},
    ]
    (nnunet.raw / name / "splits_final.json").write_text(json.dumps(splits))
    plan_finetuning(name, encoder_file)
    assert f"fold 0 in {nnunet.preprocessed / name}" in caplog.text and f"that {name} lacks: gone" in caplog.text
    assert "trains on its validation cases: case_002" in caplog.text
