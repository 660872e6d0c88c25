"""The learning rate as a pure function of the epoch, so that resuming needs no scheduler state."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_hiendmae.optim import warmup_cosine


def learning_rate(epoch: int, peak: float, epochs: int, warmup_epochs: int) -> float:
    """Linear warm-up to `peak` at `warmup_epochs`, then cosine to 0 at `epochs`."""
    # one epoch late: nnU-Net's epochs are long, the first must not be spent at 0
    return peak * warmup_cosine(epoch + 1, warmup_epochs + 1, epochs + 1)


class WarmupCosine(LRScheduler):
    """`learning_rate` for every parameter group, times the group's "lr_scale" if it has one; nnU-Net calls
    `step(epoch)` before each epoch."""

    def __init__(self, optimizer: Optimizer, peak: float, epochs: int, warmup_epochs: int):
        self.peak, self.epochs, self.warmup_epochs = peak, epochs, warmup_epochs
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Sets the learning rate of `epoch`; None: of the next one."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        lr = learning_rate(self.last_epoch, self.peak, self.epochs, self.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
