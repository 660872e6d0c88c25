"""The contract of a pretraining method: an encoder, its heads and losses, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import Encoder, EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import num_visible
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, declared
from nnunetv2_hiendmae.training.views import Views
from nnunetv2_hiendmae.weights import LoadReport

Batch = Mapping[str, Any]
LossDict = dict[str, Tensor]
_MEND = "; change --set {name}=…"


@dataclass(frozen=True)
class PretrainRecipe:
    """How a method is trained unless the user says otherwise.

    Args:
        encoder: preset, see `architectures.PRESETS`.
        lr: peak learning rate of AdamW at `batch_size`, absolute.
        batch_size: samples per optimizer step over all processes: crops, or volumes where a method draws several views
            of one.
        accumulate: micro-batches per optimizer step; what a base encoder needs on a GPU with 24 GB.
    """

    encoder: str = "vit_base_p16"
    epochs: int = 1000
    steps_per_epoch: int = 400
    warmup_epochs: int = 10
    batch_size: int = 192
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method: a frozen dataclass whose fields are made by `options.option`.

    The defaults are the paper's, or marked as ours; the help says of what an option is, or in which unit, where its
    name and the paper do not. `--set` reads values by the annotations.

    Raises:
        UserError: a value is out of its range.
    """

    def __post_init__(self):
        check_ranges(self, told=lambda name, _: name, mend=_MEND)

    def require(self, fits: bool, name: str, needed: str) -> None:
        """Checks an option whose range depends on other options or on the encoder.

        `fits` says what is right, as 0 < x, and not what is wrong: no comparison holds for NaN.

        Raises:
            UserError: it is false.
        """
        if not fits:
            raise UserError(f"{name} is {getattr(self, name)}, needed {needed}{_MEND.format(name=name)}")

    def visible(
        self, name: str, total: int, what: str = "tokens", or_else: str = ", or --crop-size for more tokens"
    ) -> int:
        """How many of `total` stay visible at the mask ratio `name`: K = int(total·(1 − ratio)), as the authors do.

        Raises:
            UserError: nothing would be visible, or nothing masked.
        """
        ratio = getattr(self, name)
        visible = num_visible(total, ratio)
        if not 0 < visible < total:
            raise UserError(
                f"{name} {ratio} leaves {visible} of {total} {what} visible, needed at least 1 visible and 1 masked"
                f"{_MEND.format(name=name)}{or_else}"
            )
        return visible


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


class Method(nn.Module, ABC):
    """A pretraining method. It never calls backward and never touches devices, processes or files.

    Subclasses declare their options in a class `Options`, which keyword arguments after `spec` become, and build
    `self.encoder`. `recipe_notes` says of recipe entries what `MethodOptions` says of options.

    A method with more views than fit into memory gives its loss in `num_parts` parts: the loop calls `forward` for
    part 0, 1, … of the same batch in this order, goes backward after each, and adds the losses up. A part may keep
    detached tensors for the parts after it. Every part's loss must depend on every trainable parameter, with weight
    zero where it does not need it: under DDP the last part's backward is the one that gradients are exchanged in.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    recipe: ClassVar[PretrainRecipe] = PretrainRecipe()
    recipe_notes: ClassVar[Mapping[str, str]] = {}
    Options: ClassVar[type[MethodOptions]] = MethodOptions
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

    @abstractmethod
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The same batch as pictures: name of the view (letters, digits, '_') → what was made of it."""

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

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Options with their defaults."""
        return {name: field.default for name, (field, _) in declared(cls.Options).items()}

    @classmethod
    def notes(cls) -> dict[str, str]:
        """What is to be said beside the defaults of options and recipe entries: unit, and whether they are ours."""
        notes = {name: about.note for name, (_, about) in declared(cls.Options).items() if about.note}
        return {**notes, **cls.recipe_notes}
