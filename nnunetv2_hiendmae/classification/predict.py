"""Probabilities of cases, by a network in training or by a finished run, and how good they are."""

import csv
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from scipy import optimize, stats
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score, roc_auc_score

from nnunetv2_hiendmae.classification.inputs import Inputs, forward_work, warn_of_differences
from nnunetv2_hiendmae.classification.labels import Labels, read_labels
from nnunetv2_hiendmae.classification.network import BEST, LAST, load_classifier
from nnunetv2_hiendmae.environment import dataset_id
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import replacing, write_text
from nnunetv2_hiendmae.options.commands import PredictOptions
from nnunetv2_hiendmae.training.batches import SampleDataset, load_batches
from nnunetv2_hiendmae.training.launch import choose_precision, launch
from nnunetv2_hiendmae.training.volumes import CaseSet, find_cases

COMMAND = "hiendmae classify"
CONFIDENCE = 0.95

logger = logging.getLogger(__name__)


def predict(
    datasets: Iterable[str | int], run_dir: Path, options: PredictOptions | None = None, **changes: Any
) -> Path:
    """Writes probabilities of all preprocessed cases of some datasets, as `hiendmae classify predict` does; with labels
    also their metrics, beside it.

    Args:
        datasets: ids or names.
        run_dir: of `hiendmae classify train`.
        changes: fields of `PredictOptions` that are other than in `options`.

    Returns:
        The CSV file.

    Raises:
        UserError: bad options, no such run, dataset or labels, or images with other channels.
    """
    options, run_dir = replace(options or PredictOptions(), **changes), Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; give -m the folder of a run of: hiendmae classify train")
    default = "best" if (run_dir / BEST).exists() else "last"
    network, metadata = load_classifier(run_dir / {"best": BEST, "last": LAST}[options.model or default])
    plans_name = options.plans_name or metadata.plans_name
    data = find_cases(datasets, plans_name, options.configuration or metadata.configuration)
    channels, known = data.format.channel_names, metadata.volumes.channel_names
    if len(channels) != metadata.spec.in_channels:
        raise UserError(
            f"the images have {len(channels)} channels ({', '.join(channels)}), the classifier in {run_dir} takes "
            f"{metadata.spec.in_channels} ({', '.join(known)}); choose another -d"
        )
    names = [case.name for case in data.cases]
    labels = read_labels(options.labels, names, metadata.classes) if options.labels else None
    numbers = "_".join(f"{dataset_id(name):03d}" for name in data.datasets)
    output = Path(options.output or run_dir / f"predictions_{numbers}.csv")
    warn_of_differences(data, metadata.inputs, metadata.volumes, "the classifier")
    precision = choose_precision(options.precision, options.device)
    fabric = launch(options.device, precision, forward_work(network, metadata.inputs), alone=COMMAND)
    probabilities = compute_probabilities(fabric, fabric.setup(network), data, metadata.inputs, options.workers)
    write_predictions(output, metadata.classes, names, probabilities, labels)
    if labels:
        measured = measure(labels, names, probabilities)
        if measured["auc"] is not None:
            logger.info("%s over %d cases", tell_auc(measured), measured["cases"])
        write_text(output.with_suffix(".json"), json.dumps(measured, indent=2))
    return output


def compute_probabilities(
    fabric: Fabric, network: torch.nn.Module, data: CaseSet, inputs: Inputs, workers: int
) -> np.ndarray:
    """Probabilities (n, K) float64 of cases, averaged over their crops.

    One case at a time, so that what comes out of a case does not depend on the others.

    Raises:
        UserError: a case cannot be read, or its probabilities are not finite.
    """
    rows, samples = [], SampleDataset(data, inputs.regular, seed=0, case_in_key=True)
    network.eval()
    with torch.no_grad():
        for batch in load_batches(fabric, samples, [[(i,)] for i in range(len(data.cases))], workers):
            # averaged on the CPU: not every device has float64
            logits = network(batch["image"].flatten(0, 1)).cpu().double()
            rows.append(logits.softmax(1).mean(0).numpy())
            if not np.isfinite(rows[-1]).all():
                raise UserError(
                    f"the probabilities of {batch['case'][0]} are not finite; look for broken intensities in it, or "
                    "use --precision fp32"
                )
    return np.stack(rows)


def measure(labels: Labels, names: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    """Metrics over the cases that have a label; a warning where they are not of all classes."""
    known = [i for i, name in enumerate(names) if name in labels.targets]
    targets = np.array([labels.targets[names[i]] for i in known])
    if absent := [name for i, name in enumerate(labels.classes) if i not in targets]:
        logger.warning("no AUC: none of the %d labelled cases is of class %s", len(known), ", ".join(absent))
    return evaluate(targets, probabilities[known])


def tell_auc(measured: dict[str, Any]) -> str:
    """The AUC of `evaluate` with its interval, for people."""
    return "AUC {:.4f} ({:.0%} interval {:.2f} to {:.2f})".format(
        measured["auc"], CONFIDENCE, *measured["auc_interval_95"]
    )


def evaluate(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Measures of predictions, by scikit-learn.

    Args:
        targets: (n,) class indices.
        probabilities: (n, K), rows sum to 1.

    Returns:
        cases, auc (of the second of two classes; macro average of one-vs-rest for more; None where a class has no
        case), auc_interval_95 (see `auc_interval`; None without auc), accuracy, balanced_accuracy
        (mean recall of the classes that have cases), macro_f1 (mean over the classes that have cases or predictions)
        and log_loss.
    """
    classes = np.arange(probabilities.shape[1])
    predicted, present = probabilities.argmax(1), np.unique(targets)
    auc = interval = None
    if len(present) == len(classes):
        score = probabilities[:, 1] if len(classes) == 2 else probabilities
        auc = float(roc_auc_score(targets, score, multi_class="ovr"))
        # of two classes the second alone: that of the first is the same
        ones = [targets == k for k in (classes[1:] if len(classes) == 2 else classes)]
        singles = [roc_auc_score(one, probabilities[:, k]) for k, one in zip(classes[-len(ones) :], ones, strict=True)]
        limits = [auc_interval(a, one.sum(), (~one).sum()) for a, one in zip(singles, ones, strict=True)]
        interval = np.mean(limits, axis=0).tolist()
    return {
        "cases": len(targets),
        "auc": auc,
        "auc_interval_95": interval,
        "accuracy": float(accuracy_score(targets, predicted)),
        # balanced accuracy by its definition: scikit-learn's own function warns when an absent class is predicted
        "balanced_accuracy": float(recall_score(targets, predicted, labels=present, average="macro")),
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0)),
        "log_loss": float(log_loss(targets, probabilities, labels=classes)),
    }


def auc_interval(auc: float, positive: int, negative: int) -> tuple[float, float]:
    """Confidence interval of the AUC of two classes with so many cases: method 5 of Newcombe, Statistics in Medicine
    25, 559-573 (2006), with Hanley and McNeil's variance at the limits themselves.

    It holds for few cases and for an AUC of 1, where the intervals of a bootstrap and of DeLong shrink to [1, 1]. For
    the mean over several classes `evaluate` takes the means of the limits, which are rather too wide.
    """
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    others = (positive + negative) / 2 - 1

    def excess(limit: float) -> float:
        variance = 1 + others * ((1 - limit) / (2 - limit) + limit / (1 + limit))
        variance *= limit * (1 - limit) / (positive * negative)
        return (auc - limit) ** 2 - z**2 * variance

    # 0 and 1 themselves have no variance, and so has an AUC there
    tiny = 1e-9
    low = optimize.brentq(excess, 0, auc - tiny) if auc > 0 else 0.0
    high = optimize.brentq(excess, auc + tiny, 1) if auc < 1 else 1.0
    return float(low), float(high)


def write_predictions(
    path: Path, classes: Sequence[str], names: Sequence[str], probabilities: np.ndarray, labels: Labels | None
) -> None:
    """CSV with the columns case, label (empty where unknown), p_CLASS for every class, and predicted, the most
    probable class."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["case", "label", *(f"p_{name}" for name in classes), "predicted"])
        for name, row in zip(names, probabilities, strict=True):
            label = classes[labels.targets[name]] if labels and name in labels.targets else ""
            table.writerow([name, label, *(f"{p:.9g}" for p in row), classes[row.argmax()]])
