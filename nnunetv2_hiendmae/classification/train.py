"""Training of a classifier: what a run computes, and one readable loop on Lightning Fabric (device, precision)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.classification import network as net
from nnunetv2_hiendmae.classification.inputs import Inputs, epoch_keys, forward_work, warn_of_differences
from nnunetv2_hiendmae.classification.labels import SPLIT, Labels, Split, choose_split, read_labels
from nnunetv2_hiendmae.classification.predict import (
    COMMAND,
    compute_probabilities,
    measure,
    tell_auc,
    write_predictions,
)
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import SETTINGS, read_settings, sha256, write_text
from nnunetv2_hiendmae.optim import adamw, parameter_groups, warmup_cosine
from nnunetv2_hiendmae.options.commands import ANTIALIASED, RESIZE, ClassifyOptions
from nnunetv2_hiendmae.training import run
from nnunetv2_hiendmae.training.batches import SampleDataset, load_batches
from nnunetv2_hiendmae.training.launch import choose_precision, launch
from nnunetv2_hiendmae.training.runlog import RunLog
from nnunetv2_hiendmae.training.stopping import check_still_there, noting_stop_signals, stopped
from nnunetv2_hiendmae.training.volumes import CaseSet, find_cases
from nnunetv2_hiendmae.weights import EncoderMetadata, load_into, read_metadata
from nnunetv2_hiendmae.weights.hub import lasting_path, local_file

METRICS, PREDICTIONS, PREDICTIONS_TEST = "metrics.json", "predictions.csv", "predictions_test.csv"
# ours, nobody published them: that of end-to-end fine-tuning for segmentation, ten times that for a linear layer alone
LR, LR_FROZEN = 1e-4, 1e-3
WARMUP_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class ClassifySettings(run.RunSettings, ClassifyOptions):
    """What a run computes, and how: its options, all decided but `fold`.

    Args:
        spec: of the encoder in the network; may differ from that of the file in crop and channels.
        encoder_file, encoder_sha256: whose weights the encoder starts with, unless `from_scratch`.
        labels_sha256: of cases, labels and places.
        fold: number or "all"; None where a column of the labels splits.
        lr: peak learning rate of AdamW, after `warmup_epochs`, cosine to 0 at the end.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    spec: EncoderSpec
    encoder_file: str
    encoder_sha256: str
    labels_sha256: str
    inputs: Inputs

    keys: ClassVar = (
        *("datasets", "plans_name", "configuration", "spec", "encoder_file", "encoder_sha256", "labels_sha256", "fold"),
        *("fraction", "inputs", "epochs", "warmup_epochs", "batch_size", "lr", "weight_decay", "precision", "pool"),
        *("freeze_encoder", "from_scratch", "augmentation", "seed", "split_seed", "validate_epochs"),
        "checkpoint_epochs",
    )
    not_deciding: ClassVar = ("encoder_file", "checkpoint_epochs")

    def __post_init__(self):
        super().__post_init__()
        if self.pool == "cls" and not self.spec.cls_token:
            raise UserError("--pool cls, but the encoder has no CLS token; use --pool mean")

    def resized_as(self, before: Mapping[str, Any]) -> "ClassifySettings":
        """With whole volumes resized as in the run that is continued: runs of 0.1 had no anti-aliasing."""
        old = self.input == RESIZE and (before.get("inputs") or {}).get("mode") == RESIZE
        return replace(self, inputs=replace(self.inputs, mode=RESIZE)) if old else self


@dataclass(frozen=True)
class Task:
    """A run's settings, its labelled cases and which of them train."""

    settings: ClassifySettings
    data: CaseSet
    labels: Labels
    split: Split

    def subset(self, names: Sequence[str]) -> CaseSet:
        """The named cases, in that order."""
        by_name = {case.name: case for case in self.data.cases}
        return replace(self.data, cases=tuple(by_name[name] for name in names))

    def targets(self, names: Sequence[str]) -> torch.Tensor:
        """Class indices (n,) of the named cases."""
        return torch.tensor([self.labels.targets[name] for name in names])


def build_task(
    datasets: Iterable[str | int], labels_file: Path, encoder_file: str | Path, options: ClassifyOptions
) -> Task:
    """Task of a run; writes nothing.

    Raises:
        UserError: anything about the labels, the data, the encoder file or an option is wrong.
    """
    encoder_file = local_file(encoder_file)
    metadata = read_metadata(encoder_file)
    data = find_cases(datasets, options.plans_name, options.configuration)
    labels = read_labels(labels_file, [case.name for case in data.cases])
    split = choose_split(labels, options.fold, options.fraction, options.split_seed)
    spec = _spec(metadata, len(data.format.channel_names), options.crop_size)
    values = {
        "warmup_epochs": int(WARMUP_FRACTION * options.epochs),
        "lr": LR_FROZEN if options.freeze_encoder else LR,
        **{name: value for name, value in vars(options).items() if value is not None},
        "datasets": data.datasets,
        "spec": spec,
        "encoder_file": str(lasting_path(encoder_file)),
        "encoder_sha256": sha256(encoder_file),
        "labels_sha256": labels.digest(),
        "fold": None if labels.column == SPLIT else options.fold or "0",
        "inputs": Inputs(ANTIALIASED if options.input == RESIZE else options.input, spec.img_size, options.crops),
        "precision": choose_precision(options.precision, options.device),
    }
    settings = ClassifySettings(**values)
    labelled = tuple(case for case in data.cases if case.name in labels.targets)
    return Task(settings, replace(data, cases=labelled), labels, split)


def run_name(labels_file: Path, settings: ClassifySettings) -> str:
    """Default name of a run: label file, encoder's method, what trains, input, share of the labels, fold."""
    method = "scratch" if settings.from_scratch else read_metadata(settings.encoder_file).method
    trained = "probe" if settings.freeze_encoder else "finetune"
    share = f"{100 * settings.fraction:g}pct"
    fold = SPLIT if settings.fold is None else f"fold{settings.fold}"
    return "_".join([Path(labels_file).stem, method, trained, settings.input, share, fold])


def _spec(metadata: EncoderMetadata, channels: int, crop_size: Sequence[int] | None) -> EncoderSpec:
    source = metadata.spec
    if source.in_channels not in (1, channels):
        raise UserError(
            f"the encoder has {source.in_channels} input channels, the images {channels}: only 1 can be spread; choose "
            "another -w"
        )
    try:
        # stochastic depth draws from the global generator: not reproducible from (seed, epoch, case)
        return source.with_(in_channels=channels, img_size=tuple(crop_size or source.img_size), drop_path_rate=0.0)
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the encoder's patch") from e


def train(
    datasets: Iterable[str | int],
    labels_file: Path,
    encoder_file: str | Path,
    options: ClassifyOptions | None = None,
    **changes: Any,
) -> Path:
    """Trains a classifier on preprocessed, labelled cases, as `hiendmae classify train` does, and writes metrics.json
    and predictions.csv of the best model into the run folder.

    The best model is the one with the highest AUC on the validation cases, of equal ones that with the lowest log
    loss, of equal ones the first. Without validation cases it is the last.

    Args:
        datasets: ids or names.
        labels_file: CSV with the columns case, label and, if wanted, fold or split.
        encoder_file: of `hiendmae pretrain` or `hiendmae convert`.
        changes: fields of `ClassifyOptions` that are other than in `options`.

    Returns:
        The path of metrics.json.

    Raises:
        UserError: bad options, labels or data, the encoder does not fit, a folder in use, a full disk, or a loss that
            is not finite.
        Stopped: Ctrl-C or SIGTERM ended it; the last step is saved.
    """
    options = replace(options or ClassifyOptions(), **changes)
    task = build_task(datasets, labels_file, encoder_file, options)
    run_dir = run.choose_run_dir(task.settings, "classification", run_name(labels_file, task.settings))
    if options.resume and (run_dir / SETTINGS).is_file():
        task = replace(task, settings=task.settings.resized_as(read_settings(run_dir)))
    return run_training(task, run_dir)


def run_training(task: Task, run_dir: Path) -> Path:
    """`train` with a task that is decided, into `run_dir`."""
    network, metadata = _build(task)
    work = task.settings.batch_size * forward_work(network, task.settings.inputs)
    # backward is twice as much
    fabric = launch(task.settings.device, task.settings.precision, 3 * work, alone=COMMAND)
    run.check_free_disk(run_dir, network)
    with run.claimed(run_dir, task.settings, task.data.digest()):
        if task.settings.resume:
            task = replace(task, split=Split.read(run_dir))
        else:
            task.split.write(run_dir)
        try:
            last = _run(fabric, task, network, metadata, run_dir)
            return _report(fabric, task, run_dir, last)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the GPU's memory is full with {task.settings.batch_size} cases x {task.settings.inputs.crops} "
                "inputs; lower --batch-size or --crops, under another --name"
            ) from e


def _build(task: Task) -> tuple[net.Classifier, net.ClassifierMetadata]:
    """The network with its encoder's weights, and what its file will say."""
    settings, classes = task.settings, task.labels.classes
    seen = read_metadata(settings.encoder_file)
    network = net.build_classifier(settings.spec, len(classes), settings.pool, settings.freeze_encoder, settings.seed)
    if not settings.from_scratch:
        load_into(network.encoder, settings.encoder_file)
        warn_of_differences(task.data, settings.inputs, seen.volume, "the encoder")
    metadata = net.ClassifierMetadata(
        **{name: getattr(settings, name) for name in ("spec", "pool", "inputs", "plans_name", "configuration")},
        classes=classes,
        volumes=task.data.format,
        method=None if settings.from_scratch else seen.method,
        citations=() if settings.from_scratch else seen.citations,
    )
    return network, metadata


def _run(
    fabric: Fabric, task: Task, network: net.Classifier, metadata: net.ClassifierMetadata, run_dir: Path
) -> dict[str, Any]:
    """All epochs that are left; returns the last one's line of the log."""
    settings, split = task.settings, task.split
    optimizer = adamw(parameter_groups(network, settings.weight_decay), settings.lr)
    model, optimizer = fabric.setup(network, optimizer)
    # what a checkpoint holds besides the next epoch and the best rank
    parts = {"network": network, "optimizer": optimizer, "precision": fabric.strategy.precision}
    before = run.restore_state(run_dir, parts, epoch=0, best=None) if settings.resume else {"epoch": 0, "best": None}
    best, epochs = before["best"], range(before["epoch"], settings.epochs)
    # of an epoch that a signal cut: its finished steps, and the sum of their losses
    cut, total = before.get("steps", 0), before.get("total", 0.0)

    draw = partial(settings.inputs.draw, augment=settings.augmentation)
    samples = SampleDataset(task.subset(split.train), draw, settings.seed, case_in_key=True)
    keys = epoch_keys(epochs, len(split.train), settings.batch_size, settings.seed)
    steps = math.ceil(len(split.train) / settings.batch_size)
    weights = net.balanced_weights(task.targets(split.train), len(task.labels.classes)).to(fabric.device)
    with (
        # workers end here, and not whenever their batches are collected
        closing(load_batches(fabric, samples, islice(keys, cut, None), settings.workers)) as batches,
        closing(RunLog(run_dir, "epoch", epochs.start, settings.epochs)) as log,
        noting_stop_signals() as noted,
    ):
        for epoch in epochs:
            done, last = epoch + 1, epoch + 1 == settings.epochs
            model.train()
            lrs = [
                settings.lr * warmup_cosine(step, settings.warmup_epochs * steps, settings.epochs * steps)
                for step in range(epoch * steps, done * steps)
            ]
            for finished, lr in enumerate(lrs[cut:], cut + 1):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = next(batches)
                loss = _loss(model, batch, task, weights)
                fabric.backward(loss)
                # looked at once, and now: each look makes the CPU wait for a GPU
                value = _finite(loss.item(), batch, epoch)
                optimizer.step()
                optimizer.zero_grad()
                total += value * len(batch["case"])
                where = f"after step {finished} of {steps} in epoch {done} of {settings.epochs}"
                save = partial(run.save_state, run_dir, parts, epoch=epoch, best=best, steps=finished, total=total)
                check_still_there(run_dir, where, save)
                # a signal in the last step finds nothing to stop
                if (finished < steps or not last) and (number := noted()):
                    save()
                    raise stopped(number, where)
            line = {"epoch": epoch, "loss": round(total / len(split.train), 7), "lr": lrs[-1]}
            told = f"epoch {done}/{settings.epochs} loss {line['loss']:.4f} lr {lrs[-1]:.2e}"
            if split.val and (last or done % settings.validate_epochs == 0):
                found = compute_probabilities(fabric, model, task.subset(split.val), settings.inputs, settings.workers)
                line["validation"] = measured = measure(task.labels, split.val, found)
                told += f", validation {tell_auc(measured)}"
                rank = [measured["auc"], -measured["log_loss"]]
                if best is None or rank > best:
                    best = rank
                    net.save_classifier(run_dir / net.BEST, network, replace(metadata, epoch=epoch))
            log.add(line, told)
            if last:
                net.save_classifier(run_dir / net.LAST, network, replace(metadata, epoch=epoch))
            if last or done % settings.checkpoint_epochs == 0:
                run.save_state(run_dir, parts, epoch=done, best=best)
            cut, total = 0, 0.0
        return log.last


def _loss(model: torch.nn.Module, batch: dict[str, Any], task: Task, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the crops of a batch; every crop has the label of its case."""
    images = batch["image"]
    targets = task.targets(batch["case"]).to(weights.device).repeat_interleave(images.shape[1])
    return net.weighted_cross_entropy(model(images.flatten(0, 1)), targets, weights)


def _finite(loss: float, batch: dict[str, Any], epoch: int) -> float:
    """The loss of a batch, a UserError unless finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} in epoch {epoch}; cases in this batch: {', '.join(batch['case'])}; look for broken "
            "intensities in them, or lower --lr, or use --precision fp32, under another --name"
        )
    return loss


def _report(fabric: Fabric, task: Task, run_dir: Path, last: dict[str, Any]) -> Path:
    """Predictions and metrics of the best model, as its file is read again."""
    settings, split, labels = task.settings, task.split, task.labels
    file = run_dir / (net.BEST if split.val else net.LAST)
    network, metadata = net.load_classifier(file)
    model = fabric.setup(network)
    metrics = {
        "model": file.name,
        "epoch": metadata.epoch,
        "classes": labels.classes,
        "fold": settings.fold,
        "fraction": settings.fraction,
        "training_cases": len(split.train),
        "validation": None,
        "test": None,
        "last": last,
    }
    for key, names, table in (("validation", split.val, PREDICTIONS), ("test", split.test, PREDICTIONS_TEST)):
        if names:
            found = compute_probabilities(fabric, model, task.subset(names), settings.inputs, settings.workers)
            write_predictions(run_dir / table, labels.classes, names, found, labels)
            metrics[key] = measure(labels, names, found)
    write_text(run_dir / METRICS, json.dumps(metrics, indent=2))
    return run_dir / METRICS
