"""Runs the protocol: pretraining by `hiendmae pretrain`, plans by `hiendmae plan`, training by nnU-Net's own function.
What is finished is skipped, what was interrupted continues. Use `examples/evidence.sh`, which sets the variables."""

import argparse
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from arms import (
    CONFIGURATION,
    FINISHED,
    TOKENS_ALONE,
    Arm,
    Pretraining,
    Training,
    arms,
    dataset_name,
    nnunet_folder,
    pretrainings,
    remedies,
    remedy_pretrainings,
)
from datasets import make_task
from protocol import (
    BUDGETS,
    REMEDY_SEEDS,
    SEEDS,
    TASKS,
    TUNING,
    TUNING_SEED,
    Budget,
    Task,
)

from nnunetv2_hiendmae import plan
from nnunetv2_hiendmae.files import write_text

PLANS = "Evidence"
# left in the folder of a pretraining that is complete
PRETRAINED = "finished"
logger = logging.getLogger("evidence")


class Evidence:
    """Everything that is computed, below one folder.

    Args:
        output: pretraining runs, logs and chosen learning rates.
        jobs: at the same time, of one thread each on a CPU.
    """

    def __init__(self, data: Path, output: Path, jobs: int, budget: Budget):
        self.data, self.output, self.jobs, self.budget = data, output, jobs, budget
        output.mkdir(parents=True, exist_ok=True)

    def keep_to(self, budget: str) -> None:
        """Refuses the folder of another budget's runs: runs and plans are named without it."""
        file = self.output / "budget"
        if file.exists() and (other := file.read_text()) != budget:
            raise SystemExit(f"{self.output} has runs of the budget {other}, got {budget}: choose another OUTPUT")
        write_text(file, budget)

    def note_versions(self) -> None:
        """Adds this checkout's commit and what it runs on to those of earlier runs into the same folder."""
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        now = {"commit": commit, **{name: version(name) for name in ("nnunetv2", "torch", "timm", "numpy")}}
        file = self.output / "versions.json"
        earlier = json.loads(file.read_text()) if file.exists() else []
        if now not in earlier:
            write_text(file, json.dumps([*earlier, now], indent=1) + "\n")

    def prepare(self, task: Task) -> None:
        """Datasets, and arrays for pretraining."""
        make_task(task, self.data, nnunet_folder("raw"), nnunet_folder("preprocessed"))
        pools = [str(pool.number) for pool in (task.pool, *task.pools.values())]
        like = "mri" if task.channel == "MR" else "hiendmae"
        spacing = ["--spacing", *[f"{self.budget.spacing_mm[task.number]:g}"] * 3]
        line = ["hiendmae", "preprocess", "-d", *pools, "-p", PLANS, "--like", like, *spacing, "-np", str(self.jobs)]
        self._logged(f"{task.number}_preprocess", line)

    def pretrain(self, runs: list[Pretraining]) -> None:
        """Several of them."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._pretrain, runs))

    def _pretrain(self, run: Pretraining) -> None:
        if self.pretrained(run.task, run.name):
            return
        folder = self.encoder_file(run.task, run.name).parent
        budget = self.budget
        per_epoch = min(run.steps, budget.steps_per_epoch)
        line = [
            "hiendmae", "pretrain", "-d", str(run.pool.number), "-p", PLANS, "--method", run.method,
            "--encoder", run.preset, "--crop-size", *map(str, run.crop), "--lr", str(run.lr),
            "--batch-size", str(budget.samples[run.method]),
            "--epochs", str(run.steps // per_epoch), "--steps-per-epoch", str(per_epoch),
            "--warmup-epochs", str(3 if run.steps > 3 * per_epoch else 0), "-device", budget.device,
            "--pictures-every", "1000", "--seed", str(run.seed), "-o", str(folder), *budget.pretrain,
        ]  # fmt: skip
        if options := (*budget.options.get(run.method, ()), *run.options):
            line += ["--set", *options]
        if (folder / "run.json").exists():
            line.append("--c")
        self._logged(f"{run.task.number}_pretrain_{run.name}", line)
        (folder / PRETRAINED).touch()

    def pretrained(self, task: Task, name: str) -> bool:
        """Whether a pretraining is complete; one that is under way has an encoder file as well."""
        return (self.encoder_file(task, name).parent / PRETRAINED).exists()

    def encoder_file(self, task: Task, name: str) -> Path:
        """Of a pretraining."""
        return self.output / f"{task.number}_pretrain_{name}" / "encoder.safetensors"

    def tune(self, task: Task, names: Collection[str]) -> None:
        """Chooses learning rates by Dice of the tuning fold, of the named arms that have one of their own."""
        chosen = self.chosen(task)
        tuned = [arm for arm in arms(task).values() if arm.name in names and arm.rate_of is None]
        found = {
            arm.name: [Training(task, arm, lr, TUNING_SEED, TUNING) for lr in self._rates(task, arm)] for arm in tuned
        }
        self.train([training for trainings in found.values() for training in trainings])
        for name, trainings in found.items():
            dice = {f"{training.lr:g}": mean_dice(training.folder()) for training in trainings}
            best = max(dice, key=dice.__getitem__)
            chosen[name] = {"lr": float(best), "dice": dice}
        write_text(self._chosen_file(task), json.dumps(chosen, indent=2) + "\n")

    def _rates(self, task: Task, arm: Arm) -> tuple[float, ...]:
        alone = arm.finetuning == TOKENS_ALONE
        return self.budget.token_learning_rates if alone else self.budget.learning_rates[task.number]

    def chosen(self, task: Task) -> dict[str, dict]:
        """Chosen learning rate of every tuned arm, and the Dice of each rate."""
        file = self._chosen_file(task)
        return json.loads(file.read_text()) if file.exists() else {}

    def trainings(self, task: Task) -> list[Training]:
        """Those on test cases of all arms with a learning rate; by seed first, so that a run that is stopped has all
        arms."""
        return self._trainings(task, [(arm, arm.folds) for arm in arms(task).values()], SEEDS)

    def try_remedies(self, task: Task) -> None:
        """Pretrains and trains what remedies need, those first that need no other pretraining."""
        trainings = self.remedy_trainings(task)
        self.train([training for training in trainings if self.pretrained(task, training.arm.encoder)])
        self.pretrain(remedy_pretrainings(task, self.budget))
        self.train(trainings)

    def remedy_trainings(self, task: Task) -> list[Training]:
        """Those of each remedy on the tuning fold, with the learning rate that its method has."""
        return self._trainings(task, [(arm, (TUNING,)) for arm in remedies(task)], REMEDY_SEEDS)

    def _trainings(
        self, task: Task, chosen: Sequence[tuple[Arm, Sequence[int]]], seeds: Sequence[int]
    ) -> list[Training]:
        rates = {name: found["lr"] for name, found in self.chosen(task).items()}
        return [
            Training(task, arm, rates[arm.rate_of or arm.name], seed, fold)
            for seed in seeds
            for arm, folds in chosen
            if (arm.rate_of or arm.name) in rates
            for fold in folds
        ]

    def train(self, trainings: list[Training]) -> None:
        """Plans, arrays and nnU-Net's training of all that is not finished."""
        todo = [training for training in trainings if not (training.folder() / FINISHED).exists()]
        for training in todo:
            self._plan(training)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._train, todo))

    def _plan(self, training: Training) -> None:
        task, arm = training.task, training.arm
        folder = nnunet_folder("preprocessed") / dataset_name(task.number)
        if (folder / f"{training.plans}.json").exists():
            return
        options = {"lr": training.lr, "seed": training.seed, "num_processes": 1}
        options |= self.budget.finetuning[task.number]
        encoder = self.encoder_file(task, arm.encoder)
        options |= {"from_scratch": arm.method is None, "freeze_encoder": arm.frozen, **dict(arm.finetuning)}
        planned = plan(task.number, encoder, plans_name=training.plans, **options)
        # plans of one dataset with the same settings share their arrays
        if any("nnUNetv2_preprocess" in line for line in planned.next_commands):
            line = ["nnUNetv2_preprocess", "-d", str(task.number), "-plans_name", training.plans, "-c", CONFIGURATION]
            self._logged(f"{task.number}_arrays", [*line, "-np", str(self.jobs)])

    def _train(self, training: Training) -> None:
        log = self._log(f"{training.task.number}_{training.plans}_fold{training.fold}")
        arguments = (str(training.task.number), training.fold, training.trainer, training.plans)
        resume = any((training.folder() / f"checkpoint_{which}.pth").exists() for which in ("latest", "final"))
        process = SERVER.Process(target=_nnunet_train, args=(*arguments, resume, self.budget.device, str(log)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"training {training.plans} fold {training.fold} failed, see {log}")
        logger.info(f"{training.task.number} {training.plans} fold {training.fold}: {mean_dice(training.folder()):.4f}")

    def _chosen_file(self, task: Task) -> Path:
        return self.output / f"{task.number}_learning_rates.json"

    def _log(self, name: str) -> Path:
        return self.output / f"{name}.log"

    def _logged(self, name: str, line: list[str]) -> None:
        with self._log(name).open("w") as log:
            done = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(line)}, see {self._log(name)}")
        logger.info(f"finished: {name}")


def mean_dice(fold: Path) -> float:
    """nnU-Net's own means of a fold's validation, without classes that are rightly absent: those have none."""
    classes = json.loads((fold / FINISHED).read_text())["mean"].values()
    return fmean(dice for each in classes if not math.isnan(dice := each["Dice"]))


def _end_with_parent() -> None:
    with suppress(ProcessLookupError):
        while True:
            os.kill(multiprocessing.parent_process().pid, 0)
            time.sleep(1)
    os._exit(1)


def _nnunet_train(dataset: str, fold: int, trainer: str, plans: str, resume: bool, device: str, log: str) -> None:
    """`nnUNetv2_train` in a child of a process that has imported nnU-Net already, its pools children of this one."""
    import torch
    from nnunetv2.run.run_training import run_training
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    # a training that outlives its run would meet the next one's in the same folder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # a picture of the curves after each epoch would be a sixth of a run
    MetaLogger.plot_progress_png = lambda *_: None
    if device == "cpu":
        own_context = multiprocessing.get_context
        multiprocessing.get_context = lambda method=None: own_context("fork")
    else:
        # as nnU-Net's command does. No fork here: a child of a process that computes on a GPU may wait for ever
        torch.set_num_threads(1)
    with Path(log).open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        where = torch.device(device)
        run_training(dataset, CONFIGURATION, fold, trainer, plans, continue_training=resume, device=where)


SERVER = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the datasets")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=int, nargs="+", default=[task.number for task in TASKS])
    parser.add_argument("--arms", nargs="+", help="only these (default: all)")
    parser.add_argument("--remedies", action="store_true", help="also those, on the tuning fold")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at the same time")
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("nnunetv2_hiendmae").setLevel(logging.WARNING)
    SERVER.set_forkserver_preload(["nnunetv2.run.run_training", "nnunetv2_hiendmae.trainers"])
    evidence = Evidence(args.data, args.output, args.jobs, BUDGETS[args.budget])
    evidence.keep_to(args.budget)
    evidence.note_versions()
    for task in (task for task in TASKS if task.number in args.tasks):
        evidence.prepare(task)
        chosen = [arm for arm in arms(task).values() if not args.arms or arm.name in args.arms]
        # further pools last: arms are compared without them
        for group in ([arm for arm in chosen if not arm.rate_of], [arm for arm in chosen if arm.rate_of]):
            names, encoders = {arm.name for arm in group}, {arm.encoder for arm in group}
            evidence.pretrain([run for run in pretrainings(task, evidence.budget) if run.name in encoders])
            evidence.tune(task, names)
            evidence.train([training for training in evidence.trainings(task) if training.arm.name in names])
        if args.remedies:
            evidence.try_remedies(task)


if __name__ == "__main__":
    main()
