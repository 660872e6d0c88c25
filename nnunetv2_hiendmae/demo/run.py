"""The end-to-end run: three commands of ours, four of nnU-Net's, and what came of them."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.demo import report, results
from nnunetv2_hiendmae.demo.budget import METHODS, Budget, method_settings
from nnunetv2_hiendmae.demo.datasets import DemoData, find_data, install, isotropic_spacing
from nnunetv2_hiendmae.demo.process import Runner
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, NNUNET_VARIABLES, with_discovery
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.recipes import TRAINERS

logger = logging.getLogger(__name__)

SETTINGS_FILE = "demo.json"
RESULTS_FILE = "results.json"
PRETRAINING_PLANS = "DemoPretrainingPlans"
CONFIGURATION = "3d_fullres"
FOLD = 0
# several methods see images that were preprocessed like this one's: a comparison needs the same arrays
PREPROCESSED_LIKE = "hiendmae"
# what a run writes besides the two reports; removed when an interrupted run starts anew
WORK_FOLDERS = (*NNUNET_VARIABLES, "pretraining", "predictions", "logs", report.PICTURES)


@dataclass(frozen=True)
class Run:
    """One of the fine-tunings.

    Args:
        name: the pretraining method, or "scratch".
        arguments: further ones for `hiendmae plan`.
    """

    name: str
    encoder: Path
    trainer: str
    arguments: tuple[str, ...] = ()

    @property
    def plans(self) -> str:
        """Name of the plans."""
        return f"Demo_{self.name}"


@dataclass(frozen=True)
class _Demo:
    """What every phase needs."""

    runner: Runner
    data: DemoData
    output: Path
    budget: Budget
    seed: int
    num_processes: int
    device: str


def run_demo(
    output: Path,
    *,
    data: Path | None = None,
    methods: Sequence[str] = ("hiendmae",),
    seed: int = 0,
    num_processes: int = 2,
    device: str = "cpu",
    say: Callable[[str], None] = logger.info,
    **budget: Any,
) -> dict[str, Any]:
    """Pretrains with each method, fine-tunes from each encoder and from scratch, predicts, and compares.

    Everything is written under `output`: `report.md`, `results.json`, pictures, logs, the encoders and nnU-Net's three
    folders. A run that was interrupted starts anew.

    Args:
        output: folder that is new, empty, or left by an unfinished run.
        data: folder with two nnU-Net datasets, one without labels (pretraining) and one with (fine-tuning, whose
            imagesTs and labelsTs are held out if there are any); None: the embedded volumes.
        methods: pretraining methods. One alone sees images that are preprocessed as its paper says, several share
            those of Hi-End-MAE.
        seed: of all pretrainings and fine-tunings.
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
    settings = Budget(**budget)
    methods = tuple(dict.fromkeys(methods))
    _check_methods(methods, settings)
    output = Path(output).resolve()
    found = find_data(data)
    if settings.spacing_mm is None:
        settings = replace(settings, spacing_mm=(isotropic_spacing(found),) * 3)
    claim(output)
    facts = {"methods": methods, "preprocessed_like": _like(methods), "seed": seed, "device": device}
    facts |= asdict(settings)
    write_text(output / SETTINGS_FILE, json.dumps(facts, indent=2) + "\n")

    runner = Runner(output / "logs", _environment(output, num_processes), say)
    demo = _Demo(runner, found, output, settings, seed, num_processes, device)
    install(found, output / "nnUNet_raw")
    _preprocess(demo, _like(methods))
    encoders = {method: _pretrain(demo, method) for method in methods}
    runs = [Run(method, encoder, TRAINERS[method]) for method, encoder in encoders.items()]
    runs.append(Run(report.SCRATCH, encoders[methods[0]], TRAINERS[None], ("--from-scratch",)))
    for run in runs:
        _plan(demo, run)
    for run in runs:
        _finetune(demo, run)

    # as JSON gives it back, so that what is returned equals what the file holds
    outcome = json.loads(json.dumps(results.collect(output, found, facts, runs, runner.phases)))
    report.write_pictures(output, found, runs, outcome)
    report.write_report(output, outcome)
    # last of all: its presence says that the run is complete
    write_text(output / RESULTS_FILE, json.dumps(outcome, indent=2) + "\n")
    say(f"finished: {output / 'report.md'}")
    return outcome


def _check_methods(methods: tuple[str, ...], budget: Budget) -> None:
    if not methods:
        raise UserError("no method was given, needed at least one; see: hiendmae methods")
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown method '{method}', needed one of {', '.join(METHODS)}; see: hiendmae methods")
        budget.samples_per_step(method)


def _like(methods: tuple[str, ...]) -> str:
    return methods[0] if len(methods) == 1 else PREPROCESSED_LIKE


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


def _preprocess(demo: _Demo, like: str) -> None:
    demo.runner.ours(
        "preprocess", "preprocess", "-d", demo.data.pretraining_id, "-p", PRETRAINING_PLANS, "--like", like,
        "--spacing", *demo.budget.spacing_mm, "-np", demo.num_processes,
    )  # fmt: skip


def _pretrain(demo: _Demo, method: str) -> Path:
    budget, folder = demo.budget, demo.output / "pretraining" / method
    precision = ("--precision", "fp32") if demo.device == "cpu" else ()
    options = [f"{key}={value}" for key, value in method_settings(method).options.items()]
    demo.runner.ours(
        f"pretrain_{method}", "pretrain", "-d", demo.data.pretraining_id, "-p", PRETRAINING_PLANS, "--method", method,
        "--encoder", budget.encoder, "--epochs", budget.pretrain_epochs, "--steps-per-epoch", budget.steps_per_epoch,
        "--batch-size", budget.samples_per_step(method), "--lr", budget.pretrain_lr, "--seed", demo.seed,
        "--workers", demo.num_processes, *precision, "-device", demo.device,
        *(("--set", *options) if options else ()), "--name", f"demo_{method}", "-o", folder,
    )  # fmt: skip
    return folder / "encoder.safetensors"


def _plan(demo: _Demo, run: Run) -> None:
    budget, epochs = demo.budget, demo.budget.finetune_epochs
    # drop path and clipping differ between the methods' recipes: here the runs differ in their first weights alone
    demo.runner.ours(
        f"plan_{run.name}", "plan", "-d", demo.data.finetuning_id, "-w", run.encoder, "--name", run.plans,
        "--epochs", epochs, "--warmup-epochs", epochs // 10, "--lr", budget.finetune_lr,
        "--spacing", *budget.spacing_mm, "--batch-size", budget.finetune_batch_size,
        "--iterations-per-epoch", budget.iterations_per_epoch, "--val-iterations-per-epoch", 1,
        "--decoder-width", budget.decoder_width, "--drop-path", 0, "--grad-clip", 12, "-np", demo.num_processes,
        *run.arguments,
    )  # fmt: skip


def _finetune(demo: _Demo, run: Run) -> None:
    runner, data, name = demo.runner, demo.data, run.name
    dataset, chosen = data.finetuning_id, ("-p", run.plans, "-tr", run.trainer)
    runner.stock(
        f"preprocess_{name}", "nnUNetv2_preprocess", "-d", dataset, "-plans_name", run.plans, "-c", CONFIGURATION,
        "-np", demo.num_processes,
    )  # fmt: skip
    runner.seeded_training(f"train_{name}", demo.seed, dataset, CONFIGURATION, FOLD, *chosen, "-device", demo.device)
    if not data.held_out:
        return
    predictions = demo.output / "predictions" / name
    # 0: for a few small images, processes of their own take longer to start than to work
    runner.stock(
        f"predict_{name}", "nnUNetv2_predict", "-i", data.finetuning / "imagesTs", "-o", predictions, "-d", dataset,
        "-c", CONFIGURATION, "-f", FOLD, *chosen, "-device", demo.device, "-npp", 0, "-nps", 0, "--disable_tta",
    )  # fmt: skip
    runner.stock(
        f"evaluate_{name}", "nnUNetv2_evaluate_folder", data.finetuning / "labelsTs", predictions,
        "-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json", "-np", demo.num_processes,
    )  # fmt: skip
