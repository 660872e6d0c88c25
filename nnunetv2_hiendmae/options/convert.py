"""What a user may say about a checkpoint of another program, for `hiendmae convert` and `inspect`."""

from dataclasses import dataclass
from typing import Any

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import check_ranges, declared, flag, option

# what a file's arrays may have been; nnU-Net's are (z, y, x), called D, H, W
AXES = ("xyz", "dhw")


@dataclass(frozen=True)
class ConvertOptions:
    """None: found out, or as the format usually is.

    Raises:
        UserError: a value is out of range.
    """

    format: str | None = option(
        None,
        "hiendmae, mim, glmae, mae3d, timm or monai (default: by the names of its tensors; a bare GL-MAE file has "
        "those of mae3d, without its decoder those of timm)",
        metavar="NAME",
    )
    num_heads: int | None = option(
        None, "attention heads (default: those of the released sizes)", metavar="H", at_least=1
    )
    img_size: tuple[int, int, int] | None = option(
        None,
        "crop in voxels, in nnU-Net's order z y x, that its positions belong to (default: read off sin-cos "
        "positions, otherwise a cube)",
        metavar=("D", "H", "W"),
        at_least=1,
    )
    axes: str | None = option(
        None,
        "order of its arrays; xyz is permuted to nnU-Net's z y x (default: xyz for the authors' files hiendmae, "
        "mim, glmae and mae3d; dhw, kept as it is, for timm and monai)",
        choices=AXES,
    )
    use_teacher: bool = option(False, "take GL-MAE's momentum teacher instead of the student")
    method: str | None = option(
        None, "whose fine-tuning recipe timm and monai weights get (default: mae3d)", metavar="NAME"
    )

    def __post_init__(self):
        if self.img_size is not None:
            object.__setattr__(self, "img_size", tuple(self.img_size))
            if len(self.img_size) != 3:
                raise UserError(f"--img-size is {self.img_size}, needed three numbers D H W")
        check_ranges(self)

    def said(self) -> dict[str, Any]:
        """What was said, by the option of the command line."""
        values = {flag(name, about): getattr(self, name) for name, (_, about) in declared(type(self)).items()}
        return {spelled: value for spelled, value in values.items() if value not in (None, False)}

    def arguments(self) -> list[str]:
        """`said` as on a command line."""
        words = []
        for spelled, value in self.said().items():
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [spelled, *map(str, values)]
        return words
