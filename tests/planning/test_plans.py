"""Plans are nnU-Net's own, with our network, patch and window in them."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from nnunet_data import TINY, make_dataset, write_fingerprint
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.architectures.unetr import ViTUNETR
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning.dataset import read_raw_dataset
from nnunetv2_hiendmae.planning.plans import make_plans, save_plans
from nnunetv2_hiendmae.plans_section import FinetuneRecipe, PlansSection
from nnunetv2_hiendmae.volume_format import VolumeFormat

CT_WINDOW = VolumeFormat((1.5, 1.5, 1.5), (-175, 250))


def plan(name, volume=CT_WINDOW, plans_name="P", section=None, spec=TINY):
    raw = read_raw_dataset(name)
    return save_plans(make_plans(raw, plans_name, spec, volume, decoder_width=4, batch_size=3, section=section))


@pytest.fixture
def toy(nnunet):
    """A CT dataset of three cases with a fingerprint, no labels."""
    name = make_dataset(nnunet, 1, cases=3, with_labels=False, labels={"background": 0})
    write_fingerprint(nnunet, name)
    return name


def test_nnunet_reads_the_plans_and_builds_the_network(nnunet, toy, capsys):
    section = PlansSection("hiendmae", "/x", "0", FinetuneRecipe(epochs=7, warmup_epochs=1), ("@a{b}",))
    path = plan(toy, section=section)
    assert path == nnunet.preprocessed / toy / "P.json"
    manager = PlansManager(str(path))
    configuration = manager.get_configuration("3d_fullres")
    assert list(manager.available_configurations) == ["3d_fullres"]
    assert configuration.patch_size == [24, 24, 24] and configuration.batch_size == 3
    assert configuration.data_identifier.startswith("hiendmae_3d_fullres_")
    assert manager.transpose_forward == [0, 1, 2]
    assert manager.experiment_planner_class.__name__ == "ExperimentPlanner"
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        2,
        3,
        deep_supervision=False,
    )
    assert isinstance(network, ViTUNETR) and network.spec == TINY.with_(in_channels=2)
    assert PlansSection.from_dict(manager.plans["hiendmae"]) == section
    assert (nnunet.preprocessed / toy / "dataset.json").is_file()
    assert capsys.readouterr().out == ""


def test_without_section_there_is_no_key(toy):
    assert "hiendmae" not in json.loads(plan(toy).read_text())


def test_ct_becomes_exactly_the_clipped_window(nnunet, toy):
    path = plan(toy, VolumeFormat((1.5, 1.5, 1.5), (-175, 250)))
    manager = PlansManager(str(path))
    images = [str(nnunet.raw / toy / "imagesTr" / "case_000_0000.nii.gz")]
    data, _, _ = DefaultPreprocessor(verbose=False).run_case(
        images, None, manager, manager.get_configuration("3d_fullres"), str(nnunet.raw / toy / "dataset.json")
    )
    raw, _ = manager.image_reader_writer_class().read_images(images)
    expected = (np.clip(raw, -175, 250) + 175) / 425
    assert raw.min() < -175 and raw.max() > 250
    np.testing.assert_allclose(data, expected, atol=1e-6)
    assert data.min() == 0 and data.max() == 1


def test_other_channels_keep_nnunets_scheme(nnunet):
    name = make_dataset(nnunet, 1, cases=2, channels=("CT", "MR"))
    write_fingerprint(nnunet, name, channels=2, extra={"median_relative_size_after_cropping": 0.5})
    plans = json.loads(plan(name).read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert configuration["use_mask_for_norm"] == [False, True]
    properties = plans["foreground_intensity_properties_per_channel"]
    assert (properties["0"]["mean"], properties["0"]["std"]) == (-175, 425)
    assert (properties["1"]["mean"], properties["1"]["std"]) == (1, 3)


@pytest.mark.parametrize("mask", [False, True])
def test_z_scores_are_those_of_the_encoders_images(nnunet, caplog, mask):
    """Whatever nnU-Net's rule for empty borders says of the dataset; a channel with another scheme follows the rule."""
    caplog.set_level("INFO")
    name = make_dataset(nnunet, 1, cases=2, channels=("T1", "T2", "CT"))
    write_fingerprint(nnunet, name, channels=3, extra={"median_relative_size_after_cropping": 1.0 if mask else 0.5})
    seen = {"normalization_schemes": ("ZScoreNormalization",), "channel_names": ("T1",), "use_mask_for_norm": (mask,)}
    plans = json.loads(plan(name, replace(CT_WINDOW, **seen)).read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["use_mask_for_norm"] == [mask, mask, False]
    assert [r.message.partition(",")[0] for r in caplog.records if "z-scores" in r.message] == [
        f"z-scores are those of {'voxels that are not 0' if mask else 'all voxels'}"
    ]
    # what an encoder of these arrays will say that it saw
    assert VolumeFormat.of_plans(plans, configuration, {}).use_mask_for_norm == (mask, mask, False)


def test_none_is_nnunets_rule(nnunet):
    name = make_dataset(nnunet, 1, cases=2)
    write_fingerprint(nnunet, name, spacing=(3.0, 0.7, 0.8))
    plans = json.loads(plan(name, VolumeFormat(None, None)).read_text())
    # the axes stay as stored, unlike nnU-Net's own plans
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 0.7, 0.8]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == 1
    assert plans["image_reader_writer"] == "SimpleITKIO"


def test_reader_is_written(toy):
    volume = VolumeFormat((1.5, 1.5, 1.5), None, "NibabelIOWithReorient")
    assert json.loads(plan(toy, volume).read_text())["image_reader_writer"] == "NibabelIOWithReorient"
    with pytest.raises(UserError, match="reader 'Nonsense'"):
        plan(toy, VolumeFormat(None, None, "Nonsense"))


def test_large_images_get_no_lowres_configuration(nnunet):
    name = make_dataset(nnunet, 1, cases=2)
    write_fingerprint(nnunet, name, shape=(400, 512, 512))
    assert set(json.loads(plan(name).read_text())["configurations"]) == {"3d_fullres"}


def test_2d_is_refused(nnunet):
    name = make_dataset(nnunet, 1, cases=2)
    write_fingerprint(nnunet, name, shape=(1, 64, 64), spacing=(999.0, 1.0, 1.0))
    with pytest.raises(UserError, match=rf"{name} .*\[1, 64, 64\]"):
        plan(name)


def test_missing_fingerprint_names_the_command(nnunet):
    name = make_dataset(nnunet, 1, cases=1)
    with pytest.raises(UserError, match="nnUNetv2_extract_fingerprint -d 1"):
        plan(name)


def test_foreign_plans_are_never_overwritten(nnunet, toy):
    path = nnunet.preprocessed / toy / "nnUNetPlans.json"
    foreign = {"configurations": {"3d_fullres": {"architecture": {"network_class_name": "a.PlainConvUNet"}}}}
    path.write_text(json.dumps(foreign))
    with pytest.raises(UserError, match=r"nnUNetPlans\.json .*--name"):
        plan(toy, plans_name="nnUNetPlans")
    assert json.loads(path.read_text()) == foreign


@pytest.mark.parametrize("plans_name", ["a__b", "a/b", "", "../P"])
def test_unusable_names_are_refused(toy, plans_name):
    with pytest.raises(UserError, match=f"'{plans_name}'.*--name"):
        plan(toy, plans_name=plans_name)


def test_stale_data_is_told(nnunet, toy, caplog):
    plan(toy)
    (nnunet.preprocessed / toy / "P_3d_fullres").mkdir()
    with caplog.at_level(logging.WARNING):
        plan(toy, section=PlansSection(recipe=FinetuneRecipe(lr=1)))
        assert not caplog.records
        plan(toy, VolumeFormat((1.5, 1.5, 1.5), (-100, 250)))
    assert "nnUNetv2_preprocess -d 1 -plans_name P -c 3d_fullres" in caplog.text


def test_splits_of_raw_are_copied_and_must_agree(nnunet, toy):
    splits = [{"train": ["case_000", "case_001"], "val": ["case_002"]}]
    (nnunet.raw / toy / "splits_final.json").write_text(json.dumps(splits))
    plan(toy)
    copied = nnunet.preprocessed / toy / "splits_final.json"
    assert json.loads(copied.read_text()) == splits
    copied.write_text(json.dumps([{"train": ["case_002"], "val": ["case_000"]}]))
    with pytest.raises(UserError, match=r"nnUNet_raw/.*splits_final\.json.*nnUNet_preprocessed/.*splits_final\.json"):
        plan(toy)


@pytest.mark.parametrize("spacing, window", [((1, 1), None), ((1, 1, 0), None), (None, (5, 5)), (None, (1,))])
def test_volume_settings_are_validated(spacing, window):
    with pytest.raises(ValueError):
        VolumeFormat(spacing, window)
