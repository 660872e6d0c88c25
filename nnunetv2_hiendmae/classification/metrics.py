"""What a table of classification results needs, by scikit-learn."""

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score, roc_auc_score


def evaluate(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Measures of predictions.

    Args:
        targets: (n,) class indices.
        probabilities: (n, K), rows sum to 1.

    Returns:
        cases, auc (of the second of two classes; macro average of one-vs-rest for more; None where a class has no
        case), accuracy, balanced_accuracy (mean recall of the classes that have cases), macro_f1 (mean over the
        classes that have cases or predictions) and log_loss.
    """
    classes = np.arange(probabilities.shape[1])
    predicted, present = probabilities.argmax(1), np.unique(targets)
    return {
        "cases": len(targets),
        "auc": _auc(targets, probabilities) if len(present) == len(classes) else None,
        "accuracy": float(accuracy_score(targets, predicted)),
        # balanced accuracy by its definition: scikit-learn's own function warns when an absent class is predicted
        "balanced_accuracy": float(recall_score(targets, predicted, labels=present, average="macro")),
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0)),
        "log_loss": float(log_loss(targets, probabilities, labels=classes)),
    }


def _auc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(targets, probabilities[:, 1]))
    return float(roc_auc_score(targets, probabilities, multi_class="ovr", average="macro"))
