"""Steps in fp16 as on GPUs without bf16: with a gradient scaler, which CPUs have too, though the command refuses it."""

import pytest
import torch
from lightning_fabric import Fabric
from run_data import PLANS, tiny_settings
from test_loop import losses

from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.steps import Learner
from nnunetv2_hiendmae.training.launch import _precision
from nnunetv2_hiendmae.training.run import restore_state, save_state
from nnunetv2_hiendmae.training.volumes import find_cases


def learn(method: str, precision: str, steps: int) -> tuple[Learner, list[float]]:
    """A learner after so many steps, and their losses."""
    accumulate = 1 if METHODS[method].compares_samples else 2
    settings = tiny_settings(method, precision=precision, accumulate=accumulate)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=_precision(precision, "cpu"))
    learner = Learner.set_up(fabric, settings, settings.build_method())
    batches = learner.batches(find_cases(settings.datasets, PLANS, "3d_fullres"), range(steps))
    return learner, losses([learner.step(step, batches) for step in range(steps)])


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_float32_to_rounding(preprocessed, method):
    learner, half = learn(method, "fp16", 4)
    assert half == pytest.approx(learn(method, "fp32", 4)[1], rel=0.01)
    assert learner.fabric.strategy.precision.scaler.get_scale() >= 2.0**14


@pytest.mark.parametrize("method", ["hiendmae", "glmae"])
def test_an_overflow_leaves_weights_and_moments(preprocessed, tmp_path, method):
    """And halves the scale, which a checkpoint holds."""
    learner, _ = learn(method, "fp16", 2)
    trained = [p for p in learner.method.parameters() if p.requires_grad]
    scaler = learner.fabric.strategy.precision.scaler
    scaler.update(2.0**100)
    before = [p.detach().clone() for p in trained]
    moments = [{k: v.clone() for k, v in learner.optimizer.state[p].items()} for p in trained]
    data = find_cases(learner.settings.datasets, PLANS, "3d_fullres")
    learner.step(5, learner.batches(data, range(5, 6)))
    assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    for p, state in zip(trained, moments, strict=True):
        assert all(torch.equal(learner.optimizer.state[p][k], v) for k, v in state.items())
    assert scaler.get_scale() == 2.0**99
    save_state(tmp_path, learner.parts, step=6)
    other, _ = learn(method, "fp16", 1)
    restore_state(tmp_path, other.parts, step=0)
    assert other.fabric.strategy.precision.scaler.get_scale() == 2.0**99
