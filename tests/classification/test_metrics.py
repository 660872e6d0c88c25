"""Metrics against scikit-learn called directly, and by hand."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from nnunetv2_hiendmae.classification.predict import auc_interval, evaluate


def drawn(classes: int, cases: int = 60):
    rng = np.random.default_rng(classes)
    targets = np.concatenate([np.arange(classes), rng.integers(classes, size=cases - classes)])
    return targets, rng.dirichlet(np.ones(classes), size=cases)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_as_scikit_learn(classes):
    targets, probabilities = drawn(classes)
    predicted = probabilities.argmax(1)
    score = probabilities[:, 1] if classes == 2 else probabilities
    found = evaluate(targets, probabilities)
    low, high = found.pop("auc_interval_95")
    assert low < found["auc"] < high
    assert found == {
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


def test_without_a_case_of_some_class_there_is_no_auc():
    targets, probabilities = drawn(3)
    kept = targets != 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(targets[kept], probabilities[kept])
    assert found["auc"] is None and found["auc_interval_95"] is None
    recalls = [(probabilities[targets == k].argmax(1) == k).mean() for k in (0, 2)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("auc", [0.0, 0.3, 0.5, 0.893, 1.0])
@pytest.mark.parametrize("counts", [(1, 1), (1, 40), (51, 58)])
def test_interval_solves_newcombes_equation(auc, counts):
    """As a quartic, which is how others write it; a limit at 0 or 1 is an AUC there."""
    (m, n), z = counts, stats.norm.ppf(0.975)
    more = (m + n) / 2 - 1
    limit = np.polynomial.Polynomial([0, 1])
    # both sides of (auc - x)² = z² V(x), times (2 - x)(1 + x)
    variance = (2 - limit) * (1 + limit) + more * (1 - limit) * (1 + limit) + more * limit * (2 - limit)
    equation = m * n * (auc - limit) ** 2 * (2 - limit) * (1 + limit) - z**2 * limit * (1 - limit) * variance
    roots = sorted(r.real for r in equation.roots() if abs(r.imag) < 1e-9 and -1e-9 <= r.real <= 1 + 1e-9)
    np.testing.assert_allclose(auc_interval(auc, m, n), roots, atol=1e-8)


def test_interval_of_few_cases_and_of_many():
    """One pair in the right order says next to nothing; with many cases it is that of the bootstrap."""
    found = evaluate(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]))
    assert found["auc"] == 1 and found["auc_interval_95"] == pytest.approx([0.2065, 1], abs=1e-4)
    assert found == evaluate(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]))
    rng = np.random.default_rng(0)
    healthy, ill = rng.normal(0, 1, 150), rng.normal(1, 1, 150)
    options = {"vectorized": False, "n_resamples": 1000, "method": "percentile", "rng": rng}
    area = lambda a, b: stats.mannwhitneyu(b, a).statistic / a.size / b.size  # noqa: E731
    expected = stats.bootstrap((healthy, ill), area, **options).confidence_interval
    np.testing.assert_allclose(auc_interval(area(healthy, ill), 150, 150), expected, atol=0.015)
