"""The learning rate of fine-tuning."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_hiendmae.optim import warmup_cosine


def learning_rate(epoch: int, peak: float, epochs: int, warmup_epochs: int, start: int = 0) -> float:
    """Linear warm-up to `peak` at `start + warmup_epochs`, then cosine to 0 at `epochs`; 0 before `start`."""
    if epoch < start:
        return 0.0
    # one epoch late: nnU-Net's epochs are long, the first must not be spent at 0
    return peak * warmup_cosine(epoch - start + 1, warmup_epochs + 1, epochs - start + 1)


class WarmupCosine(LRScheduler):
    """`learning_rate` for every parameter group, times the group's "lr_scale" and from its "start" on, if it has them:
    a pure function of the epoch, so that continuing needs no state. nnU-Net calls `step(epoch)` before each epoch."""

    def __init__(self, optimizer: Optimizer, peak: float, epochs: int, warmup_epochs: int):
        self.peak, self.epochs, self.warmup_epochs = peak, epochs, warmup_epochs
        # now: a checkpoint brings those of its own plans
        self.shares = [(group.get("lr_scale", 1.0), group.get("start", 0)) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rate of `epoch`; None: of the next one."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, (scale, start) in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = scale * learning_rate(self.last_epoch, self.peak, self.epochs, self.warmup_epochs, start)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
