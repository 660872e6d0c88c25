"""Options that all commands have which train a network or use one on preprocessed images."""

import os
from typing import Any

from nnunetv2_hiendmae.options import check_ranges, option

# with Fabric's names
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
DHW = ("D", "H", "W")
# declarations that are the same everywhere
PRECISION = {"default": "auto", "help": "auto: bf16 (old GPUs fp16), fp32 on a CPU", "choices": ("auto", *PRECISIONS)}
DEVICE = {"default": "cuda", "help": "device", "flag": "-device", "choices": ("cuda", "cpu", "mps")}
SEED = {"default": 0, "at_least": 0, "at_most": 2**63 - 1}
# torch warns of more workers than cores
WORKERS = {"default": min(4, os.cpu_count() or 1), "metavar": "N", "at_least": 0}


class CheckedOptions:
    """Base of options: frozen dataclasses.

    Raises:
        UserError: a value is out of range.
    """

    def __post_init__(self):
        check_ranges(self)


def count(default: int | None, help: str, at_least: int = 1, metavar: str = "N", **about: Any) -> Any:
    return option(default, help, at_least=at_least, metavar=metavar, **about)
