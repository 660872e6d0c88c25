"""Plans for encoders that other programs pretrained, and for Primus' own network."""

import pytest
import torch
from nnunet_data import make_dataset, save_tiny_encoder, write_fingerprint
from primus_util import FULL_PRIMUS
from test_finetune import read

from nnunetv2_hiendmae import trainers
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning import plan_finetuning

# a program that z-scores every image, whatever its channel is called
ALIKE = {"method": "nnssl", "window_hu": None, "normalization_schemes": ("ZScoreNormalization",), "channel_names": ()}


@pytest.fixture
def toy(nnunet):
    name = make_dataset(nnunet, 1, cases=3)
    write_fingerprint(nnunet, name)
    return name


def encoder_file(tmp_path, **about):
    return save_tiny_encoder(tmp_path / "e.safetensors", **{"spec": FULL_PRIMUS, **ALIKE, **about})


def test_weights_of_another_method_get_a_trainer_that_says_so(nnunet, toy, tmp_path):
    planned = plan_finetuning(toy, encoder_file(tmp_path))
    plans, configuration, section = read(planned)
    assert planned.trainer == "nnUNetTrainer_Pretrained" and planned.plans_name == "nnUNetPlans_Pretrained"
    assert section.method == "nnssl" and configuration["batch_size"] == 2
    assert any("our recipe for weights of other programs" in line for line in planned.messages)
    trainer = trainers.nnUNetTrainer_Pretrained
    assert trainer._read_section(plans).method == "nnssl"
    plans["hiendmae"]["method"] = "mae3d"
    with pytest.raises(RuntimeError, match=r"'mae3d', nnUNetTrainer_Pretrained is for weights of other.*MAE3D"):
        trainer._read_section(plans)
    plans["hiendmae"]["method"] = "nnssl"
    with pytest.raises(RuntimeError, match=r"'nnssl', nnUNetTrainer_MAE3D .*-tr nnUNetTrainer_Pretrained"):
        trainers.nnUNetTrainer_MAE3D._read_section(plans)
    plans["hiendmae"] = {}
    with pytest.raises(RuntimeError, match="training from scratch"):
        trainer._read_section(plans)


def test_ct_is_normalised_as_the_program_did(nnunet, toy, tmp_path, caplog):
    planned = plan_finetuning(toy, encoder_file(tmp_path))
    _, configuration, _ = read(planned)
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["use_mask_for_norm"] == [False]
    assert any("ZScoreNormalization whatever the channel, CT too" in line for line in planned.messages)
    assert "normalised otherwise" not in caplog.text
    _, configuration, _ = read(plan_finetuning(toy, encoder_file(tmp_path), window_hu=(-100, 300)))
    assert configuration["normalization_schemes"] == ["CTNormalization"]


def test_an_mr_encoder_of_ours_says_nothing_about_ct(nnunet, toy, tmp_path, caplog):
    file = encoder_file(tmp_path, method="mae3d", channel_names=("MR",))
    assert read(plan_finetuning(toy, file))[1]["normalization_schemes"] == ["CTNormalization"]
    assert "normalised otherwise" in caplog.text


def test_the_network_of_primus_by_an_option(nnunet, toy, tmp_path):
    planned = plan_finetuning(toy, encoder_file(tmp_path), network="primus")
    _, configuration, _ = read(planned)
    assert planned.plans_name == "nnUNetPlans_Pretrained_primus"
    name = "nnunetv2_hiendmae.architectures.primus_network.PrimusNetwork"
    assert configuration["architecture"]["network_class_name"] == name
    assert "decoder_width" not in configuration["architecture"]["arch_kwargs"]
    assert any("network primus" in line for line in planned.messages)
    assert not any("decoder width" in line for line in planned.messages)
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network = get_network_from_plans(**arguments(configuration), input_channels=1, output_channels=3)
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    stock = read(plan_finetuning(toy, encoder_file(tmp_path), network="unetr"))[1]
    assert stock["architecture"]["network_class_name"].endswith("ViTUNETR")


def arguments(configuration):
    architecture = configuration["architecture"]
    return {
        "arch_class_name": architecture["network_class_name"],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_req_import": architecture["_kw_requires_import"],
        "deep_supervision": False,
    }


def test_networks_that_do_not_fit_are_refused(nnunet, toy, tmp_path):
    file = encoder_file(tmp_path)
    with pytest.raises(UserError, match=r"--network primus .*'vit', needed unetr;"):
        plan_finetuning(toy, save_tiny_encoder(tmp_path / "v.safetensors"), network="primus")
    with pytest.raises(UserError, match=r"--decoder-width 8: the network 'primus' has none"):
        plan_finetuning(toy, file, network="primus", decoder_width=8)
    odd = FULL_PRIMUS.with_(img_size=(24, 16, 16), patch_size=(12, 8, 8))
    with pytest.raises(UserError, match="powers of two"):
        plan_finetuning(toy, encoder_file(tmp_path, spec=odd), network="primus")
    with pytest.raises(UserError, match="--network is other, needed one of unetr, primus"):
        plan_finetuning(toy, file, network="other")
