"""What a method says of itself before anything is built: options, recipe and where it comes from. Imports no torch:
`hiendmae methods` answers at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nnunetv2_hiendmae.architectures.spec import num_visible
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, declared

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


class Declaration:
    """A pretraining method, for who wants to know of it; its class, a `Method`, inherits this.

    Attributes:
        name: as in `--method`; title: as its authors call it; source: where it is from, and what of it is ours.
        recipe: how it is trained; `recipe_notes` says of its entries what `MethodOptions` says of options.
        compares_samples: the loss compares the samples of a micro-batch over all processes (`Method.gather`): it needs
            two of them, and depends on the number of micro-batches.
        Options: its options.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    recipe: ClassVar[PretrainRecipe] = PretrainRecipe()
    recipe_notes: ClassVar[Mapping[str, str]] = {}
    compares_samples: ClassVar[bool] = False
    Options: ClassVar[type[MethodOptions]] = MethodOptions

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Options with their defaults."""
        return {name: field.default for name, (field, _) in declared(cls.Options).items()}

    @classmethod
    def notes(cls) -> dict[str, str]:
        """What is to be said beside the defaults of options and recipe entries: unit, and whether they are ours."""
        notes = {name: about.note for name, (_, about) in declared(cls.Options).items() if about.note}
        return {**notes, **cls.recipe_notes}
