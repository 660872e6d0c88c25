"""The pretraining loop: one readable function on Lightning Fabric (devices, DDP, precision, accumulation)."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.optim import parameter_groups, warmup_cosine
from nnunetv2_hiendmae.pretraining.checkpoint import (
    ENCODER,
    PretrainSettings,
    claim_run,
    export_encoder,
    load_checkpoint,
    locked,
    save_checkpoint,
)
from nnunetv2_hiendmae.pretraining.data import (
    PretrainData,
    SampleDataset,
    StepSampler,
    build_loader,
    warn_if_padded,
)
from nnunetv2_hiendmae.pretraining.launch import Execution, check_free_disk, launch, on_first_process
from nnunetv2_hiendmae.pretraining.method import Batch, Method
from nnunetv2_hiendmae.pretraining.runlog import RECONSTRUCTIONS, RunLog, draw_reconstruction

logger = logging.getLogger(__name__)

# samples in a reconstruction picture; drawn as if they belonged to the step after the last
PICTURE_SAMPLES = 4


def pretrain(
    settings: PretrainSettings, data: PretrainData, run_dir: Path, execution: Execution, resume: bool = False
) -> Path | None:
    """Pretrains into `run_dir`; under torchrun or SLURM every process calls this, the first one writes.

    Returns:
        The path of the run's encoder file; None in the processes that did not write it.

    Raises:
        UserError: bad settings or data, a folder in use, a full disk, or a loss that is not finite.
    """
    _check_channels(settings, data)
    method = settings.build_method()
    fabric = launch(settings, execution)
    with ExitStack() as held:

        def claim() -> None:
            warn_if_padded(data.cases, method.views().padded_below)
            check_free_disk(run_dir, method)
            held.enter_context(locked(run_dir))
            claim_run(run_dir, settings, data, resume)

        on_first_process(fabric, claim)
        try:
            _run(fabric, settings, data, method, run_dir, execution.workers, resume)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the GPU's memory is full with batch {settings.batch_size} in {settings.accumulate} micro-batches; "
                "raise --accumulate (same result, less memory), or lower --batch-size"
            ) from e
    return run_dir / ENCODER if fabric.is_global_zero else None


def _run(
    fabric: Fabric,
    settings: PretrainSettings,
    data: PretrainData,
    method: Method,
    run_dir: Path,
    workers: int,
    resume: bool,
) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(method, settings.weight_decay), lr=settings.lr, betas=settings.betas)
    model, optimizer = fabric.setup(method, optimizer)
    first_step = _restore(fabric, method, optimizer, run_dir) if resume else 0
    if first_step == settings.total_steps:
        logger.info(f"{run_dir} was already finished")
        return
    dataset = SampleDataset(data, method.views(), settings.seed)
    sampler = StepSampler(
        first_step,
        settings.total_steps,
        settings.batch_size,
        settings.accumulate,
        fabric.global_rank,
        fabric.world_size,
    )
    loader = build_loader(dataset, sampler, workers, pin_memory=fabric.device.type == "cuda")
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    log = _open_log(fabric, settings, run_dir, first_step)
    batches = iter(loader)
    try:
        for step in range(first_step, settings.total_steps):
            lr = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = _backward(fabric, method, model, batches, settings.accumulate, step)
            optimizer.step()
            optimizer.zero_grad()
            method.synchronize(lambda tensor: _mean_over_processes(fabric, tensor))
            method.after_step((step + 1) / settings.total_steps)
            if log:
                log.step(step, step // settings.steps_per_epoch, {**losses, "lr": lr})
            if log and (step + 1) % settings.steps_per_epoch == 0:
                _end_epoch(fabric, settings, data, run_dir, method, optimizer, dataset, step + 1)
                log.end_epoch(last=step + 1 == settings.total_steps)
    finally:
        if log:
            log.close()


def _backward(
    fabric: Fabric, method: Method, model: Any, batches: Iterator[Batch], accumulate: int, step: int
) -> dict[str, float]:
    """Gradients of one optimizer step; losses summed over the method's parts, mean over micro-batches and processes.

    Raises:
        UserError: a loss is not finite in any process; weights are as before the step.
    """
    totals: dict[str, Tensor] = {}
    parts = range(method.num_parts)
    left = accumulate * len(parts)
    for batch, part in ((batch, part) for batch in _micro_batches(batches, accumulate) for part in parts):
        left -= 1
        with fabric.no_backward_sync(model, enabled=left > 0):
            losses = model(batch, part)
            mean = {k: _mean_over_processes(fabric, v.detach()) for k, v in losses.items()}
            if not math.isfinite(mean["loss"].item()):
                raise _not_finite(losses["loss"].item(), batch, step)
            fabric.backward(losses["loss"] / accumulate)
        for key, value in mean.items():
            totals[key] = totals.get(key, 0.0) + value / accumulate
    return {k: round(v.item(), 7) for k, v in totals.items()}


def _mean_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    # all_reduce works in place
    return fabric.all_reduce(tensor.clone(), reduce_op="mean")


def _not_finite(loss: float, batch: Batch, step: int) -> UserError:
    if math.isfinite(loss):
        return UserError(
            f"the loss is not finite in another process at step {step}, weights are unchanged; see its message"
        )
    return UserError(
        f"the loss is {loss} at step {step}, weights are unchanged; cases in this batch: "
        f"{', '.join(sorted(set(batch['case'])))}; look for broken intensities in them, or lower --lr, or use "
        "--precision fp32"
    )


def _micro_batches(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    try:
        yield from islice(batches, number)
    except UserError as e:
        # a worker's error arrives with its traceback around it; the message is its last line
        raise UserError(str(e).strip().splitlines()[-1].rpartition("UserError: ")[2]) from e


def _end_epoch(
    fabric: Fabric,
    settings: PretrainSettings,
    data: PretrainData,
    run_dir: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    dataset: SampleDataset,
    step: int,
) -> None:
    epoch, last = step // settings.steps_per_epoch, step == settings.total_steps
    if last or epoch % settings.picture_epochs == 0:
        batch = torch.utils.data.default_collate([dataset[(settings.total_steps, i)] for i in range(PICTURE_SAMPLES)])
        method.eval()
        with fabric.autocast():
            made = method.reconstruct(fabric.to_device(batch))
        method.train()
        for view, pictures in made.items():
            path = run_dir / RECONSTRUCTIONS / f"epoch_{epoch:04d}_{view}.png"
            draw_reconstruction(path, pictures, batch["case"], data.format)
    if last or epoch % settings.checkpoint_epochs == 0:
        _check_weights(method, step)
        # the encoder first: a run counts as finished by its checkpoint, and then has its encoder
        export_encoder(run_dir, method, settings, data, step)
        state = {
            "step": step,
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "precision": fabric.strategy.precision.state_dict(),
        }
        save_checkpoint(run_dir, state)


def _check_weights(method: Method, step: int) -> None:
    wrong = [name for name, p in method.named_parameters() if not torch.isfinite(p).all()]
    if wrong:
        raise UserError(
            f"weights became infinite or NaN before step {step} ({wrong[0]} and {len(wrong) - 1} more), the last "
            "checkpoint is kept; lower --lr or use --precision fp32, under another --name"
        )


def _restore(fabric: Fabric, method: Method, optimizer: torch.optim.Optimizer, run_dir: Path) -> int:
    """Puts back what the last checkpoint holds and returns the next step."""
    state = load_checkpoint(run_dir)
    if state is None:
        logger.warning(f"{run_dir} was stopped before its first checkpoint: starting again from step 0")
        return 0
    method.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    fabric.strategy.precision.load_state_dict(state["precision"])
    return state["step"]


def _open_log(fabric: Fabric, settings: PretrainSettings, run_dir: Path, first_step: int) -> RunLog | None:
    if not fabric.is_global_zero:
        return None
    return RunLog(run_dir, first_step, settings.total_steps, settings.batch_size, settings.to_dict())


def _check_channels(settings: PretrainSettings, data: PretrainData) -> None:
    found = len(data.format.channel_names)
    if settings.spec.in_channels != found:
        raise UserError(
            f"the encoder takes {settings.spec.in_channels} channels, the images have {found} "
            f"({', '.join(data.format.channel_names)}); preprocess it again, or start under another --name"
        )
