"""Options of `hiendmae preprocess`."""

from dataclasses import dataclass
from pathlib import Path

from nnunetv2_hiendmae.options import check_ranges, option
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS


@dataclass(frozen=True)
class PreprocessOptions:
    """How images become the arrays of pretraining; what is given wins over `like`, and that over the default method.

    Raises:
        UserError: a number is out of range.
    """

    plans_name: str = option(PRETRAIN_PLANS, "name of the plans", flag="-p", metavar="PLANS")
    like: str | Path | None = option(
        None, "method or encoder file whose spacing and window to use", metavar="METHOD|FILE"
    )
    spacing_mm: tuple[float, float, float] | None = option(
        None, "target spacing in mm", flag="--spacing", metavar=("D", "H", "W")
    )
    window_hu: tuple[float, float] | None = option(
        None, "CT window in HU that becomes [0, 1]", flag="--window", metavar=("LO", "HI")
    )
    num_processes: int = option(4, "processes", flag="-np", metavar="N", at_least=1)

    def __post_init__(self):
        check_ranges(self)
