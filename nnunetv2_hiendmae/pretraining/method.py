"""The contract of a pretraining method: an encoder, its heads and losses, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import Encoder, EncoderSpec
from nnunetv2_hiendmae.pretraining.declaration import Declaration
from nnunetv2_hiendmae.training.views import Views
from nnunetv2_hiendmae.weights import LoadReport

Batch = Mapping[str, Any]
LossDict = dict[str, Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """What a method made of a batch, for pictures.

    Args:
        input, masked, reconstruction: (B, C, D, H, W), intensities as in the input.
        hidden: (B, D, H, W), True where voxels were masked.
        true_scale: the prediction was scaled with the true mean and spread of its patch.
    """

    input: Tensor
    masked: Tensor
    reconstruction: Tensor
    hidden: Tensor
    true_scale: bool

    def arrays(self, row: int) -> dict[str, np.ndarray]:
        """One sample's input, masked and reconstruction, by these names: (C, D, H, W) float32."""
        named = {"input": self.input, "masked": self.masked, "reconstruction": self.reconstruction}
        return {name: volumes[row].float().cpu().numpy() for name, volumes in named.items()}


class Method(Declaration, nn.Module, ABC):
    """A pretraining method. It never calls backward and never touches devices, processes or files.

    Subclasses are a `Declaration` first, whose `Options` keyword arguments after `spec` become, and build
    `self.encoder`.

    A method with more views than fit into memory gives its loss in `num_parts` parts: the loop calls `forward` for
    part 0, 1, … of the same batch in this order, goes backward after each, and adds the losses up. A part may keep
    detached tensors for the parts after it. Every part's loss must depend on every trainable parameter, with weight
    zero where it does not need it: under DDP the last part's backward is the one that gradients are exchanged in.
    """

    encoder: nn.Module
    num_parts: int = 1

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__()
        self.spec = spec
        self.options = self.Options(**options)

    @abstractmethod
    def views(self) -> Views:
        """What a worker draws from a volume for one sample; the batch holds its tensors, stacked."""

    @abstractmethod
    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """Losses of one part of a batch: "loss" is the scalar to minimise, the rest is logged."""

    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The same batch as pictures: name of the view (letters, digits, '_') → what was made of it; none where a
        method reconstructs nothing. One process alone calls it."""
        return {}

    def gather(self, tensor: Tensor) -> Tensor:
        """A micro-batch's tensor (B, …) in, that of all processes out, (W·B, …), gradients and all; for `forward`. The
        loop puts the function that does so in place of this one, which is right for one process."""
        return tensor

    def start_encoder(self, load: Callable[[Encoder], LoadReport]) -> LoadReport:
        """Lets `load` put weights into the encoder; what follows the encoder starts as it does."""
        return load(self.encoder)

    def synchronize(self, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Called before `after_step`, in every process: for what a method gathered in the step besides gradients.

        `mean_over_processes` takes a tensor and returns its mean over the processes; all of them must call it the same
        number of times.
        """

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step with the finished fraction of the run; moves a teacher."""
