"""A place to run console scripts in: nnU-Net's folders and its variables."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import forked
import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_data import Folders, make_folders, save_tiny_encoder

from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, with_discovery
from nnunetv2_hiendmae.planning import PlannedFinetuning, plan_finetuning

SHAPE = (24, 28, 24)
EPOCHS, WARMUP, LR = 3, 1, 1e-3
QUICK = {
    "epochs": EPOCHS,
    "warmup_epochs": WARMUP,
    "lr": LR,
    "iterations_per_epoch": 2,
    "val_iterations_per_epoch": 1,
    "batch_size": 2,
    "decoder_width": 4,
    "num_processes": 1,
}


@dataclass(frozen=True)
class Workplace:
    """nnU-Net's folders and the environment of its commands.

    Args:
        spawned: each command is a new process, as a user starts it; else a child of a server that has imported nnU-Net.
    """

    folders: Folders
    environment: dict[str, str]
    encoder_file: Path
    spawned: bool = False

    def run(self, script: str, *arguments: object, fails: bool = False) -> str:
        """What a console script said; it must succeed, or fail when `fails`."""
        start = forked.spawn if self.spawned else forked.Process
        return forked.run([script, *arguments], self.environment, start=start, fails=fails)

    def preprocess(self, planned: PlannedFinetuning) -> None:
        """The first of the printed commands, as it was printed, if it preprocesses: the arrays may be there already."""
        script, *arguments = planned.next_commands[0].split()
        if script == "nnUNetv2_preprocess":
            self.run(script, *arguments)

    def preprocess_as_printed(self, said: str) -> tuple[list[str], list[str]]:
        """Follows the lines that `hiendmae plan` printed up to training (it prints no preprocessing where the arrays
        are there); the words of those that train and predict."""
        *preprocess, train, predict = (line.split() for line in said.splitlines() if line.startswith("  nnUNetv2_"))
        for command in preprocess:
            self.run(*command)
        return train, predict

    def train_and_predict(
        self, dataset: str, train: list[str], predict: list[str], encoder: Path, output: Path
    ) -> tuple[str, np.ndarray]:
        """Follows these lines on one case, on the CPU; the encoder file is gone before prediction. What training said,
        and the segmentation (D, H, W) of the one test image."""
        splits = [{"train": ["case_000"], "val": ["case_001"]}]
        (self.folders.preprocessed / dataset / "splits_final.json").write_text(json.dumps(splits))
        said = self.run(*train, "-device", "cpu")
        # prediction needs no encoder file
        encoder.unlink()
        place = predict.index("-o")
        self.run(*predict[:place], "-o", output, "-device", "cpu", "--disable_tta", "-npp", 0, "-nps", 0)
        return said, self.read(output / "test_000.nii.gz")

    def train(self, planned: PlannedFinetuning, fold: object, *options: str) -> str:
        """The last but one of the printed commands, on the CPU, for any fold."""
        script, dataset, configuration, _, *rest = planned.next_commands[-2].split()
        return self.run(script, dataset, configuration, fold, *rest, "-device", "cpu", *options)

    def results(self, planned: PlannedFinetuning, fold: object) -> Path:
        """Folder of a trained fold."""
        model = f"{planned.trainer}__{planned.plans_name}__3d_fullres"
        return self.folders.results / planned.dataset_name / model / f"fold_{fold}"

    def predict(
        self, planned: PlannedFinetuning, output: Path, *folds: object, more: tuple[str, ...] = (), processes: int = 0
    ) -> np.ndarray:
        """Segmentation (D, H, W) of the one test image; `more` are further options, `processes` those of reading and
        of writing: each takes longer to start than to work."""
        images = self.folders.raw / planned.dataset_name / "imagesTs"
        model = ["-d", planned.dataset_id, "-c", "3d_fullres", "-p", planned.plans_name, "-tr", planned.trainer]
        options = ["-f", *folds, "-i", images, "-o", output, "-device", "cpu", "--disable_tta"]
        self.run("nnUNetv2_predict", *model, *options, "-npp", processes, "-nps", processes, *more)
        return self.read(output / "test_000.nii.gz")

    @staticmethod
    def read(image: Path) -> np.ndarray:
        """Voxels (D, H, W) of an image file."""
        return sitk.GetArrayFromImage(sitk.ReadImage(str(image)))


def make_workplace(root: Path) -> Workplace:
    folders = make_folders(root)
    # one thread: many small processes on few cores
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {
        **os.environ,
        **folders.environment,
        **threads,
        EXT_TRAINER_VARIABLE: with_discovery(None),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "MPLBACKEND": "agg",
    }
    return Workplace(folders, environment, save_tiny_encoder(root / "encoder.safetensors"))


def prepare(workplace: Workplace, name: str, **arguments: object) -> PlannedFinetuning:
    """Plans by our function, data by nnUNetv2_preprocess."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in workplace.environment.items():
            patch.setenv(variable, value)
        planned = plan_finetuning(name, workplace.encoder_file, **{**QUICK, **arguments})
    workplace.preprocess(planned)
    return planned
