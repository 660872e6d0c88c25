"""`hiendmae env`."""

import argparse
import os
import shlex

from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, with_discovery

HELP = 'print the line that lets nnU-Net find our trainers; use: eval "$(hiendmae env)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(_: argparse.Namespace) -> None:
    value = with_discovery(os.environ.get(EXT_TRAINER_VARIABLE))
    print(f"export {EXT_TRAINER_VARIABLE}={shlex.quote(value)}")
