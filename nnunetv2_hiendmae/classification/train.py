"""Training of a classifier: one readable loop on Lightning Fabric (device, precision)."""

import json
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.classification import network as net
from nnunetv2_hiendmae.classification.inputs import epoch_keys, warn_of_differences
from nnunetv2_hiendmae.classification.labels import read_split, write_split
from nnunetv2_hiendmae.classification.predict import COMMAND, compute_probabilities, measure, write_predictions
from nnunetv2_hiendmae.classification.settings import Task, build_task, run_name
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.optim import parameter_groups, warmup_cosine
from nnunetv2_hiendmae.options.commands import ClassifyOptions
from nnunetv2_hiendmae.training.launch import check_free_disk, launch
from nnunetv2_hiendmae.training.run_folder import RunLog, choose_run_dir, claimed, restore_state, save_state
from nnunetv2_hiendmae.training.volumes import SampleDataset, load_batches
from nnunetv2_hiendmae.weights import load_into, read_metadata

METRICS, PREDICTIONS, PREDICTIONS_TEST = "metrics.json", "predictions.csv", "predictions_test.csv"


def train(
    datasets: Iterable[str | int],
    labels_file: Path,
    encoder_file: Path,
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
    """
    options = replace(options or ClassifyOptions(), **changes)
    task = build_task(datasets, labels_file, encoder_file, options)
    return run_training(task, choose_run_dir(task.settings, "classification", run_name(labels_file, task.settings)))


def run_training(task: Task, run_dir: Path) -> Path:
    """`train` with a task that is decided, into `run_dir`."""
    network, metadata = _build(task)
    fabric = launch(task.settings.device, task.settings.precision, alone=COMMAND)
    check_free_disk(run_dir, network)
    with claimed(run_dir, task.settings, task.data.digest()):
        if task.settings.resume:
            task = replace(task, split=read_split(run_dir))
        else:
            write_split(run_dir, task.split)
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
    optimizer = torch.optim.AdamW(parameter_groups(network, settings.weight_decay), lr=settings.lr)
    model, optimizer = fabric.setup(network, optimizer)
    # what a checkpoint holds besides the next epoch and the best rank
    parts = {"network": network, "optimizer": optimizer, "precision": fabric.strategy.precision}
    before = restore_state(run_dir, parts, epoch=0, best=None) if settings.resume else {"epoch": 0, "best": None}
    best, epochs = before["best"], range(before["epoch"], settings.epochs)

    draw = partial(settings.inputs.draw, augment=settings.augmentation)
    samples = SampleDataset(task.subset(split.train), draw, settings.seed, case_in_key=True)
    keys = epoch_keys(epochs, len(split.train), settings.batch_size, settings.seed)
    batches = load_batches(fabric, samples, keys, settings.workers)
    steps = math.ceil(len(split.train) / settings.batch_size)
    weights = net.balanced_weights(task.targets(split.train), len(task.labels.classes)).to(fabric.device)
    with closing(RunLog(run_dir, "epoch", epochs.start, settings.epochs)) as log:
        for epoch in epochs:
            done, last = epoch + 1, epoch + 1 == settings.epochs
            model.train()
            total = 0.0
            for step in range(epoch * steps, done * steps):
                lr = settings.lr * warmup_cosine(step, settings.warmup_epochs * steps, settings.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = next(batches)
                loss = _loss(model, batch, task, weights, epoch)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item() * len(batch["case"])
            line = {"epoch": epoch, "loss": round(total / len(split.train), 7), "lr": lr}
            told = f"epoch {done}/{settings.epochs} loss {line['loss']:.4f} lr {lr:.2e}"
            if split.val and (last or done % settings.validate_epochs == 0):
                found = compute_probabilities(fabric, model, task.subset(split.val), settings.inputs, settings.workers)
                line["validation"] = measured = measure(task.labels, split.val, found)
                told += f", validation AUC {measured['auc']:.4f}"
                rank = [measured["auc"], -measured["log_loss"]]
                if best is None or rank > best:
                    best = rank
                    net.save_classifier(run_dir / net.BEST, network, replace(metadata, epoch=epoch))
            log.add(line, told)
            if last:
                net.save_classifier(run_dir / net.LAST, network, replace(metadata, epoch=epoch))
            if last or done % settings.checkpoint_epochs == 0:
                save_state(run_dir, parts, epoch=done, best=best)
        return log.last


def _loss(model: torch.nn.Module, batch: dict[str, Any], task: Task, weights: torch.Tensor, epoch: int) -> torch.Tensor:
    """Mean over the crops of a batch; every crop has the label of its case.

    Raises:
        UserError: it is not finite.
    """
    images, names = batch["image"], batch["case"]
    targets = task.targets(names).to(weights.device).repeat_interleave(images.shape[1])
    loss = net.weighted_cross_entropy(model(images.flatten(0, 1)), targets, weights)
    if not math.isfinite(loss.item()):
        raise UserError(
            f"the loss is {loss.item()} in epoch {epoch}; cases in this batch: {', '.join(names)}; look for broken "
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
