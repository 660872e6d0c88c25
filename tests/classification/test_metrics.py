"""Metrics against scikit-learn called directly, and by hand."""

import warnings

import numpy as np
import pytest
from sklearn import metrics

from nnunetv2_hiendmae.classification.predict import evaluate


def drawn(classes: int, cases: int = 60):
    rng = np.random.default_rng(classes)
    targets = np.concatenate([np.arange(classes), rng.integers(classes, size=cases - classes)])
    return targets, rng.dirichlet(np.ones(classes), size=cases)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_as_scikit_learn(classes):
    targets, probabilities = drawn(classes)
    predicted = probabilities.argmax(1)
    score = probabilities[:, 1] if classes == 2 else probabilities
    assert evaluate(targets, probabilities) == {
        "cases": 60,
        "auc": pytest.approx(metrics.roc_auc_score(targets, score, multi_class="ovr"), abs=1e-12),
        "accuracy": pytest.approx(metrics.accuracy_score(targets, predicted), abs=1e-12),
        "balanced_accuracy": pytest.approx(metrics.balanced_accuracy_score(targets, predicted), abs=1e-12),
        "macro_f1": pytest.approx(metrics.f1_score(targets, predicted, average="macro"), abs=1e-12),
        "log_loss": pytest.approx(metrics.log_loss(targets, probabilities), abs=1e-12),
    }


def test_by_hand():
    """Three of the four pairs (ill, healthy) are in the right order; one of two of each class is recognised."""
    found = evaluate(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]]))
    assert found["auc"] == 0.75 and found["accuracy"] == found["balanced_accuracy"] == found["macro_f1"] == 0.5


def test_macro_auc_is_the_mean_of_one_against_rest():
    targets, probabilities = drawn(3)
    single = [metrics.roc_auc_score(targets == k, probabilities[:, k]) for k in range(3)]
    assert evaluate(targets, probabilities)["auc"] == pytest.approx(np.mean(single), abs=1e-12)


def test_without_a_case_of_some_class_there_is_no_auc():
    targets, probabilities = drawn(3)
    kept = targets != 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(targets[kept], probabilities[kept])
    assert found["auc"] is None
    recalls = [(probabilities[targets == k].argmax(1) == k).mean() for k in (0, 2)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
