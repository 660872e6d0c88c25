"""From each of the authors' checkpoint formats to a stock nnU-Net prediction, through the commands alone."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from fixtures_util import Fixture
from nnunet_data import LESION, ORGAN, make_dataset
from workplace import make_workplace

from nnunetv2_hiendmae import cli

pytestmark = pytest.mark.slow

SHAPE = (32, 34, 30)


@dataclass(frozen=True)
class Released:
    """A recorded checkpoint, the heads that its tensors cannot tell, and what must come of it."""

    fixture: str
    heads: int
    crop: tuple[int, int, int]
    trainer: str
    window_hu: tuple[float, float] | None
    spacing_mm: float


RELEASED = {
    "hiendmae": Released("hiendmae_finetune", 3, (24, 24, 24), "nnUNetTrainer_HiEndMAE", (-175, 250), 1.5),
    "mim": Released("mim_finetune_interp", 3, (32, 32, 64), "nnUNetTrainer_MiM", (-1000, 1000), 2.0),
    "glmae": Released("glmae_unetr", 3, (32, 32, 32), "nnUNetTrainer_GLMAE", (-1000, 1000), 2.0),
    "mae3d": Released("mae3d_pretrain", 4, (32, 32, 32), "nnUNetTrainer_MAE3D", None, 2.0),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    workplace = make_workplace(tmp_path_factory.mktemp("released") / "nnunet")
    make_dataset(workplace.folders, 1, cases=2, shape=SHAPE, spacing=(2.0, 2.0, 2.0))
    return workplace


@pytest.mark.parametrize("method", RELEASED)
def test_from_checkpoint_to_prediction(workplace, tmp_path, monkeypatch, capsys, method):
    for variable, value in workplace.environment.items():
        monkeypatch.setenv(variable, value)
    released = RELEASED[method]
    checkpoint = Fixture(released.fixture).write_checkpoint(tmp_path / "released.pth")
    encoder = tmp_path / "encoder.safetensors"

    def hiendmae(*arguments: object) -> str:
        assert cli.main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    said = hiendmae("convert", checkpoint, "-o", encoder, "--num-heads", released.heads)
    assert int(said.split(" loaded")[0].split()[-1]) > 20 and "the decoder is not used" in said
    planning = ["plan", "-d", 1, "-w", encoder, "--epochs", 1, "--iterations-per-epoch", 1, "-np", 1]
    planning += ["--val-iterations-per-epoch", 1, "--batch-size", 2, "--decoder-width", 4]
    said = hiendmae(*planning, "--patch-size", *released.crop)
    train, predict = workplace.preprocess_as_printed(said)
    plans_name = train[train.index("-p") + 1]
    assert train[train.index("-tr") + 1] == released.trainer

    folder = workplace.folders.preprocessed / "Dataset001_Toy"
    plans = json.loads((folder / f"{plans_name}.json").read_text())
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    if released.window_hu is not None:
        assert (properties["mean"], properties["mean"] + properties["std"]) == released.window_hu
        assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [released.spacing_mm] * 3

    trained = workplace.train_and_predict("Dataset001_Toy", train, predict, encoder, tmp_path / "predicted")
    said, segmentation = trained
    assert f"Encoder weights from {encoder}" in said and said.count("Please cite:\n") == 1
    assert segmentation.shape == SHAPE and set(np.unique(segmentation)) <= {0, ORGAN, LESION}
