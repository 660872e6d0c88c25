"""From files as OpenMind and nnFoundation release them to a stock nnU-Net prediction, through the commands alone."""

import json

import numpy as np
import pytest
from nnunet_data import LESION, ORGAN, make_dataset
from primus_util import PrimusFixture
from workplace import make_workplace

from nnunetv2_hiendmae import cli

pytestmark = pytest.mark.slow

# small, as OpenMind's plans double it: 80 windows
SHAPE = (18, 20, 22)
# fixture, checkpoint, what has to be said of it, network, spacing of the plans: the file's, or the dataset's
FILES = {
    "openmind": ("nnssl_evamae", "checkpoint.pth", ["--num-heads", 3], "unetr", 1.0),
    "nnfoundation": ("nnfoundation_vit", "checkpoint_large.pth", [], "primus", 2.0),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    workplace = make_workplace(tmp_path_factory.mktemp("primus") / "nnunet")
    make_dataset(workplace.folders, 1, cases=2, shape=SHAPE, spacing=(2.0, 2.0, 2.0))
    return workplace


@pytest.mark.parametrize("name", FILES)
def test_from_checkpoint_to_prediction(workplace, tmp_path, monkeypatch, capsys, name):
    for variable, value in workplace.environment.items():
        monkeypatch.setenv(variable, value)
    fixture, file, hints, network, spacing = FILES[name]
    checkpoint = PrimusFixture(fixture).write(tmp_path / "released.pth", file)
    encoder = tmp_path / "encoder.safetensors"

    def hiendmae(*arguments: object) -> str:
        assert cli.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    said = hiendmae("convert", checkpoint, "-o", encoder, *hints)
    assert "note: token order " in said and "CC-BY-" in said
    planning = ["plan", "-d", 1, "-w", encoder, "--epochs", 1, "--iterations-per-epoch", 1, "-np", 1]
    planning += ["--val-iterations-per-epoch", 1, "--batch-size", 2, "--patch-size", 16, 16, 16, "--network", network]
    planning += ["--decoder-width", 4] if network == "unetr" else []
    said = hiendmae(*planning)
    assert "ZScoreNormalization whatever the channel" in said
    train, predict = workplace.preprocess_as_printed(said)
    plans_name = train[train.index("-p") + 1]
    assert train[train.index("-tr") + 1] == "nnUNetTrainer_Pretrained"

    folder = workplace.folders.preprocessed / "Dataset001_Toy"
    plans = json.loads((folder / f"{plans_name}.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["spacing"] == [spacing] * 3 and plans["image_reader_writer"] == "SimpleITKIO"

    trained = workplace.train_and_predict("Dataset001_Toy", train, predict, encoder, tmp_path / "predicted")
    said, segmentation = trained
    assert f"Encoder weights from {encoder}" in said and said.count("Please cite:\n") == 3
    assert segmentation.shape == SHAPE and set(np.unique(segmentation)) <= {0, ORGAN, LESION}
    # the fine-tuned encoder comes out of nnU-Net's own checkpoint
    checkpoint = next(workplace.folders.results.rglob(f"*{plans_name}__*/fold_*/checkpoint_final.pth"))
    said = hiendmae("convert", checkpoint, "-o", tmp_path / "finetuned.safetensors")
    assert "kind=primus" in said and "nnUNetTrainer_Pretrained trained on" in said


def test_pretraining_goes_on_from_openminds_weights(workplace, tmp_path, monkeypatch, capsys):
    """On images as the file saw them: spacing and z-score from it, CT too."""
    for variable, value in workplace.environment.items():
        monkeypatch.setenv(variable, value)
    checkpoint = PrimusFixture("nnssl_evamae").write(tmp_path / "released.pth")
    encoder = tmp_path / "encoder.safetensors"
    for arguments in (
        ["convert", checkpoint, "-o", encoder, "--num-heads", 3],
        ["preprocess", "-d", 1, "-p", "LikeOpenMind", "--like", encoder, "-np", 1],
        [
            *["pretrain", "-d", 1, "-p", "LikeOpenMind", "--method", "mae3d", "-w", encoder, "-o", tmp_path / "run"],
            *["--crop-size", 16, 16, 16, "--epochs", 1, "--steps-per-epoch", 1, "--batch-size", 1, "--workers", 0],
            *["--set", "decoder_dim=12", "decoder_depth=1", "decoder_heads=2", "-device", "cpu"],
        ],
        ["convert", tmp_path / "run" / "encoder.safetensors", "-o", tmp_path / "n.pth", "--to", "nnssl"],
    ):
        assert cli.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    plans = json.loads((workplace.folders.preprocessed / "Dataset001_Toy" / "LikeOpenMind.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"] and configuration["spacing"] == [1, 1, 1]
