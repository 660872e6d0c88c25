"""From each of the released checkpoint formats to a stock nnU-Net prediction, through the commands alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fixtures_util import Fixture
from nnunet_data import LESION, ORGAN, make_dataset
from primus_util import PrimusFixture
from workplace import make_workplace

from nnunetv2_hiendmae import cli

pytestmark = pytest.mark.slow

# small, as OpenMind's plans double it: 80 windows
SHAPE = (18, 20, 22)


@dataclass(frozen=True)
class Released:
    """A recorded checkpoint, the heads that its tensors cannot tell, how it is planned, and what must come of it.

    Args:
        file: of a Primus; its network and `trainer` are then not those of a method of ours.
        spacing_mm: the file's, or the dataset's.
    """

    fixture: str
    heads: int | None
    crop: tuple[int, int, int]
    trainer: str
    spacing_mm: float
    window_hu: tuple[float, float] | None = None
    reader: str = "SimpleITKIO"
    network: str = "unetr"
    file: str = ""

    def write(self, path: Path) -> Path:
        if self.file:
            return PrimusFixture(self.fixture).write(path, self.file)
        return Fixture(self.fixture).write_checkpoint(path)


CT = {"window_hu": (-1000, 1000), "reader": "NibabelIOWithReorient"}
FOREIGN = ((16, 16, 16), "nnUNetTrainer_Pretrained")
RELEASED = {
    "hiendmae": Released(
        "hiendmae_finetune", 3, (24, 24, 24), "nnUNetTrainer_HiEndMAE", 1.5, **{**CT, "window_hu": (-175, 250)}
    ),
    "mim": Released("mim_finetune_interp", 3, (32, 32, 64), "nnUNetTrainer_MiM", 2.0, **CT),
    "glmae": Released("glmae_unetr", 3, (32, 32, 32), "nnUNetTrainer_GLMAE", 2.0, **CT),
    "mae3d": Released("mae3d_pretrain", 4, (32, 32, 32), "nnUNetTrainer_MAE3D", 2.0),
    "openmind": Released("nnssl_evamae", 3, *FOREIGN, 1.0, file="checkpoint.pth"),
    "nnfoundation": Released("nnfoundation_vit", None, *FOREIGN, 2.0, network="primus", file="checkpoint_large.pth"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    workplace = make_workplace(tmp_path_factory.mktemp("released") / "nnunet")
    make_dataset(workplace.folders, 1, cases=2, shape=SHAPE, spacing=(2.0, 2.0, 2.0))
    return workplace


@pytest.fixture
def hiendmae(workplace, monkeypatch, capsys):
    """Runs a command, which must succeed; what it said."""
    for variable, value in workplace.environment.items():
        monkeypatch.setenv(variable, value)

    def run(*arguments: object) -> str:
        assert cli.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", RELEASED)
def test_from_checkpoint_to_prediction(workplace, hiendmae, tmp_path, name):
    released, encoder = RELEASED[name], tmp_path / "encoder.safetensors"
    checkpoint = released.write(tmp_path / "released.pth")
    said = hiendmae("convert", checkpoint, "-o", encoder, *(["--num-heads", released.heads] if released.heads else []))
    assert int(said.split(" loaded")[0].split()[-1]) > 20
    told = ("note: token order ", "CC-BY-") if released.file else ("the decoder is not used",)
    assert all(words in said for words in told)
    planning = ["plan", "-d", 1, "-w", encoder, "--epochs", 1, "--iterations-per-epoch", 1, "-np", 1]
    planning += ["--val-iterations-per-epoch", 1, "--batch-size", 2, "--network", released.network]
    planning += ["--decoder-width", 4] if released.network == "unetr" else []
    said = hiendmae(*planning, "--patch-size", *released.crop)
    assert ("ZScoreNormalization whatever the channel" in said) == bool(released.file)
    train, predict = workplace.preprocess_as_printed(said)
    plans_name = train[train.index("-p") + 1]
    assert train[train.index("-tr") + 1] == released.trainer

    folder = workplace.folders.preprocessed / "Dataset001_Toy"
    plans = json.loads((folder / f"{plans_name}.json").read_text())
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    if released.window_hu is not None:
        assert (properties["mean"], properties["mean"] + properties["std"]) == released.window_hu
    configuration = plans["configurations"]["3d_fullres"]
    scheme = "ZScoreNormalization" if released.file else "CTNormalization"
    assert configuration["normalization_schemes"] == [scheme]
    assert configuration["spacing"] == [released.spacing_mm] * 3 and plans["image_reader_writer"] == released.reader

    trained = workplace.train_and_predict("Dataset001_Toy", train, predict, encoder, tmp_path / "predicted")
    said, segmentation = trained
    assert f"Encoder weights from {encoder}" in said and said.count("Please cite:\n") == (3 if released.file else 1)
    assert segmentation.shape == SHAPE and set(np.unique(segmentation)) <= {0, ORGAN, LESION}
    # the fine-tuned encoder comes out of nnU-Net's own checkpoint
    checkpoint = next(workplace.folders.results.rglob(f"*{plans_name}__*/fold_*/checkpoint_final.pth"))
    said = hiendmae("convert", checkpoint, "-o", tmp_path / "finetuned.safetensors")
    assert f"{released.trainer} trained on" in said and ("kind=primus" in said) == bool(released.file)


def test_pretraining_goes_on_from_openminds_weights(workplace, hiendmae, tmp_path):
    """On images as the file saw them: spacing and z-score from it, CT too."""
    checkpoint = PrimusFixture("nnssl_evamae").write(tmp_path / "released.pth")
    encoder = tmp_path / "encoder.safetensors"
    hiendmae("convert", checkpoint, "-o", encoder, "--num-heads", 3)
    hiendmae("preprocess", "-d", 1, "-p", "LikeOpenMind", "--like", encoder, "-np", 1)
    hiendmae(
        *["pretrain", "-d", 1, "-p", "LikeOpenMind", "--method", "mae3d", "-w", encoder, "-o", tmp_path / "run"],
        *["--crop-size", 16, 16, 16, "--epochs", 1, "--steps-per-epoch", 1, "--batch-size", 1, "--workers", 0],
        *["--set", "decoder_dim=12", "decoder_depth=1", "decoder_heads=2", "-device", "cpu"],
    )
    hiendmae("convert", tmp_path / "run" / "encoder.safetensors", "-o", tmp_path / "n.pth", "--to", "nnssl")
    plans = json.loads((workplace.folders.preprocessed / "Dataset001_Toy" / "LikeOpenMind.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"] and configuration["spacing"] == [1, 1, 1]
