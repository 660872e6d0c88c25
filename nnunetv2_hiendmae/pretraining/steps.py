"""What one optimizer step of pretraining does, on Lightning Fabric (devices, DDP, precision, accumulation)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.files import STATE, STEP
from nnunetv2_hiendmae.optim import adamw, parameter_groups
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.blocks import carry_out, check_compiler
from nnunetv2_hiendmae.pretraining.method import Batch, Method
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings
from nnunetv2_hiendmae.training import run
from nnunetv2_hiendmae.training.batches import SampleDataset, load_batches
from nnunetv2_hiendmae.training.views import Views, step_keys, unresized
from nnunetv2_hiendmae.training.volumes import CaseSet


def part_processes(fabric: Fabric) -> None:
    """Waits for all processes and ends their group: one that Python takes down at its end may abort the process."""
    if fabric.world_size > 1:
        fabric.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def telling_full_memory(settings: PretrainSettings) -> Iterator[None]:
    """Raises UserError: the GPU's memory became full inside, or what --compile asks for failed."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        more = "" if METHODS[settings.method].compares_samples else "raise --accumulate or "
        raise UserError(
            f"the GPU's memory is full with batch {settings.batch_size} in {settings.accumulate} micro-batches; "
            f"{more}give --checkpoint-activations (same result, less memory), or lower --batch-size"
        ) from e
    except Exception as e:
        if settings.compile and type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile failed: {printable(e)}; leave it out") from e
        raise


@dataclass(frozen=True)
class Learner:
    """A method that learns, in this process as one of several.

    Args:
        model: the method as Fabric wraps it.
    """

    fabric: Fabric
    settings: PretrainSettings
    method: Method
    model: Any
    optimizer: Any

    @classmethod
    def set_up(cls, fabric: Fabric, settings: PretrainSettings, method: Method) -> "Learner":
        """Puts the method on its device, with a fresh optimizer."""
        if settings.compile:
            check_compiler(settings.device)
        carry_out(method, settings.compile, settings.checkpoint_activations)
        method.gather = partial(_of_all_processes, fabric)
        groups = parameter_groups(method, settings.weight_decay)
        optimizer = adamw(groups, settings.lr, settings.betas)
        return cls(fabric, settings, method, *fabric.setup(method, optimizer))

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the step."""
        return {STATE: self.method, "optimizer": self.optimizer, "precision": self.fabric.strategy.precision}

    @property
    def views(self) -> Views:
        """What workers draw: boxes that a GPU resizes faster than they."""
        views = self.method.views()
        return views if self.fabric.device.type == "cpu" else unresized(views)

    def restore(self, run_dir: Path) -> int:
        """Puts back the last checkpoint of a run that is continued; the next step."""
        return run.restore_state(run_dir, self.parts, **{STEP: 0})[STEP] if self.settings.resume else 0

    def batches(self, data: CaseSet, steps: range) -> Iterator[Batch]:
        """This process's micro-batches of those steps, on its device."""
        dataset = SampleDataset(data, self.views.draw, self.settings.seed)
        rank, processes = self.fabric.global_rank, self.fabric.world_size
        keys = step_keys(steps, self.settings.batch_size, self.settings.accumulate, rank, processes)
        return load_batches(self.fabric, dataset, keys, self.settings.workers)

    def step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step, 0-based; its losses and learning rate.

        Raises:
            UserError: a loss is not finite in any process; weights are as before.
        """
        settings, method = self.settings, self.method
        lr = settings.lr * settings.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self._backward(islice(batches, settings.accumulate), step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        method.synchronize(partial(_mean_over_processes, self.fabric))
        method.after_step((step + 1) / settings.total_steps)
        return {**losses, "lr": lr}

    def _backward(self, batches: Iterator[Batch], step: int) -> dict[str, float]:
        """Gradients; losses summed over the method's parts, mean over micro-batches and processes.

        They are looked at once, after the last backward pass: each look makes the CPU wait for the GPU and, as Fabric
        reduces, for all processes.
        """
        fabric, accumulate = self.fabric, self.settings.accumulate
        totals: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Sequence[str]]] = []
        parts = range(self.method.num_parts)
        left = accumulate * len(parts)
        for batch, part in ((batch, part) for batch in batches for part in parts):
            left -= 1
            with fabric.no_backward_sync(self.model, enabled=left > 0):
                losses = self.model(batch, part)
                fabric.backward(losses["loss"] / accumulate)
            seen.append((losses["loss"].detach(), batch["case"]))
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value.detach() / accumulate
        mean = _mean_over_processes(fabric, torch.stack(list(totals.values())))
        measured = dict(zip(totals, mean.tolist(), strict=True))
        if not math.isfinite(measured["loss"]):
            raise _not_finite(seen, f"at step {step}, weights are unchanged")
        return {k: round(v, 7) for k, v in measured.items()}


def _mean_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    # all_reduce works in place
    return fabric.all_reduce(tensor.clone(), reduce_op="mean")


def _of_all_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    gathered = fabric.all_gather(tensor, sync_grads=True)
    return gathered if fabric.world_size == 1 else gathered.flatten(0, 1)


def _not_finite(seen: Sequence[tuple[Tensor, Sequence[str]]], when: str) -> UserError:
    """`seen`: this process's losses, each with the cases of its batch."""
    broken = [(loss.item(), cases) for loss, cases in seen if not loss.isfinite()]
    if not broken:
        return UserError(f"the loss is not finite in another process {when}; see its message")
    loss, cases = broken[0]
    return UserError(
        f"the loss is {loss} {when}; cases in this batch: {', '.join(sorted(set(cases)))}; look for broken "
        "intensities in them, or lower --lr, or use --precision fp32"
    )
