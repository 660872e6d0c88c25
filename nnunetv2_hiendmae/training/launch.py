"""How a run is carried out: device, processes and precision, by Lightning Fabric."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision

from nnunetv2_hiendmae.environment import check_device
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.host_memory import set_freed_memory
from nnunetv2_hiendmae.options.commands import PRECISIONS
from nnunetv2_hiendmae.threads import use_threads


def num_processes() -> int:
    """Processes of this run, by torchrun's variables or those of srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


class _Autocast(MixedPrecision):
    """Mixed precision that hands a batch over as it is. Fabric's own rounds images to 16 bits before the forward pass,
    so that losses would compare with rounded ones, and takes no frozen dataclass, which `batches.Boxes` is."""

    def convert_input(self, data: Any) -> Any:
        """Nothing: autocast rounds what an operation takes."""
        return data


def _precision(name: str, device: str) -> Precision:
    return Precision() if name == "fp32" else _Autocast(PRECISIONS[name], device)


def launch(device: str, precision: str, work: float, alone: str = "", spare_memory: bool = False) -> Fabric:
    """Fabric for this process, alone or as one of torchrun's or srun's.

    Args:
        work: floating-point operations of a step of one process, roughly; decides the threads of a CPU.
        alone: name of a command that needs no distributed training and uses one device.
        spare_memory: on a CPU, rather than time.

    Raises:
        UserError: no such device, one that the precision does not go with, or several processes of such a command.
    """
    check_device(device)
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs -device cuda, not {device}; use fp32 or bf16")
    if alone:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(f"{alone} uses one device, got several processes; run it without torchrun")
        fabric, local = Fabric(accelerator=device, devices=1, plugins=_precision(precision, device)), 1
    else:
        fabric, local = _launch_all(device, precision)
    if device == "cpu":
        use_threads(work, local, tell=fabric.is_global_zero)
        set_freed_memory(keep=not spare_memory)
    return fabric


def _launch_all(device: str, precision: str) -> tuple[Fabric, int]:
    """Fabric for one of several processes, and how many of them are on this machine."""
    processes = num_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(1, processes // int(os.environ.get("SLURM_NNODES") or 1)))
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    devices = {"devices": local, "num_nodes": processes // local, "strategy": "ddp" if processes > 1 else "auto"}
    fabric = Fabric(accelerator=device, plugins=_precision(precision, device), **devices)
    fabric.launch()
    return fabric, local


def choose_precision(asked: str, device: str) -> str:
    """What "auto" means on a device: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if asked != "auto":
        return asked
    if device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def on_first_process(fabric: Fabric, work: Callable[[], None]) -> None:
    """Runs `work` on the first process; its UserError ends all of them, so that none waits, and is told once."""
    told = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as e:
            told = str(e)
    told = fabric.broadcast(told)
    if told and not fabric.is_global_zero:
        raise SystemExit(2)
    if told:
        raise UserError(told)
