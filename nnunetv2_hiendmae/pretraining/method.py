"""The contract of a pretraining method: an encoder, its heads and losses, and nothing else."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args, get_type_hints

from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.training.views import Views

Batch = Mapping[str, Any]
LossDict = dict[str, Tensor]


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
class Reconstruction:
    """What a method made of a batch, for pictures; each (B, C, D, H, W), intensities as in the input."""

    image: Tensor
    masked: Tensor
    reconstruction: Tensor


class Method(nn.Module, ABC):
    """A pretraining method. It never calls backward and never touches devices, processes or files.

    Keyword arguments of `__init__` after `spec` are the method's options; their defaults are the paper's.
    Subclasses build `self.encoder`. `notes` says of options and recipe entries what their unit is and whether their
    default is ours, wherever the name and the paper do not.

    A method with more views than fit into memory gives its loss in `num_parts` parts: the loop calls `forward` for
    part 0, 1, … of the same batch in this order, goes backward after each, and adds the losses up. A part may keep
    detached tensors for the parts after it. Every part's loss must depend on every trainable parameter, with weight
    zero where it does not need it: under DDP the last part's backward is the one that gradients are exchanged in.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    citations: ClassVar[tuple[str, ...]]
    recipe: ClassVar[PretrainRecipe] = PretrainRecipe()
    notes: ClassVar[Mapping[str, str]] = {}
    encoder: nn.Module
    num_parts: int = 1

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def views(self) -> Views:
        """What a worker draws from a volume for one sample; the batch holds its tensors, stacked."""

    @abstractmethod
    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """Losses of one part of a batch: "loss" is the scalar to minimise, the rest is logged."""

    @abstractmethod
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The same batch as pictures: name of the view (letters, digits, '_') → what was made of it."""

    def synchronize(self, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Called before `after_step`, in every process: for what a method gathered in the step besides gradients.

        `mean_over_processes` takes a tensor and returns its mean over the processes; all of them must call it the same
        number of times.
        """

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step with the finished fraction of the run; moves a teacher."""

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Options with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters
        return {n: p.default for n, p in parameters.items() if n not in ("self", "spec")}


def parse_options(method: type[Method], texts: list[str]) -> dict[str, Any]:
    """`key=value` texts of the command line as options of a method, typed as its `__init__` says.

    Raises:
        UserError: no '=', an unknown key, or a value of another type.
    """
    known, chosen = method.options(), {}
    annotations = get_type_hints(method.__init__)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            listed = ", ".join(f"{k}={v}" for k, v in known.items())
            raise UserError(f"--set {text} is no option of {method.name}, needed key=value of: {listed}")
        chosen[key] = _parse(annotations[key], key, value)
    return chosen


def _parse(annotation: Any, key: str, value: str) -> Any:
    """A text as what an option's annotation asks for: bool, int, float or str; `D,H,W` where that is a sequence."""
    kinds = get_args(annotation) or (annotation,)
    if Sequence[int] in kinds and "," in value:
        return tuple(_parse(int, key, part) for part in value.split(","))
    wanted = kinds[0]
    if wanted is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UserError(f"--set {key}={value}: needed true or false")
    try:
        return wanted(value)
    except ValueError as e:
        raise UserError(f"--set {key}={value}: needed a value of type {wanted.__name__}") from e
