"""The end-to-end run: two commands of ours, three of nnU-Net's, and what came of them."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.demo import report, results
from nnunetv2_hiendmae.demo.datasets import DemoData, find_data, install, isotropic_spacing
from nnunetv2_hiendmae.demo.process import Runner
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, NNUNET_VARIABLES, with_discovery
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.plans_section import TRAINERS

logger = logging.getLogger(__name__)

SETTINGS_FILE = "demo.json"
RESULTS_FILE = "results.json"
PRETRAINING_PLANS = "DemoPretrainingPlans"
CONFIGURATION = "3d_fullres"
FOLD = 0
# what a run writes besides pictures and reports; removed when an interrupted run starts anew
WORK_FOLDERS = (*NNUNET_VARIABLES, "pretraining", "predictions", "logs")


@dataclass(frozen=True)
class Budget:
    """How much is computed; the defaults fit a laptop.

    Args:
        spacing_mm: voxel spacing (D, H, W); None: isotropic, about 128 voxels along a volume's longest axis.
        pretrain_lr, finetune_lr: peak learning rates, high because network, batches and runs are small.

    Raises:
        UserError: a number is not positive.
    """

    encoder: str = "vit_nano_p8"
    pretrain_epochs: int = 25
    steps_per_epoch: int = 40
    pretrain_batch_size: int = 8
    pretrain_lr: float = 1e-3
    finetune_epochs: int = 25
    iterations_per_epoch: int = 10
    finetune_batch_size: int = 2
    finetune_lr: float = 1e-3
    decoder_width: int = 16
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self):
        # now, and not when the command is reached after minutes
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"{name} is {value}, needed more than 0; see: hiendmae demo --help")


@dataclass(frozen=True)
class Run:
    """One of the two fine-tunings.

    Args:
        arguments: further ones for `hiendmae plan`.
    """

    name: str
    plans: str
    trainer: str
    arguments: tuple[str, ...] = ()


def run_demo(
    output: Path,
    *,
    data: Path | None = None,
    method: str = "hiendmae",
    seed: int = 0,
    num_processes: int = 2,
    device: str = "cpu",
    say: Callable[[str], None] = logger.info,
    **budget: Any,
) -> dict[str, Any]:
    """Pretrains, fine-tunes with and without the pretrained encoder, predicts, and compares.

    Everything is written under `output`: `report.md`, `results.json`, pictures, logs, the encoder and nnU-Net's three
    folders. A run that was interrupted starts anew.

    Args:
        output: folder that is new, empty, or left by an unfinished run.
        data: folder with two nnU-Net datasets, one without labels (pretraining) and one with (fine-tuning, whose
            imagesTs and labelsTs are held out if there are any); None: the embedded volumes.
        method: pretraining method.
        seed: of pretraining and of both fine-tunings.
        num_processes: for reading, preprocessing and the pretraining loader.
        device: "cpu" or "cuda", as in nnU-Net.
        say: gets a line when a phase starts and one when it ends.
        budget: fields of `Budget`.

    Returns:
        what `results.json` holds.

    Raises:
        UserError: the output folder or the data does not fit, or a command asks for a change.
        RuntimeError: a command failed; the message holds its last lines and the name of its log.
    """
    if method not in TRAINERS:
        known = ", ".join(filter(None, TRAINERS))
        raise UserError(f"unknown method '{method}', needed one of {known}; see: hiendmae methods")
    output = Path(output).resolve()
    found = find_data(data)
    settings = Budget(**budget)
    if settings.spacing_mm is None:
        edge = isotropic_spacing(found)
        settings = Budget(**{**budget, "spacing_mm": (edge, edge, edge)})
    claim(output)
    facts = {"method": method, "seed": seed, "device": device, **asdict(settings)}
    facts["spacing_mm"] = list(settings.spacing_mm)
    write_text(output / SETTINGS_FILE, json.dumps(facts, indent=2) + "\n")

    runner = Runner(output / "logs", _environment(output, num_processes), say)
    install(found, output / "nnUNet_raw")
    _pretrain(runner, found, output, method, seed, num_processes, device, settings)
    encoder = output / "pretraining" / "encoder.safetensors"
    runs = (
        Run("pretrained", "DemoPretrained", TRAINERS[method]),
        Run("scratch", "DemoScratch", TRAINERS[None], ("--from-scratch",)),
    )
    for run in runs:
        _plan(runner, found, run, encoder, num_processes, settings)
    for run in runs:
        _finetune(runner, found, output, run, seed, num_processes, device)

    outcome = results.collect(output, found, facts, runs, runner.phases)
    report.write_pictures(output, found, runs, outcome)
    report.write_report(output, outcome)
    # last of all: its presence says that the run is complete
    write_text(output / RESULTS_FILE, json.dumps(outcome, indent=2) + "\n")
    say(f"finished: {output / 'report.md'}")
    return outcome


def claim(output: Path) -> None:
    """Makes sure that a folder may be written to, and clears what an interrupted demo left in it.

    Raises:
        UserError: it holds a finished demo, or something that is not a demo.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, needed a folder; give another one with -o")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / SETTINGS_FILE).is_file():
        raise UserError(f"{output} holds files that are not a demo's; give a new or an empty folder with -o")
    if (output / RESULTS_FILE).is_file():
        raise UserError(
            f"{output} holds a finished demo, see {output / 'report.md'}; for another run give another -o, "
            f"or remove it: rm -r {output}"
        )
    for name in WORK_FOLDERS:
        if (output / name).is_dir():
            shutil.rmtree(output / name)


def _environment(output: Path, num_processes: int) -> dict[str, str]:
    ours = {name: str(output / name) for name in NNUNET_VARIABLES}
    ours[EXT_TRAINER_VARIABLE] = with_discovery(os.environ.get(EXT_TRAINER_VARIABLE))
    # 0: nnU-Net's loaders run in the training process, where a seed reaches them
    ours["nnUNet_n_proc_DA"] = "0"
    ours["nnUNet_def_n_proc"] = str(num_processes)
    ours["PYTHONUNBUFFERED"] = "1"
    return {**os.environ, **ours}


def _pretrain(
    runner: Runner,
    data: DemoData,
    output: Path,
    method: str,
    seed: int,
    num_processes: int,
    device: str,
    settings: Budget,
) -> None:
    dataset = data.pretraining_id
    spacing = ("--spacing", *settings.spacing_mm)
    runner.ours(
        "preprocess", "preprocess", "-d", dataset, "-p", PRETRAINING_PLANS, "--like", method, *spacing,
        "-np", num_processes,
    )  # fmt: skip
    precision = ("--precision", "fp32") if device == "cpu" else ()
    runner.ours(
        "pretrain", "pretrain", "-d", dataset, "-p", PRETRAINING_PLANS, "--method", method,
        "--encoder", settings.encoder, "--epochs", settings.pretrain_epochs,
        "--steps-per-epoch", settings.steps_per_epoch, "--batch-size", settings.pretrain_batch_size,
        "--lr", settings.pretrain_lr, "--seed", seed, "--workers", num_processes, *precision, "-device", device,
        "--name", "demo", "-o", output / "pretraining",
    )  # fmt: skip


def _plan(runner: Runner, data: DemoData, run: Run, encoder: Path, num_processes: int, settings: Budget) -> None:
    epochs = settings.finetune_epochs
    runner.ours(
        f"plan_{run.name}", "plan", "-d", data.finetuning_id, "-w", encoder, "--name", run.plans,
        "--epochs", epochs, "--warmup-epochs", epochs // 10, "--lr", settings.finetune_lr,
        "--spacing", *settings.spacing_mm, "--batch-size", settings.finetune_batch_size,
        "--iterations-per-epoch", settings.iterations_per_epoch, "--val-iterations-per-epoch", 1,
        "--decoder-width", settings.decoder_width, "-np", num_processes, *run.arguments,
    )  # fmt: skip


def _finetune(
    runner: Runner, data: DemoData, output: Path, run: Run, seed: int, num_processes: int, device: str
) -> None:
    dataset, chosen = data.finetuning_id, ("-p", run.plans, "-tr", run.trainer)
    runner.stock(
        f"preprocess_{run.name}", "nnUNetv2_preprocess", "-d", dataset, "-plans_name", run.plans, "-c", CONFIGURATION,
        "-np", num_processes,
    )  # fmt: skip
    runner.seeded_training(f"train_{run.name}", seed, dataset, CONFIGURATION, FOLD, *chosen, "-device", device)
    if not data.held_out:
        return
    predictions = output / "predictions" / run.name
    runner.stock(
        f"predict_{run.name}", "nnUNetv2_predict", "-i", data.finetuning / "imagesTs", "-o", predictions, "-d", dataset,
        "-c", CONFIGURATION, "-f", FOLD, *chosen, "-device", device, "-npp", 1, "-nps", 1, "--disable_tta",
    )  # fmt: skip
    runner.stock(
        f"evaluate_{run.name}", "nnUNetv2_evaluate_folder", data.finetuning / "labelsTs", predictions,
        "-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json", "-np", num_processes,
    )  # fmt: skip
