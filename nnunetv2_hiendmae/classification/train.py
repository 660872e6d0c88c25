"""Training of a classifier: one readable loop on Lightning Fabric (device, precision)."""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from nnunetv2_hiendmae.classification.data import EpochSampler, TrainingCases, batches_of, warn_of_differences
from nnunetv2_hiendmae.classification.device import single_device
from nnunetv2_hiendmae.classification.labels import Labels
from nnunetv2_hiendmae.classification.model_file import (
    BEST,
    LAST,
    ClassifierMetadata,
    load_classifier,
    save_classifier,
)
from nnunetv2_hiendmae.classification.network import (
    Classifier,
    balanced_weights,
    build_classifier,
    weighted_cross_entropy,
)
from nnunetv2_hiendmae.classification.predict import compute_probabilities, measure, write_predictions
from nnunetv2_hiendmae.classification.runs import EpochLog, load_checkpoint
from nnunetv2_hiendmae.classification.settings import ClassifySettings
from nnunetv2_hiendmae.classification.splits import Split, read_split, write_split
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.optim import parameter_groups, warmup_cosine
from nnunetv2_hiendmae.pretraining.checkpoint import claim_run, locked, save_checkpoint
from nnunetv2_hiendmae.pretraining.data import Case, PretrainData, build_loader
from nnunetv2_hiendmae.pretraining.launch import Execution, check_free_disk
from nnunetv2_hiendmae.weights import load_into, read_metadata

logger = logging.getLogger(__name__)

METRICS, PREDICTIONS, PREDICTIONS_TEST = "metrics.json", "predictions.csv", "predictions_test.csv"


@dataclass(frozen=True)
class Task:
    """A run's settings, its labelled cases and which of them train."""

    settings: ClassifySettings
    data: PretrainData
    labels: Labels
    split: Split

    def cases(self, names: Sequence[str]) -> list[Case]:
        """The named cases, in that order."""
        by_name = {case.name: case for case in self.data.cases}
        return [by_name[name] for name in names]

    def targets(self, names: Sequence[str]) -> torch.Tensor:
        """Class indices (n,) of the named cases."""
        return torch.tensor([self.labels.targets[name] for name in names])


def train(task: Task, run_dir: Path, execution: Execution, resume: bool = False) -> Path:
    """Trains into `run_dir` and writes metrics.json and predictions.csv of the best model there.

    The best model is the one with the highest AUC on the validation cases, of equal ones that with the lowest log
    loss, of equal ones the first. Without validation cases it is the last.

    Returns:
        The path of metrics.json.

    Raises:
        UserError: the encoder does not fit, a folder in use, a full disk, or a loss that is not finite.
    """
    network, metadata = _build(task)
    fabric = single_device(execution, task.settings.precision)
    check_free_disk(run_dir, network)
    with locked(run_dir):
        claim_run(run_dir, task.settings, task.data, resume)
        if resume:
            task = replace(task, split=read_split(run_dir))
        else:
            write_split(run_dir, task.split)
        try:
            last = _run(fabric, task, network, metadata, run_dir, execution.workers, resume)
            return _report(fabric, task, run_dir, execution.workers, last)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the GPU's memory is full with {task.settings.batch_size} cases x {task.settings.inputs.crops} "
                "inputs; lower --batch-size or --crops, under another --name"
            ) from e


def _build(task: Task) -> tuple[Classifier, ClassifierMetadata]:
    """The network with its encoder's weights, and what its file will say."""
    settings, classes = task.settings, task.labels.classes
    seen = read_metadata(settings.encoder_file)
    network = build_classifier(settings.spec, len(classes), settings.pool, settings.freeze_encoder, settings.seed)
    if not settings.from_scratch:
        load_into(network.encoder, settings.encoder_file)
        warn_of_differences(task.data.format, task.data.cases, settings.inputs, seen.volume, "the encoder")
    metadata = ClassifierMetadata(
        settings.spec,
        classes,
        settings.pool,
        settings.inputs,
        task.data.format,
        settings.plans_name,
        settings.configuration,
        method=None if settings.from_scratch else seen.method,
        citations=() if settings.from_scratch else seen.citations,
    )
    return network, metadata


def _run(
    fabric: Fabric,
    task: Task,
    network: Classifier,
    metadata: ClassifierMetadata,
    run_dir: Path,
    workers: int,
    resume: bool,
) -> dict[str, Any]:
    """All epochs that are left; returns the last one's line of the log."""
    settings, names = task.settings, task.split.train
    optimizer = torch.optim.AdamW(parameter_groups(network, settings.weight_decay), lr=settings.lr)
    model, optimizer = fabric.setup(network, optimizer)
    first_epoch, best = _restore(fabric, network, optimizer, run_dir) if resume else (0, None)

    samples = TrainingCases(task.cases(names), task.data.format, settings.inputs, settings.seed, settings.augmentation)
    sampler = EpochSampler(len(names), settings.batch_size, first_epoch, settings.epochs, settings.seed)
    loader = build_loader(samples, sampler, workers, pin_memory=fabric.device.type == "cuda")
    batches = batches_of(fabric.setup_dataloaders(loader, use_distributed_sampler=False))
    steps = sampler.batches_per_epoch
    weights = balanced_weights(task.targets(names), len(task.labels.classes)).to(fabric.device)

    log, terminal = EpochLog(run_dir, first_epoch), sys.stderr.isatty()
    for epoch in tqdm(range(first_epoch, settings.epochs), unit="epoch", disable=not terminal):
        done, last = epoch + 1, epoch + 1 == settings.epochs
        model.train()
        total = 0.0
        for step in range(epoch * steps, done * steps):
            lr = settings.lr * warmup_cosine(step, settings.warmup_epochs * steps, settings.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = next(batches)
            total += _step(fabric, model, optimizer, batch, task, weights, epoch) * len(batch["case"])
        line = {"epoch": epoch, "loss": round(total / len(names), 7), "lr": lr}
        if task.split.val and (last or done % settings.validate_epochs == 0):
            measured = measure(task.labels, task.split.val, _predict(fabric, model, task, task.split.val, workers))
            line["validation"] = measured
            rank = [measured["auc"], -measured["log_loss"]]
            if best is None or rank > best:
                best = rank
                save_classifier(run_dir / BEST, network, replace(metadata, epoch=epoch))
        log.add(line)
        if not terminal:
            logger.info(_plain_line(line, settings.epochs))
        if last:
            save_classifier(run_dir / LAST, network, replace(metadata, epoch=epoch))
        if last or done % settings.checkpoint_epochs == 0:
            state = {
                "epoch": done,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "best": best,
            }
            save_checkpoint(run_dir, state)
    return log.lines[-1]


def _step(
    fabric: Fabric,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    task: Task,
    weights: torch.Tensor,
    epoch: int,
) -> float:
    """One optimizer step; every crop has the label of its case. Returns the mean loss.

    Raises:
        UserError: the loss is not finite; weights are as before the step.
    """
    images, names = batch["image"], batch["case"]
    targets = task.targets(names).to(fabric.device).repeat_interleave(images.shape[1])
    loss = weighted_cross_entropy(model(images.flatten(0, 1)), targets, weights)
    if not math.isfinite(loss.item()):
        raise UserError(
            f"the loss is {loss.item()} in epoch {epoch}; cases in this batch: {', '.join(names)}; look for broken "
            "intensities in them, or lower --lr, or use --precision fp32, under another --name"
        )
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _predict(fabric: Fabric, model: torch.nn.Module, task: Task, names: Sequence[str], workers: int) -> np.ndarray:
    return compute_probabilities(fabric, model, task.cases(names), task.data.format, task.settings.inputs, workers)


def _restore(
    fabric: Fabric, network: Classifier, optimizer: torch.optim.Optimizer, run_dir: Path
) -> tuple[int, list[float] | None]:
    """Puts back what the last checkpoint holds; the next epoch and the best rank so far."""
    state = load_checkpoint(run_dir)
    if state is None:
        logger.warning(f"{run_dir} was stopped before its first checkpoint: starting again from epoch 0")
        return 0, None
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    fabric.strategy.precision.load_state_dict(state["precision"])
    return state["epoch"], state["best"]


def _report(fabric: Fabric, task: Task, run_dir: Path, workers: int, last: dict[str, Any]) -> Path:
    """Predictions and metrics of the best model, as its file is read again."""
    split, labels = task.split, task.labels
    file = run_dir / (BEST if split.val else LAST)
    network, metadata = load_classifier(file)
    model = fabric.setup(network)
    metrics = {
        "model": file.name,
        "epoch": metadata.epoch,
        "classes": labels.classes,
        "fold": task.settings.fold,
        "fraction": task.settings.fraction,
        "training_cases": len(split.train),
        "validation": None,
        "test": None,
        "last": last,
    }
    for key, names, table in (("validation", split.val, PREDICTIONS), ("test", split.test, PREDICTIONS_TEST)):
        if names:
            found = _predict(fabric, model, task, names, workers)
            write_predictions(run_dir / table, labels.classes, names, found, labels)
            metrics[key] = measure(labels, names, found)
    write_text(run_dir / METRICS, json.dumps(metrics, indent=2))
    return run_dir / METRICS


def _plain_line(line: dict[str, Any], epochs: int) -> str:
    validation = line.get("validation")
    told = f", validation AUC {validation['auc']:.4f}" if validation else ""
    return f"epoch {line['epoch'] + 1}/{epochs} loss {line['loss']:.4f} lr {line['lr']:.2e}{told}"
