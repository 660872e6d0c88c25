"""How a run is carried out: device, processes, precision, and what is checked before it starts."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import PRECISIONS


def num_processes() -> int:
    """Processes of this run, by torchrun's variables or those of srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def launch(device: str, precision: str, alone: str = "") -> Fabric:
    """Fabric for this process, alone or as one of torchrun's or srun's.

    Args:
        alone: name of a command that needs no distributed training and uses one device.

    Raises:
        UserError: no such device, one that the precision does not go with, or several processes of such a command.
    """
    check_device(device)
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs -device cuda, not {device}; use fp32 or bf16")
    if alone:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(f"{alone} uses one device, got several processes; run it without torchrun")
        return Fabric(accelerator=device, devices=1, precision=PRECISIONS[precision])
    processes = num_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(1, processes // int(os.environ.get("SLURM_NNODES") or 1)))
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    devices = {"devices": local, "num_nodes": processes // local, "strategy": "ddp" if processes > 1 else "auto"}
    fabric = Fabric(accelerator=device, precision=PRECISIONS[precision], **devices)
    fabric.launch()
    return fabric


def check_device(device: str) -> None:
    """
    Raises:
        UserError: torch sees no such device, "cuda", "cpu" or "mps", on this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda, but torch sees no CUDA device; run with -device cpu, or see: hiendmae doctor")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps, but torch sees no Apple GPU; run with -device cpu")


def choose_precision(asked: str, device: str) -> str:
    """What "auto" means on a device: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if asked != "auto":
        return asked
    if device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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


def check_free_disk(run_dir: Path, network: nn.Module) -> None:
    """A checkpoint is weights and two AdamW moments; while it is replaced there are two of them.

    Raises:
        UserError: less than that is free.
    """
    needed = 2 * 3 * 4 * sum(p.numel() for p in network.parameters())
    existing = next(p for p in (run_dir, *run_dir.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{free / 1e9:.1f} GB are free for {run_dir}, its checkpoints need {needed / 1e9:.1f} GB; free some, or "
            "choose another disk with -o"
        )
