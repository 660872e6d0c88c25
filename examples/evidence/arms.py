"""The arms of a task, and their trainings as nnU-Net knows them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from protocol import (
    ALL,
    FLAT,
    FROZEN,
    ONE_SHOT,
    RANDOM,
    RANDOM_SEEDS,
    REMEDIES,
    SAME_RATE,
    SCRATCH,
    TOKENS,
    Budget,
    Pool,
    Task,
)

from nnunetv2_hiendmae.recipes import TRAINERS

CONFIGURATION = "3d_fullres"
FINISHED = "validation/summary.json"
# such a network has no decoder with a width of its own
TOKENS_ALONE = (("network", "primus"), ("decoder_width", None))


@dataclass(frozen=True)
class Arm:
    """How fine-tuning starts.

    Args:
        encoder: name of a pretraining.
        method: its method; None: from scratch.
        rate_of: arm that it shares the learning rate with; None: it has its own.
        folds: of test cases.
        finetuning: fields of `PlanOptions` that differ from the budget's.
    """

    name: str
    encoder: str
    method: str | None
    frozen: bool = False
    rate_of: str | None = None
    folds: tuple[int, ...] = (ONE_SHOT,)
    finetuning: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Training:
    """One fold of one arm."""

    task: Task
    arm: Arm
    lr: float
    seed: int
    fold: int

    @property
    def plans(self) -> str:
        """Name of its plans."""
        return f"Evidence_{self.arm.name}_lr{self.lr:g}_seed{self.seed}"

    @property
    def trainer(self) -> str:
        """nnU-Net's name of its trainer class."""
        return TRAINERS[self.arm.method]

    def folder(self) -> Path:
        """Of its results."""
        results = nnunet_folder("results") / dataset_name(self.task.number)
        return results / f"{self.trainer}__{self.plans}__{CONFIGURATION}" / f"fold_{self.fold}"


@dataclass(frozen=True)
class Pretraining:
    """One run of `hiendmae pretrain`.

    Args:
        preset: of the encoder.
        crop: voxels.
        options: of the method, beside the budget's.
        seed: of the first weights, and of all that is drawn.
    """

    task: Task
    name: str
    method: str
    preset: str
    pool: Pool
    steps: int
    lr: float
    crop: tuple[int, int, int]
    options: tuple[str, ...] = ()
    seed: int = 0


def nnunet_folder(kind: str) -> Path:
    """Folder for raw, preprocessed or results."""
    return Path(os.environ[f"nnUNet_{kind}"])


def dataset_name(number: int) -> str:
    """Of a dataset in nnUNet_raw."""
    return next(nnunet_folder("raw").glob(f"Dataset{number:03d}_*")).name


def raw_folder(task: Task) -> Path:
    """Of its labelled dataset."""
    return nnunet_folder("raw") / dataset_name(task.number)


def pool_runs(task: Task) -> dict[str, Pool]:
    """Further pools by the name of the pretraining, and of the arm, that has each."""
    return {f"{task.pool_method}_pool{name}": pool for name, pool in task.pools.items()}


def other_randoms(task: Task) -> dict[str, int]:
    """Seeds of further random encoders for a network that reads tokens alone, by name."""
    return {f"{RANDOM}{seed}{TOKENS}": seed for seed in RANDOM_SEEDS if task.tokens}


def arms(task: Task) -> dict[str, Arm]:
    """All arms of a task by name, those that are tuned first."""
    first, both = task.arms[0], (ONE_SHOT, ALL)
    tuned = [Arm(SCRATCH, first, None, folds=both), *(Arm(name, name, name, folds=both) for name in task.arms)]
    frozen = [Arm(name + FROZEN, name, name, frozen=True) for name in task.frozen]
    if frozen:
        frozen.append(Arm(RANDOM + FROZEN, RANDOM, first, frozen=True))
    if task.tokens:
        alone = [Arm(name + TOKENS, name + TOKENS, name, folds=both, finetuning=TOKENS_ALONE) for name in task.tokens]
        tuned += [replace(alone[0], name=SCRATCH + TOKENS, encoder=first + TOKENS, method=None), *alone]
        random = replace(alone[0], name=RANDOM + TOKENS, encoder=RANDOM + TOKENS, method=first)
        frozen += [replace(arm, name=arm.name + FROZEN, frozen=True, folds=(ONE_SHOT,)) for arm in (*alone, random)]
    method = task.pool_method
    others = [Arm(name, name, method, rate_of=method) for name in pool_runs(task)]
    for name in other_randoms(task):
        others.append(replace(frozen[-1], name=name + FROZEN, encoder=name, rate_of=frozen[-1].name))
    if task.same_rate:
        others.append(Arm(SCRATCH + SAME_RATE, first, None, rate_of=first))
    if task.flat:
        flat = first + FLAT
        others += [Arm(SCRATCH + FLAT, flat, None, rate_of=first), Arm(flat, flat, first, rate_of=first)]
    return {arm.name: arm for arm in (*tuned, *frozen, *others)}


def pretrainings(task: Task, budget: Budget) -> Iterator[Pretraining]:
    """In the order of the runs."""
    first, preset = task.arms[0], budget.encoder
    steps, lr, crop = budget.steps[task.number], budget.pretrain_lr, budget.crop
    for method in task.arms:
        yield Pretraining(task, method, method, preset, task.pool, steps, lr, crop)
    if task.frozen:
        yield Pretraining(task, RANDOM, first, preset, task.pool, 1, 1e-12, crop)
    for method in task.tokens:
        yield Pretraining(task, method + TOKENS, method, budget.token_encoder, task.pool, steps, lr, crop)
    if task.tokens:
        random = Pretraining(task, RANDOM + TOKENS, first, budget.token_encoder, task.pool, 1, 1e-12, crop)
        yield random
        yield from (replace(random, name=name, seed=seed) for name, seed in other_randoms(task).items())
    for name, pool in pool_runs(task).items():
        yield Pretraining(task, name, task.pool_method, preset, pool, steps, lr, crop)
    if task.flat:
        yield Pretraining(task, first + FLAT, first, preset, task.pool, steps, lr, budget.flat_crop)


def remedy_pretrainings(task: Task, budget: Budget) -> list[Pretraining]:
    """Of the remedies that need one of their own."""
    steps, lr, crop = budget.steps[task.number], budget.pretrain_lr, budget.crop
    return [
        Pretraining(
            *(task, plain(name), remedy.method, budget.encoder, task.pool, remedy.steps or steps, lr, crop),
            options=remedy.options,
        )
        for name, remedy in REMEDIES.items()
        if remedy.steps or remedy.options
    ]


def remedies(task: Task) -> list[Arm]:
    """An arm for each remedy, and those that they are compared with."""
    known, made = arms(task), []
    for name, remedy in REMEDIES.items():
        encoder = plain(name) if remedy.steps or remedy.options else remedy.method
        arm = Arm(plain(name), encoder, remedy.method, rate_of=remedy.method)
        made.append(replace(arm, finetuning=tuple(remedy.finetuning.items())))
    return [known[SCRATCH], *(known[name] for name in sorted({remedy.method for remedy in REMEDIES.values()})), *made]


def plain(name: str) -> str:
    """A remedy's name as that of an arm."""
    return name.replace(" ", "_")
