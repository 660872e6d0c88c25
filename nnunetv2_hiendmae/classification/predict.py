"""Probabilities of cases: by a network in training, or by a finished run on other cases."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.classification.data import Inputs, RegularCases, batches_of, warn_of_differences
from nnunetv2_hiendmae.classification.device import choose_precision, single_device
from nnunetv2_hiendmae.classification.labels import Labels, match_labels, read_labels
from nnunetv2_hiendmae.classification.metrics import evaluate
from nnunetv2_hiendmae.classification.model_file import BEST, LAST, ClassifierMetadata, load_classifier
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import replacing, write_text
from nnunetv2_hiendmae.pretraining.data import Case, PretrainData, build_loader, find_data
from nnunetv2_hiendmae.pretraining.launch import Execution
from nnunetv2_hiendmae.volume_format import VolumeFormat


def predict(
    run_dir: Path,
    datasets: Sequence[str],
    execution: Execution,
    *,
    plans_name: str | None = None,
    configuration: str | None = None,
    model: str | None = None,
    labels_file: Path | None = None,
    output: Path | None = None,
    precision: str = "auto",
) -> Path:
    """Writes probabilities of all preprocessed cases of some datasets; with labels also their metrics, beside it.

    Args:
        plans_name, configuration: of the preprocessed cases; None: those of the run.
        model: "best" or "last"; None: the best where there is one.
        output: CSV file; None: predictions_DATASETS.csv in the run folder.

    Returns:
        The CSV file.

    Raises:
        UserError: no such run, dataset or labels, or images with other channels.
    """
    network, metadata = load_classifier(_model_file(run_dir, model))
    data = find_data(datasets, plans_name or metadata.plans_name, configuration or metadata.configuration)
    _check_channels(metadata, data, run_dir)
    names = [case.name for case in data.cases]
    labels = match_labels(read_labels(labels_file), names, metadata.classes) if labels_file else None
    numbers = "_".join(dict.fromkeys(name[7:10] for name in names))
    output = output or run_dir / f"predictions_{numbers}.csv"
    warn_of_differences(data.format, data.cases, metadata.inputs, metadata.volumes, "the classifier")
    fabric = single_device(execution, choose_precision(precision, execution.device))
    probabilities = compute_probabilities(
        fabric, fabric.setup(network), data.cases, data.format, metadata.inputs, execution.workers
    )
    write_predictions(output, metadata.classes, names, probabilities, labels)
    if labels:
        write_text(output.with_suffix(".json"), json.dumps(measure(labels, names, probabilities), indent=2))
    return output


def compute_probabilities(
    fabric: Fabric,
    network: torch.nn.Module,
    cases: Sequence[Case],
    volumes: VolumeFormat,
    inputs: Inputs,
    workers: int,
) -> np.ndarray:
    """Probabilities (n, K) float64 of cases, averaged over their crops.

    One case at a time, so that what comes out of a case does not depend on the others.

    Raises:
        UserError: a case cannot be read, or its probabilities are not finite.
    """
    pin_memory = fabric.device.type == "cuda"
    loader = build_loader(RegularCases(cases, volumes, inputs), [[i] for i in range(len(cases))], workers, pin_memory)
    rows = []
    network.eval()
    with torch.no_grad():
        for batch in batches_of(fabric.setup_dataloaders(loader, use_distributed_sampler=False)):
            # averaged on the CPU: not every device has float64
            logits = network(batch["image"].flatten(0, 1)).cpu().double()
            rows.append(logits.softmax(1).mean(0).numpy())
            if not np.isfinite(rows[-1]).all():
                raise UserError(
                    f"the probabilities of {cases[len(rows) - 1].name} are not finite; look for broken intensities in "
                    "it, or use --precision fp32"
                )
    return np.stack(rows)


def measure(labels: Labels, names: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    """Metrics over the cases that have a label."""
    known = [i for i, name in enumerate(names) if name in labels.targets]
    return evaluate(np.array([labels.targets[names[i]] for i in known]), probabilities[known])


def write_predictions(
    path: Path, classes: Sequence[str], names: Sequence[str], probabilities: np.ndarray, labels: Labels | None
) -> None:
    """CSV with the columns case, label (empty where unknown) and p_CLASS for every class."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["case", "label", *(f"p_{name}" for name in classes)])
        for name, row in zip(names, probabilities, strict=True):
            label = classes[labels.targets[name]] if labels and name in labels.targets else ""
            table.writerow([name, label, *(f"{p:.9g}" for p in row)])


def _model_file(run_dir: Path, model: str | None) -> Path:
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; give -m the folder of a run of: hiendmae classify train")
    if model is None:
        return run_dir / (BEST if (run_dir / BEST).exists() else LAST)
    return run_dir / {"best": BEST, "last": LAST}[model]


def _check_channels(metadata: ClassifierMetadata, data: PretrainData, run_dir: Path) -> None:
    found = data.format.channel_names
    if len(found) != metadata.spec.in_channels:
        raise UserError(
            f"the images have {len(found)} channels ({', '.join(found)}), the classifier in {run_dir} takes "
            f"{metadata.spec.in_channels} ({', '.join(metadata.volumes.channel_names)}); choose another -d"
        )
