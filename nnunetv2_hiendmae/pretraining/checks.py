"""Checks of a method's options: each tells in one line what came, what was needed, and which option to change."""

from typing import Any

from nnunetv2_hiendmae.architectures.tokens import num_visible
from nnunetv2_hiendmae.errors import UserError


def require(fits: bool, option: str, value: Any, needed: str) -> None:
    """
    Raises:
        UserError: `fits` is false. Say what is right, as 0 < x, and not what is wrong: no comparison holds for NaN.
    """
    if not fits:
        raise UserError(f"{option} is {value}, needed {needed}; change --set {option}=…")


def visible_of(
    total: int, option: str, ratio: float, what: str = "tokens", mend: str = ", or --crop-size for more tokens"
) -> int:
    """How many of `total` stay visible at a mask ratio: K = int(total·(1 − ratio)), as the authors compute it.

    Raises:
        UserError: the ratio is no share, or nothing would be visible, or nothing masked.
    """
    require(0 <= ratio <= 1, option, ratio, "a share between 0 and 1")
    visible = num_visible(total, ratio)
    if not 0 < visible < total:
        raise UserError(
            f"{option} {ratio} leaves {visible} of {total} {what} visible, needed at least 1 visible and 1 masked; "
            f"change --set {option}=…{mend}"
        )
    return visible
