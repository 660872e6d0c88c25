"""How a run is carried out: device, processes, precision, and what is checked before it starts."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.checkpoint import PRECISIONS, PretrainSettings
from nnunetv2_hiendmae.pretraining.method import Method


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; none of it changes the result beyond float rounding.

    Args:
        device: "cuda", "cpu" or "mps".
        workers: loader processes per process; 0 loads in the training process.

    Raises:
        UserError: no such device on this machine, or a negative number of workers.
    """

    device: str = "cuda"
    workers: int = 4

    def __post_init__(self):
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}, needed 0 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "-device cuda, but torch sees no CUDA device; run with -device cpu, or see: hiendmae doctor"
            )
        if self.device == "mps" and not torch.backends.mps.is_available():
            raise UserError("-device mps, but torch sees no Apple GPU; run with -device cpu")


def num_processes() -> int:
    """Processes of this run, by torchrun's variables or those of srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def launch(settings: PretrainSettings, execution: Execution) -> Fabric:
    """Fabric for this process, alone or as one of torchrun's or srun's.

    Raises:
        UserError: the batch cannot be split over the processes, or the precision does not go with the device.
    """
    processes = num_processes()
    nodes = int(os.environ.get("SLURM_NNODES") or 1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(1, processes // nodes))
    if settings.batch_size % (processes * settings.accumulate):
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be split over {processes} processes x {settings.accumulate} "
            f"micro-batches, needed a multiple of {processes * settings.accumulate}"
        )
    if settings.precision == "fp16" and execution.device != "cuda":
        raise UserError(f"--precision fp16 needs -device cuda, not {execution.device}; use fp32 or bf16")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    fabric = Fabric(
        accelerator=execution.device,
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=PRECISIONS[settings.precision],
    )
    fabric.launch()
    return fabric


def on_first_process(fabric: Fabric, work: Callable[[], None]) -> None:
    """Runs `work` on the first process; its UserError is raised in all of them, so that none waits for ever."""
    told = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as e:
            told = str(e)
    told = fabric.broadcast(told)
    if told:
        raise UserError(told)


def check_free_disk(run_dir: Path, method: Method) -> None:
    """A checkpoint is weights and two AdamW moments; while it is replaced there are two of them.

    Raises:
        UserError: less than that is free.
    """
    needed = 2 * 3 * 4 * sum(p.numel() for p in method.parameters())
    existing = next(p for p in (run_dir, *run_dir.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{free / 1e9:.1f} GB are free for {run_dir}, its checkpoints need {needed / 1e9:.1f} GB; free some, or "
            "choose another disk with -o"
        )
