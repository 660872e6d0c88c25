"""A momentum teacher: its head, its centre, and how it follows the student (METHODS §4)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunetv2_hiendmae.architectures.vit import init_transformer


class ProjectionHead(nn.Sequential):
    """Three linear layers with GELU between them: embedding (B, E) → logits (B, K)."""

    def __init__(self, embed_dim: int, hidden: int, out: int):
        super().__init__(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
        )
        init_transformer(self)


class Centre(nn.Module):
    """Running mean of the teacher's logits, which is subtracted from them.

    Without it the student's easiest answer is one that every image gets. The mean moves once per optimizer step, in
    `step`, by the logits of the whole global batch: it must not depend on how that is split over micro-batches and
    processes. Within a step it stays as it was.

    Args:
        width: K, number of logits.
        momentum: share of the former mean that a step keeps; 1 leaves it at 0, which switches centring off.
    """

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        # of this step; no buffer: DDP overwrites those of other processes by the first one's
        self._seen: list[Tensor] = []

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (…, K) without the mean; remembers them for the next `step`."""
        self._seen.append(logits.detach().flatten(0, -2).mean(0))
        return logits - self.mean

    def synchronize(self, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Replaces what this process has seen in the step by the mean over all processes."""
        if self._seen:
            self._seen = [mean_over_processes(torch.stack(self._seen).mean(0))]

    def step(self) -> None:
        """Moves the mean."""
        if self._seen:
            self.mean.lerp_(torch.stack(self._seen).mean(0), 1 - self.momentum)
            self._seen = []


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher's parameters ← momentum · their own + (1 − momentum) · the student's."""
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def cosine_momentum(start: float, progress: float) -> float:
    """Rises from `start` at progress 0 to 1 at progress 1, as half a cosine."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
