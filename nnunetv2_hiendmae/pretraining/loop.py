"""Pretraining: one readable loop, from the options to the encoder file."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, PROBE_ENCODER, STATE, STEP
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining.method import Batch, Method
from nnunetv2_hiendmae.pretraining.progress import RECONSTRUCTIONS, StepLog, draw_reconstruction
from nnunetv2_hiendmae.pretraining.run_probe import RunProbe
from nnunetv2_hiendmae.pretraining.settings import (
    PretrainSettings,
    Start,
    build_settings,
    extended,
    run_name,
    warn_if_seen,
)
from nnunetv2_hiendmae.pretraining.steps import Learner, part_processes, telling_full_memory
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.training import launch, run
from nnunetv2_hiendmae.training.batches import SampleDataset
from nnunetv2_hiendmae.training.grids import case_edges, warn_if_turned
from nnunetv2_hiendmae.training.stopping import check_still_there, noting_stop_signals, stopped
from nnunetv2_hiendmae.training.views import unaugmented
from nnunetv2_hiendmae.training.volumes import CaseSet, warn_if_padded
from nnunetv2_hiendmae.weights import EncoderMetadata, load_into, save_encoder

logger = logging.getLogger(__name__)

# samples in a reconstruction picture
PICTURE_SAMPLES = 4


def pretrain(datasets: Iterable[str | int], options: PretrainOptions | None = None, **changes: Any) -> Path | None:
    """Pretrains an encoder on preprocessed images, as `hiendmae pretrain` does: `pretrain([901], epochs=100)`.

    Under torchrun or SLURM every process calls this, the first one writes.

    Args:
        datasets: ids or names.
        changes: fields of `PretrainOptions` that are other than in `options`.

    Returns:
        The path of the run's encoder file; None in the processes that did not write it.

    Raises:
        UserError: bad options or data, a folder in use, a full disk, or a loss that is not finite.
        Stopped: Ctrl-C or SIGTERM ended it; the last step is saved.
    """
    return run_pretraining(*decide(datasets, options, changes))


def decide(
    datasets: Iterable[str | int], options: PretrainOptions | None, changes: dict[str, Any]
) -> tuple[PretrainSettings, CaseSet, Path]:
    """Settings, data and folder of a run; see `pretrain`."""
    options = replace(options or PretrainOptions(), **changes)
    settings, data = build_settings(datasets, options)
    run_dir = run.choose_run_dir(settings, "pretraining", run_name(settings))
    return extended(settings, options, run_dir), data, run_dir


def run_pretraining(settings: PretrainSettings, data: CaseSet, run_dir: Path) -> Path | None:
    """`pretrain` with settings that are decided, into `run_dir`."""
    fabric, method = prepare(settings, run_dir)
    with ExitStack() as held:

        def claim() -> None:
            check(settings, data, method, run_dir)
            held.enter_context(run.claimed(run_dir, settings, data.digest()))

        launch.on_first_process(fabric, claim)
        with telling_full_memory(settings):
            _run(fabric, settings, data, method, run_dir)
    part_processes(fabric)
    return run_dir / ENCODER if fabric.is_global_zero else None


def prepare(settings: PretrainSettings, run_dir: Path) -> tuple[Fabric, Method]:
    """This process as one of several, and the method as it starts, unless a checkpoint of the run has its weights.

    Raises:
        UserError: a batch that processes and micro-batches do not divide, an encoder file that does not fit, or no such
            device.
    """
    processes, accumulate = launch.num_processes(), settings.accumulate
    if settings.batch_size % (processes * accumulate):
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be split over {processes} processes x {accumulate} "
            f"micro-batches, needed a multiple of {processes * accumulate}"
        )
    method = settings.build_method()
    if method.compares_samples and settings.batch_size < 2 * accumulate:
        raise UserError(
            f"--batch-size {settings.batch_size} in {accumulate} micro-batches leaves 1 sample in each, {method.name} "
            "needs at least 2 to compare; raise --batch-size, or lower --accumulate"
        )
    if settings.start and not (settings.resume and (run_dir / CHECKPOINT).exists()):
        report = method.start_encoder(partial(load_into, path=Path(settings.start.file)))
        logger.info(f"the encoder starts from {settings.start.file}: {report.text()}")
    # forward, and twice as much backward: a multiplication and an addition per parameter and token
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    samples = settings.batch_size // (processes * accumulate)
    work = 6.0 * trained * settings.spec.num_tokens * samples
    spare = settings.checkpoint_activations
    return launch.launch(settings.device, settings.precision, work, spare_memory=spare), method


def check(settings: PretrainSettings, data: CaseSet, method: Method, run_dir: Path) -> None:
    """Warns of data that may not be meant; raises UserError where the disk is too full for a run."""
    warn_if_padded(data.cases, method.views().padded_below)
    warn_if_turned(data.cases)
    warn_if_seen(settings, data)
    run.check_free_disk(run_dir, method)


def _run(fabric: Fabric, settings: PretrainSettings, data: CaseSet, method: Method, run_dir: Path) -> None:
    learner = Learner.set_up(fabric, settings, method)
    first_step, parts = learner.restore(run_dir), learner.parts
    if first_step == settings.total_steps:
        logger.info(f"{run_dir} was already finished")
        if fabric.is_global_zero and not (run_dir / ENCODER).exists():
            export_encoder(run_dir, method, settings, data, first_step)
        return
    if settings.resume and fabric.is_global_zero:
        logger.info(f"{run_dir} goes on at step {first_step} of {settings.total_steps}")
    steps = range(first_step, settings.total_steps)
    with (
        # workers end here, and not whenever their batches are collected
        closing(learner.batches(data, steps)) as batches,
        closing(StepLog(run_dir, first_step, settings)) if fabric.is_global_zero else nullcontext() as log,
        noting_stop_signals(fabric.is_global_zero) as noted,
    ):
        probe = None
        if log and settings.probe:
            export = partial(export_encoder, run_dir, method, settings, data)
            probe = RunProbe(fabric, settings, data, method.encoder, run_dir / PROBE_ENCODER, export)
            probe.begin(log)
        for step in steps:
            measured = learner.step(step, batches)
            where = f"after step {step + 1} of {settings.total_steps}"
            save = partial(_save, settings, run_dir, parts, data, step + 1)
            if log:
                check_still_there(run_dir, where, save)
                if probe and probe.is_due(step + 1):
                    check_finite_weights(method, step + 1)
                    measured |= probe.measure(step + 1)
                log.step(step, measured)
            if log and (step + 1) % settings.steps_per_epoch == 0:
                _end_epoch(fabric, settings, run_dir, parts, data, step + 1)
                log.end_epoch(last=step + 1 == settings.total_steps)
            # a signal in the last step finds nothing to stop
            if step + 1 < settings.total_steps and (number := _noted_anywhere(fabric, noted())):
                if log:
                    save()
                # nobody ends before the checkpoint is whole
                part_processes(fabric)
                raise stopped(number, where)


def _noted_anywhere(fabric: Fabric, number: int) -> int:
    """The signal that any process has noted: all stop at the same step."""
    if fabric.world_size == 1:
        return number
    return int(fabric.all_reduce(torch.tensor(float(number), device=fabric.device), reduce_op="max").item())


def _end_epoch(
    fabric: Fabric, settings: PretrainSettings, run_dir: Path, parts: dict[str, Any], data: CaseSet, step: int
) -> None:
    method, epoch, last = parts[STATE], step // settings.steps_per_epoch, step == settings.total_steps
    if last or epoch % settings.picture_epochs == 0:
        batch, edges = _picture_samples(data, method, settings)
        method.eval()
        with fabric.autocast():
            made = method.reconstruct(fabric.to_device(batch))
        method.train()
        for view, pictures in made.items():
            path = run_dir / RECONSTRUCTIONS / f"epoch_{epoch:04d}_{view}.png"
            draw_reconstruction(path, pictures, batch["case"], data.format, edges)
    if last or epoch % settings.checkpoint_epochs == 0:
        _save(settings, run_dir, parts, data, step)


def _picture_samples(data: CaseSet, method: Method, settings: PretrainSettings) -> tuple[Batch, list[str]]:
    """The samples of pictures, the same in every epoch, and the letters of their edges. No case is drawn twice while
    there are others, and nothing is augmented: a mirrored patient would have wrong letters."""
    order = np.random.default_rng(settings.seed).permutation(len(data.cases))
    chosen = np.resize(order, PICTURE_SAMPLES).tolist()
    samples = SampleDataset(data, unaugmented(method.views()).draw, settings.seed, case_in_key=True)
    drawn = [samples[settings.total_steps, i, case] for i, case in enumerate(chosen)]
    return torch.utils.data.default_collate(drawn), [case_edges(data.cases[case]) for case in chosen]


def _save(settings: PretrainSettings, run_dir: Path, parts: dict[str, Any], data: CaseSet, step: int) -> None:
    """Encoder file and checkpoint, after so many steps."""
    method = parts[STATE]
    check_finite_weights(method, step)
    # the encoder first: a run counts as finished by its checkpoint, and then has its encoder
    export_encoder(run_dir, method, settings, data, step)
    run.save_state(run_dir, parts, **{STEP: step})


def check_finite_weights(method: Method, step: int) -> None:
    """Raises UserError: a weight is infinite or NaN after so many steps."""
    wrong = [name for name, p in method.named_parameters() if not torch.isfinite(p).all()]
    if wrong:
        raise UserError(
            f"weights became infinite or NaN before step {step} ({some(wrong, 1)}), the last checkpoint is kept; "
            "lower --lr or use --precision fp32, under another --name"
        )


def export_encoder(
    run_dir: Path,
    method: Method,
    settings: PretrainSettings,
    data: CaseSet,
    step: int,
    file: str = ENCODER,
    **chosen_by: Any,
) -> None:
    """Writes `encoder.safetensors` of a run, or another file of an encoder that was chosen. Its bytes depend on
    settings, data and weights only, and on what it was chosen by."""
    decided = {k: v for k, v in settings.deciding().items() if k not in ("spec", "probe")}
    start = settings.start or Start()
    licence = "that of the images it was trained on; the software is Apache-2.0"
    metadata = EncoderMetadata(
        settings.spec,
        settings.method,
        data.format,
        citations=tuple(dict.fromkeys((*start.citations, *RECIPES[settings.method].citations))),
        licence=f"{licence}; of the weights that it started from: {start.licence}" if settings.start else licence,
        source=start.source,
        source_sha256=start.source_sha256,
        training={"step": step, "cases": len(data.cases), **decided, **chosen_by},
    )
    save_encoder(run_dir / file, method.encoder.state_dict(), metadata)
