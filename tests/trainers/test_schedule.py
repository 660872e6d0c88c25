"""The learning rate depends on the epoch and on nothing else."""

import pytest
import torch

from nnunetv2_hiendmae.trainers.trainers import WarmupCosine, learning_rate


@pytest.mark.parametrize("epochs, warmup", [(300, 30), (10, 0), (1, 0), (10, 9)])
def test_rises_to_the_peak_and_falls_to_zero(epochs, warmup):
    rates = [learning_rate(e, 2.0, epochs, warmup) for e in range(epochs + 1)]
    assert rates[warmup] == max(rates) == 2.0
    assert rates[epochs] == pytest.approx(0, abs=1e-12)
    assert all(r > 0 for r in rates[:epochs])
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[:warmup] == pytest.approx([2.0 * (e + 1) / (warmup + 1) for e in range(warmup)])


def test_half_way_down_is_half_the_peak():
    assert learning_rate(6, 2.0, 10, 2) == pytest.approx(1.0)


def test_resuming_gives_the_same_rate():
    def optimizer():
        return torch.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)

    straight, resumed = optimizer(), optimizer()
    schedule = WarmupCosine(straight, 1.0, 10, 3)
    for epoch in range(8):
        schedule.step(epoch)
    again = WarmupCosine(resumed, 1.0, 10, 3)
    again.step(7)
    assert [g["lr"] for g in straight.param_groups] == [g["lr"] for g in resumed.param_groups] == again.get_last_lr()
    assert again.get_last_lr() == [learning_rate(7, 1.0, 10, 3)] * 2
    again.step()
    assert again.get_last_lr() == [learning_rate(8, 1.0, 10, 3)] * 2
