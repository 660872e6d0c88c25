"""One optimizer for pretraining, fine-tuning and classification."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from nnunetv2_hiendmae import optim

STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.GELU(), nn.Linear(7, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
    for step in steps:
        torch.manual_seed(step)
        model(torch.rand(4, 13)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def build(model: nn.Module) -> torch.optim.AdamW:
    return optim.adamw(optim.parameter_groups(model, 0.05), 1e-2, (0.9, 0.95))


def stock(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(optim.parameter_groups(model, 0.05), lr=1e-2, betas=(0.9, 0.95))


def test_one_kernel_computes_the_same_as_the_loop():
    ours, theirs = network(), network()
    optimizer = build(ours)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = train(theirs, stock(theirs), range(STEPS))
    torch.testing.assert_close(train(ours, optimizer, range(STEPS)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("before", [stock, build])
def test_a_saved_state_goes_on_in_one_kernel(before):
    """Also that of a build whose optimizer was PyTorch's default."""
    whole = network()
    expected = train(whole, before(whole), range(STEPS))
    model = network()
    optimizer = before(model)
    train(model, optimizer, range(STEPS // 2))
    saved = copy.deepcopy(optimizer.state_dict())
    continued = build(model)
    continued.load_state_dict(saved)
    assert all(group["fused"] for group in continued.param_groups)
    assert all(float(state["step"]) == STEPS // 2 for state in continued.state.values())
    found = train(model, continued, range(STEPS // 2, STEPS))
    if before is build:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_parameters_that_allow_no_fused_kernel_train_too():
    model = network()
    with mock.patch.object(optim, "FUSED_DEVICES", ()):
        optimizer = build(model)
    assert not any(group["fused"] for group in optimizer.param_groups)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    assert not torch.equal(train(model, optimizer, range(1)), before)
