"""One device for a run: classification sets are small, so there is no distributed training."""

import os

import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.checkpoint import PRECISIONS
from nnunetv2_hiendmae.pretraining.launch import Execution


def single_device(execution: Execution, precision: str) -> Fabric:
    """Fabric for this process.

    Raises:
        UserError: the precision does not go with the device, or several processes were started.
    """
    if precision == "fp16" and execution.device != "cuda":
        raise UserError(f"--precision fp16 needs -device cuda, not {execution.device}; use fp32 or bf16")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("hiendmae classify uses one device, got several processes; run it without torchrun")
    return Fabric(accelerator=execution.device, devices=1, precision=PRECISIONS[precision])


def choose_precision(asked: str, device: str) -> str:
    """What "auto" means on a device: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if asked != "auto":
        return asked
    if device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
