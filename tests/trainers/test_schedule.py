"""The learning rate depends on the epoch and on nothing else."""

import pytest
import torch

from nnunetv2_hiendmae.optim import split_groups
from nnunetv2_hiendmae.trainers.schedule import WarmupCosine, learning_rate


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


def test_what_starts_later_has_the_same_shape_from_there_on():
    late = [learning_rate(e, 2.0, 10, 2, start=3) for e in range(11)]
    assert late[:3] == [0, 0, 0]
    assert late[3:] == [learning_rate(e, 2.0, 7, 2) for e in range(8)] and late[5] == 2.0


def test_groups_are_split_by_whom_they_belong_to():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [a, b], "weight_decay": 0.5, "lr_scale": 0.5}, {"params": [c], "weight_decay": 0.0}]
    split = split_groups(groups, [a], lr_scale=0.1, start=4)
    assert split == [
        {"params": [c], "weight_decay": 0.0},
        {"params": [b], "weight_decay": 0.5, "lr_scale": 0.5},
        {"params": [a], "weight_decay": 0.5, "lr_scale": 0.05, "start": 4},
    ]
    schedule = WarmupCosine(torch.optim.AdamW(split, lr=1.0), 1.0, 10, 3)
    for epoch in (0, 3, 4, 7):
        schedule.step(epoch)
        late = 0.05 * learning_rate(epoch - 4, 1.0, 6, 3) if epoch >= 4 else 0
        assert schedule.get_last_lr() == [factor * learning_rate(epoch, 1.0, 10, 3) for factor in (1, 0.5)] + [late]


def test_a_checkpoint_does_not_bring_its_schedule():
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr_scale": 0.5, "start": 4}], lr=1.0)
    schedule = WarmupCosine(optimizer, 1.0, 10, 3)
    optimizer.param_groups[0].update(lr_scale=1.0, start=0)
    schedule.step(6)
    assert schedule.get_last_lr() == [0.5 * learning_rate(6, 1.0, 10, 3, start=4)]


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
