"""The whole story on small real images, by three commands of ours and four of nnU-Net's: pretraining, planning, stock
training and prediction, then a Dice table and pictures."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.demo import report
from nnunetv2_hiendmae.demo.datasets import DEFAULT_TASK, DemoData, find_data, install, isotropic_spacing
from nnunetv2_hiendmae.demo.process import Runner
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, NNUNET_VARIABLES, check_device, with_discovery
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import ENCODER, write_text
from nnunetv2_hiendmae.plans_section import PLANS_KEY
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, RECIPES, trainer_of
from nnunetv2_hiendmae.threads import passively

logger = logging.getLogger(__name__)

SETTINGS_FILE = "demo.json"
RESULTS_FILE = "results.json"
PRETRAINING_PLANS = "DemoPretrainingPlans"
CONFIGURATION = "3d_fullres"
FOLD = 0
# what a run writes besides the two reports; removed when an interrupted run starts anew
WORK_FOLDERS = (*NNUNET_VARIABLES, "pretraining", "predictions", "logs", report.PICTURES)
# of the decoders that are as large as their papers' unless told otherwise: 8 blocks would dwarf the demo's encoder
SMALL_DECODER = {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4}
MIM_VIEWS = {"crops_level2": 1, "crops_level3": 2, "views_per_part": 2}
GLMAE_VIEWS = {"global_views": 2, "local_views": 2, "global_size": 64, "head_hidden": 256, "head_dim": 128}
# method -> crops that the encoder learns from in one sample, all read from one volume, and options where the demo is
# smaller than the paper, which make it that many; a method that is not named here is run with its own defaults, of one
SMALLER: dict[str, tuple[int, dict[str, Any]]] = {
    "mim": (4, MIM_VIEWS | SMALL_DECODER),
    "glmae": (4, GLMAE_VIEWS | SMALL_DECODER),
    "mae3d": (1, SMALL_DECODER),
    "simclr": (2, {}),
    "swinpretexts": (2, {}),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed, the same for every method; the defaults fit a laptop.

    Args:
        views_per_step: crops that the encoder learns from in one optimizer step of pretraining.
        spacing_mm: voxel spacing (D, H, W); None: isotropic, about 128 voxels along a volume's longest axis.
        pretrain_lr, finetune_lr: peak learning rates, high because network, batches and runs are small.

    Raises:
        UserError: a number is not positive.
    """

    encoder: str = "vit_nano_p8"
    pretrain_epochs: int = 15
    steps_per_epoch: int = 50
    views_per_step: int = 8
    pretrain_lr: float = 1e-3
    finetune_epochs: int = 15
    iterations_per_epoch: int = 10
    finetune_batch_size: int = 2
    finetune_lr: float = 2e-3
    decoder_width: int = 16
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self):
        # now, and not when the command is reached after minutes
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"{name} is {value}, needed more than 0; see: hiendmae demo --help")


@dataclass(frozen=True)
class _Demo:
    """What every phase needs; `run` is that of the `Runner`."""

    run: Callable[..., None]
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
    task: str = DEFAULT_TASK,
    methods: Sequence[str] = (DEFAULT_METHOD,),
    seed: int = 0,
    num_processes: int = 2,
    device: str = "cuda",
    say: Callable[[str], None] = logger.info,
    **budget: Any,
) -> dict[str, Any]:
    """Pretrains with each method, fine-tunes from each encoder and from scratch, predicts, and compares.

    Everything is written under `output`: `report.md`, `results.json`, pictures, logs, the encoders and nnU-Net's three
    folders. A run that was interrupted starts anew.

    Args:
        output: folder that is new, empty, or left by an unfinished run.
        data: folder with two nnU-Net datasets, one without labels (pretraining) and one with (fine-tuning, whose
            imagesTs and labelsTs are held out if there are any), and maybe an encoder.safetensors, which is fine-tuned
            as well; None: the embedded volumes.
        task: which of the embedded volumes: "brain" (MR of heads, tissue of brain templates) or "ct" (abdomen).
        methods: pretraining methods. One alone sees images that are preprocessed as its paper says, several share
            those of Hi-End-MAE.
        seed: of all pretrainings and fine-tunings.
        num_processes: for reading, preprocessing and the pretraining loader.
        device: "cuda", "cpu" or "mps", as in nnU-Net.
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
    samples = _samples(methods, settings.views_per_step)
    output = Path(output).resolve()
    check_device(device)
    found = find_data(data, task)
    if settings.spacing_mm is None:
        settings = replace(settings, spacing_mm=(isotropic_spacing(found),) * 3)
    claim(output)
    # several methods see images that were preprocessed like one's: a comparison needs the same arrays
    like = methods[0] if len(methods) == 1 else DEFAULT_METHOD
    facts = {"methods": methods, "preprocessed_like": like, "seed": seed, "device": device, **asdict(settings)}
    write_text(output / SETTINGS_FILE, json.dumps(facts, indent=2) + "\n")

    install(found, output / "nnUNet_raw")
    runner = Runner(output / "logs", _environment(output, num_processes), say)
    demo = _Demo(runner.run, found, output, settings, seed, num_processes, device)
    if found.encoder:
        # first of all: the file may not fit
        _plan(demo, report.SHIPPED, found.encoder)
    demo.run(
        "preprocess", "hiendmae", "preprocess", "-d", found.pretraining_id, "-p", PRETRAINING_PLANS, "--like", like,
        "--spacing", *settings.spacing_mm, "-np", num_processes,
    )  # fmt: skip
    run_dirs = {method: _pretrain(demo, method, **about) for method, about in samples.items()}
    for name in (*methods, report.SCRATCH):
        # from scratch, an encoder file only says what the network is
        _plan(demo, name, run_dirs.get(name, run_dirs[methods[0]]) / ENCODER)
    folds, predictions = {}, {}
    for name in (*methods, *([report.SHIPPED] if found.encoder else []), report.SCRATCH):
        folds[name], predictions[name] = _finetune(demo, name)

    measured = {
        "pretraining": {m: {**report.pretraining_losses(run_dirs[m]), **about} for m, about in samples.items()},
        "finetuning": {name: report.finetuning_losses(fold) for name, fold in folds.items()},
        "dice": {name: report.dice(folder, found) for name, folder in predictions.items()},
    }
    if found.encoder:
        measured["shipped_encoder"] = _plans(demo, report.SHIPPED)[PLANS_KEY]
    # as JSON gives it back, so that what is returned equals what the file holds
    outcome = json.loads(json.dumps(report.collect(facts, measured, found, runner)))
    report.write_pictures(output, found, predictions, outcome)
    report.write_report(output, outcome)
    # last of all: its presence says that the run is complete
    write_text(output / RESULTS_FILE, json.dumps(outcome, indent=2) + "\n")
    say(f"finished: {output / 'report.md'}")
    return outcome


def _samples(methods: Sequence[str], views_per_step: int) -> dict[str, dict[str, Any]]:
    """What a step of every method is made of.

    Raises:
        UserError: no or an unknown method, or one whose samples have more views than a step, or do not fill it.
    """
    if not methods:
        raise UserError("no method was given, needed at least one; see: hiendmae methods")
    made = {}
    for method in methods:
        if method not in RECIPES:
            raise UserError(f"unknown method '{method}', needed one of {', '.join(RECIPES)}; see: hiendmae methods")
        views, options = SMALLER.get(method, (1, {}))
        if views_per_step % views:
            raise UserError(f"views_per_step is {views_per_step}, {method} needs a multiple of {views}")
        made[method] = {"samples_per_step": views_per_step // views, "views_per_sample": views, "options": options}
    return made


def claim(output: Path) -> None:
    """Makes sure that a folder may be written to, and clears what an interrupted demo left in it.

    Raises:
        UserError: it holds a finished demo, or something that is not a demo.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, needed a folder; give another one with -o")
    there = {p.name for p in output.iterdir()} if output.is_dir() else set()
    if there and SETTINGS_FILE not in there:
        raise UserError(f"{output} holds files that are not a demo's; give a new or an empty folder with -o")
    if RESULTS_FILE in there:
        raise UserError(
            f"{output} holds a finished demo, see {output / 'report.md'}; for another run give another -o, "
            f"or remove it: rm -r {output}"
        )
    for name in there.intersection(WORK_FOLDERS):
        shutil.rmtree(output / name)


def _environment(output: Path, num_processes: int) -> dict[str, str]:
    ours = {name: str(output / name) for name in NNUNET_VARIABLES}
    ours[EXT_TRAINER_VARIABLE] = with_discovery(os.environ.get(EXT_TRAINER_VARIABLE))
    # 0: for a few small images, nnU-Net's loader processes take longer to start than to work
    ours |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": str(num_processes), "PYTHONUNBUFFERED": "1"}
    # on a GPU nnU-Net compiles the network, which takes longer than so few steps
    ours |= {"nnUNet_compile": "f"}
    # nnU-Net computes on all cores: its threads should at least not spin
    return {**os.environ, **passively(os.environ), **ours}


def _pretrain(demo: _Demo, method: str, samples_per_step: int, views_per_sample: int, options: dict[str, Any]) -> Path:
    """Returns the run's folder."""
    budget, folder = demo.budget, demo.output / "pretraining" / method
    precision = ("--precision", "fp32") if demo.device == "cpu" else ()
    settings = ("--set", *(f"{key}={value}" for key, value in options.items())) if options else ()
    demo.run(
        f"pretrain_{method}", "hiendmae", "pretrain", "-d", demo.data.pretraining_id, "-p", PRETRAINING_PLANS,
        "--method", method, "--encoder", budget.encoder, "--epochs", budget.pretrain_epochs,
        "--steps-per-epoch", budget.steps_per_epoch, "--batch-size", samples_per_step,
        "--lr", budget.pretrain_lr, "--seed", demo.seed, "--workers", demo.num_processes, *precision,
        "-device", demo.device, *settings, "--name", f"demo_{method}", "-o", folder,
    )  # fmt: skip
    return folder


def _plan(demo: _Demo, name: str, encoder: Path) -> None:
    budget, epochs = demo.budget, demo.budget.finetune_epochs
    # drop path and clipping differ between the methods' recipes: here the runs differ in their first weights alone
    demo.run(
        f"plan_{name}", "hiendmae", "plan", "-d", demo.data.finetuning_id, "-w", encoder, "--name", f"Demo_{name}",
        "--epochs", epochs, "--warmup-epochs", epochs // 10, "--lr", budget.finetune_lr,
        "--spacing", *budget.spacing_mm, "--batch-size", budget.finetune_batch_size,
        "--iterations-per-epoch", budget.iterations_per_epoch, "--val-iterations-per-epoch", 1,
        "--decoder-width", budget.decoder_width, "--drop-path", 0, "--grad-clip", 12, "--seed", demo.seed,
        "-np", demo.num_processes,
        *(("--from-scratch",) if name == report.SCRATCH else ()),
    )  # fmt: skip


def _plans(demo: _Demo, name: str) -> dict[str, Any]:
    file = demo.output / "nnUNet_preprocessed" / demo.data.finetuning.name / f"Demo_{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _finetune(demo: _Demo, name: str) -> tuple[Path, Path]:
    """Returns the folder of the trained fold, and that of the segmentations which the Dice values belong to."""
    data, plans, planned = demo.data, f"Demo_{name}", _plans(demo, name)
    trainer = trainer_of(planned[PLANS_KEY]["method"])
    dataset, model = data.finetuning_id, ("-p", plans, "-tr", trainer, "-device", demo.device)
    # plans with the same settings share their arrays
    preprocessed = demo.output / "nnUNet_preprocessed" / data.finetuning.name
    if not (preprocessed / planned["configurations"][CONFIGURATION]["data_identifier"]).is_dir():
        demo.run(
            f"preprocess_{name}", "nnUNetv2_preprocess", "-d", dataset, "-plans_name", plans, "-c", CONFIGURATION,
            "-np", demo.num_processes,
        )  # fmt: skip
    demo.run(f"train_{name}", "nnUNetv2_train", dataset, CONFIGURATION, FOLD, *model)
    results = demo.output / "nnUNet_results" / data.finetuning.name
    fold = results / f"{trainer}__{plans}__{CONFIGURATION}" / f"fold_{FOLD}"
    if not data.held_out:
        return fold, fold / "validation"
    folder = demo.output / "predictions" / name
    # 0: for a few small images, processes of their own take longer to start than to work
    demo.run(
        f"predict_{name}", "nnUNetv2_predict", "-i", data.finetuning / "imagesTs", "-o", folder, "-d", dataset,
        "-c", CONFIGURATION, "-f", FOLD, *model, "-npp", 0, "-nps", 0, "--disable_tta",
    )  # fmt: skip
    demo.run(
        f"evaluate_{name}", "nnUNetv2_evaluate_folder", data.finetuning / "labelsTs", folder,
        "-djfile", folder / "dataset.json", "-pfile", folder / "plans.json", "-np", demo.num_processes,
    )  # fmt: skip
    return fold, folder
