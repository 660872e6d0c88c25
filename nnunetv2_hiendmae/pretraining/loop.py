"""Pretraining: what a run computes, the user's options over defaults of the method and the preset; and one readable
loop on Lightning Fabric (devices, DDP, precision, accumulation)."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from torch import Tensor

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_id
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import ENCODER, STATE, STEP
from nnunetv2_hiendmae.optim import parameter_groups, warmup_cosine
from nnunetv2_hiendmae.options import parse_assignments
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.method import Batch, Method
from nnunetv2_hiendmae.pretraining.progress import RECONSTRUCTIONS, StepLog, draw_reconstruction
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.training import run
from nnunetv2_hiendmae.training.views import step_keys
from nnunetv2_hiendmae.training.volumes import (
    CaseSet,
    SampleDataset,
    check_crop_size,
    find_cases,
    load_batches,
    warn_if_padded,
)
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder

logger = logging.getLogger(__name__)

# samples in a reconstruction picture; drawn as if they belonged to the step after the last
PICTURE_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(run.RunSettings, PretrainOptions):
    """What a run computes, and how: its options, all decided.

    Args:
        options: of the method.
        batch_size: crops per optimizer step over all processes and accumulated micro-batches.
        betas: of AdamW.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    options: dict[str, Any]
    spec: EncoderSpec
    betas: tuple[float, float]

    keys: ClassVar = (
        *("datasets", "plans_name", "configuration", "method", "options", "spec", "epochs", "steps_per_epoch"),
        *("warmup_epochs", "batch_size", "accumulate", "lr", "weight_decay", "betas", "precision", "seed"),
        *("checkpoint_epochs", "picture_epochs"),
    )
    not_deciding: ClassVar = ("accumulate", "checkpoint_epochs", "picture_epochs")

    def __post_init__(self):
        super().__post_init__()
        if self.spec.drop_path_rate:
            # its draws come from the global generator: neither stateless nor in the checkpoint
            raise UserError(
                f"drop_path_rate {self.spec.drop_path_rate} is for fine-tuning only, needed 0 in pretraining"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak learning rate."""
        return self.warmup_epochs * self.steps_per_epoch

    def build_method(self) -> Method:
        """The method with freshly initialised weights; the same ones for the same seed."""
        torch.manual_seed(self.seed)
        try:
            return METHODS[self.method](self.spec, **self.options)
        except (ValueError, AssertionError, RuntimeError) as e:
            # timm and torch check sizes with assertions and runtime errors
            raise UserError(f"{self.method} cannot be built with {self.options}: {e}; change --set") from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PretrainSettings":
        """Inverse of `to_dict`; how a run is carried out is as by default.

        Raises:
            ValueError, TypeError: keys are missing or unknown, or a value is not of its kind.
            UserError: a value is out of range.
        """
        if differing := set(data) ^ set(cls.keys):
            raise ValueError(f"missing or unknown: {', '.join(sorted(differing))}")
        as_tuples = {name: tuple(data[name]) for name in ("datasets", "betas")}
        return cls(**{**data, **as_tuples, "spec": EncoderSpec.from_dict(data["spec"])})


def build_settings(datasets: Iterable[str | int], options: PretrainOptions) -> tuple[PretrainSettings, CaseSet]:
    """Settings and data of a run.

    Raises:
        UserError: unknown method, preset or option, a crop that the patch does not divide, or no such data.
    """
    if options.method not in METHODS:
        raise UserError(f"unknown method '{options.method}', needed one of {', '.join(METHODS)}; see: hiendmae methods")
    method = METHODS[options.method]
    method_options = read_options(method, options.method_options or ())
    data = find_cases(datasets, options.plans_name, options.configuration)
    recipe = method.recipe
    epochs, batch_size = options.epochs or recipe.epochs, options.batch_size or recipe.batch_size
    values = {
        **vars(recipe),
        "warmup_epochs": min(recipe.warmup_epochs, epochs // 10),
        # fewer micro-batches where the batch of a process cannot be split into as many
        "accumulate": math.gcd(recipe.accumulate, batch_size // run.num_processes()),
        **{name: value for name, value in vars(options).items() if value is not None},
        "datasets": data.datasets,
        "options": method_options,
        "spec": _spec(options, options.encoder or recipe.encoder, len(data.format.channel_names)),
        "precision": run.choose_precision(options.precision, options.device),
    }
    settings = PretrainSettings(**values)
    if options.crop_size:
        check_crop_size(data.cases, options.crop_size)
    with torch.device("meta"):
        # what cannot be built is told before anything is written
        settings.build_method()
    return settings, data


def run_name(settings: PretrainSettings) -> str:
    """Default name of a run: method, preset and dataset ids."""
    return "_".join([settings.method, settings.encoder, *(f"{dataset_id(name):03d}" for name in settings.datasets)])


def read_options(method: type[Method], asked: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method from texts `key=value`, or as they are.

    Raises:
        UserError: no '=', an unknown key, or a value of another type.
    """
    if not isinstance(asked, Mapping):
        return parse_assignments(method.Options, list(asked), method.name)
    unknown = [name for name in asked if name not in method.defaults()]
    if unknown:
        raise UserError(f"{unknown[0]} is no option of {method.name}, needed some of: {', '.join(method.defaults())}")
    return dict(asked)


def _spec(options: PretrainOptions, preset: str, channels: int) -> EncoderSpec:
    if preset not in PRESETS:
        raise UserError(f"unknown encoder '{preset}', needed one of {', '.join(PRESETS)}; see: hiendmae presets")
    sizes = {"patch_size": options.patch_size, "img_size": options.crop_size}
    try:
        return PRESETS[preset].with_(in_channels=channels, **{k: tuple(v) for k, v in sizes.items() if v})
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the patch, or another --patch-size") from e


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
    """
    options = replace(options or PretrainOptions(), **changes)
    settings, data = build_settings(datasets, options)
    return run_pretraining(settings, data, run.choose_run_dir(settings, "pretraining", run_name(settings)))


def run_pretraining(settings: PretrainSettings, data: CaseSet, run_dir: Path) -> Path | None:
    """`pretrain` with settings that are decided, into `run_dir`."""
    processes, accumulate = run.num_processes(), settings.accumulate
    if settings.batch_size % (processes * accumulate):
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be split over {processes} processes x {accumulate} "
            f"micro-batches, needed a multiple of {processes * accumulate}"
        )
    method = settings.build_method()
    fabric = run.launch(settings.device, settings.precision)
    with ExitStack() as held:

        def claim() -> None:
            warn_if_padded(data.cases, method.views().padded_below)
            run.check_free_disk(run_dir, method)
            held.enter_context(run.claimed(run_dir, settings, data.digest()))

        run.on_first_process(fabric, claim)
        try:
            _run(fabric, settings, data, method, run_dir)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the GPU's memory is full with batch {settings.batch_size} in {settings.accumulate} micro-batches; "
                "raise --accumulate (same result, less memory), or lower --batch-size"
            ) from e
    return run_dir / ENCODER if fabric.is_global_zero else None


def _run(fabric: Fabric, settings: PretrainSettings, data: CaseSet, method: Method, run_dir: Path) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(method, settings.weight_decay), lr=settings.lr, betas=settings.betas)
    model, optimizer = fabric.setup(method, optimizer)
    # what a checkpoint holds besides the step
    parts = {STATE: method, "optimizer": optimizer, "precision": fabric.strategy.precision}
    first_step = run.restore_state(run_dir, parts, **{STEP: 0})[STEP] if settings.resume else 0
    if first_step == settings.total_steps:
        logger.info(f"{run_dir} was already finished")
        return
    steps = range(first_step, settings.total_steps)
    dataset = SampleDataset(data, method.views().draw, settings.seed)
    keys = step_keys(steps, settings.batch_size, settings.accumulate, fabric.global_rank, fabric.world_size)
    batches = load_batches(fabric, dataset, keys, settings.workers)
    with closing(StepLog(run_dir, first_step, settings)) if fabric.is_global_zero else nullcontext() as log:
        for step in steps:
            lr = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = _backward(fabric, method, model, islice(batches, settings.accumulate), settings.accumulate, step)
            optimizer.step()
            optimizer.zero_grad()
            method.synchronize(lambda tensor: _mean_over_processes(fabric, tensor))
            method.after_step((step + 1) / settings.total_steps)
            if log:
                log.step(step, {**losses, "lr": lr})
            if log and (step + 1) % settings.steps_per_epoch == 0:
                _end_epoch(fabric, settings, run_dir, parts, dataset, step + 1)
                log.end_epoch(last=step + 1 == settings.total_steps)


def _backward(
    fabric: Fabric, method: Method, model: Any, batches: Iterator[Batch], accumulate: int, step: int
) -> dict[str, float]:
    """Gradients of one optimizer step; losses summed over the method's parts, mean over micro-batches and processes. A
    loss that is not finite in any process is a UserError; weights are as before the step."""
    totals: dict[str, Tensor] = {}
    parts = range(method.num_parts)
    left = accumulate * len(parts)
    for batch, part in ((batch, part) for batch in batches for part in parts):
        left -= 1
        with fabric.no_backward_sync(model, enabled=left > 0):
            losses = model(batch, part)
            mean = {k: _mean_over_processes(fabric, v.detach()) for k, v in losses.items()}
            if not math.isfinite(mean["loss"].item()):
                raise _not_finite(losses["loss"].item(), batch, f"at step {step}, weights are unchanged")
            fabric.backward(losses["loss"] / accumulate)
        for key, value in mean.items():
            totals[key] = totals.get(key, 0.0) + value / accumulate
    return {k: round(v.item(), 7) for k, v in totals.items()}


def _mean_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    # all_reduce works in place
    return fabric.all_reduce(tensor.clone(), reduce_op="mean")


def _not_finite(loss: float, batch: Batch, when: str) -> UserError:
    if math.isfinite(loss):
        return UserError(f"the loss is not finite in another process {when}; see its message")
    return UserError(
        f"the loss is {loss} {when}; cases in this batch: {', '.join(sorted(set(batch['case'])))}; look for broken "
        "intensities in them, or lower --lr, or use --precision fp32"
    )


def _end_epoch(
    fabric: Fabric, settings: PretrainSettings, run_dir: Path, parts: dict[str, Any], dataset: SampleDataset, step: int
) -> None:
    method, epoch, last = parts[STATE], step // settings.steps_per_epoch, step == settings.total_steps
    if last or epoch % settings.picture_epochs == 0:
        batch = torch.utils.data.default_collate([dataset[(settings.total_steps, i)] for i in range(PICTURE_SAMPLES)])
        method.eval()
        with fabric.autocast():
            made = method.reconstruct(fabric.to_device(batch))
        method.train()
        for view, pictures in made.items():
            path = run_dir / RECONSTRUCTIONS / f"epoch_{epoch:04d}_{view}.png"
            draw_reconstruction(path, pictures, batch["case"], dataset.data.format)
    if last or epoch % settings.checkpoint_epochs == 0:
        wrong = [name for name, p in method.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise UserError(
                f"weights became infinite or NaN before step {step} ({some(wrong, 1)}), the last checkpoint is kept; "
                "lower --lr or use --precision fp32, under another --name"
            )
        # the encoder first: a run counts as finished by its checkpoint, and then has its encoder
        export_encoder(run_dir, method, settings, dataset.data, step)
        run.save_state(run_dir, parts, **{STEP: step})


def export_encoder(run_dir: Path, method: Method, settings: PretrainSettings, data: CaseSet, step: int) -> None:
    """Writes `encoder.safetensors` of a run. Its bytes depend on settings, data and weights only."""
    decided = {k: v for k, v in settings.deciding().items() if k != "spec"}
    metadata = EncoderMetadata(
        settings.spec,
        settings.method,
        data.format,
        citations=RECIPES[settings.method].citations,
        licence="that of the images it was trained on; the software is Apache-2.0",
        training={"step": step, "cases": len(data.cases), **decided},
    )
    save_encoder(run_dir / ENCODER, method.encoder.state_dict(), metadata)
