"""Pretraining on what stock nnUNetv2_plan_and_preprocess left on disk, with nnU-Net's own plans."""

import json
import os

import forked
import pytest
from nnunet_data import make_dataset
from run_data import TINY_OPTIONS

from nnunetv2_hiendmae import cli, load_encoder
from nnunetv2_hiendmae.environment import dataset_name

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("channels", [("CT",), ("CT", "MR")])
def test_from_stock_plans_to_fine_tuning_plans(nnunet, tmp_path, capsys, channels):
    name = make_dataset(nnunet, 1, cases=3, channels=channels)
    once = ("-np", "1", "-npfp", "1", "-c", "3d_fullres", "2d")
    environment = {**os.environ, **nnunet.environment, "nnUNet_n_proc_DA": "1"}
    forked.run(["nnUNetv2_plan_and_preprocess", "-d", "1", *once], environment)
    stock = json.loads((nnunet.preprocessed / name / "nnUNetPlans.json").read_text())
    options = [f"{k}={v}" for k, v in TINY_OPTIONS["hiendmae"].items()]
    pretrain = ["pretrain", "-d", "1", "-p", "nnUNetPlans", "--encoder", "vit_nano_p8", "--crop-size", *["24"] * 3]
    budget = ["--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "2", "--workers", "0", "-device", "cpu"]
    run = [*pretrain, *budget, "-o", str(tmp_path / "run"), "--set", *options]

    assert cli.main([*run, "-c", "2d"]) == 2
    assert "is 2D" in capsys.readouterr().err
    assert cli.main(run) == 0

    _, metadata = load_encoder(tmp_path / "run" / "encoder.safetensors")
    statistics = stock["foreground_intensity_properties_per_channel"]["0"]
    assert metadata.spec.in_channels == len(channels) and metadata.volume.channel_names == channels
    assert metadata.volume.window_hu == (statistics["percentile_00_5"], statistics["percentile_99_5"])
    assert (metadata.volume.intensity_offset, metadata.volume.intensity_scale) == (
        statistics["mean"],
        statistics["std"],
    )
    assert list(metadata.volume.spacing_mm) == stock["configurations"]["3d_fullres"]["spacing"]

    # fine-tuning shows the encoder what pretraining showed it
    assert cli.main(["plan", "-d", "1", "-w", str(tmp_path / "run" / "encoder.safetensors"), "-np", "1"]) == 0
    ours = json.loads((nnunet.preprocessed / dataset_name(1) / "nnUNetPlans_HiEndMAE.json").read_text())
    for key in ("mean", "std", "percentile_00_5", "percentile_99_5"):
        assert ours["foreground_intensity_properties_per_channel"]["0"][key] == pytest.approx(statistics[key])
    schemes = [p["configurations"]["3d_fullres"]["normalization_schemes"] for p in (stock, ours)]
    assert schemes[0] == schemes[1]
    assert "nnUNetTrainer_HiEndMAE" in capsys.readouterr().out
