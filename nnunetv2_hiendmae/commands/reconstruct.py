"""`hiendmae reconstruct`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_device, keywords

HELP = "pictures of a pretraining run: input, masked input, reconstruction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN", help="folder of a run of hiendmae pretrain")
    add("-o", dest="output", type=Path, required=True, metavar="DIR", help="where the PNG and NIfTI files go")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--case", metavar="DATASET/CASE", help="one preprocessed case of the run")
    which("--cases", type=int, default=4, metavar="N", help="so many cases, drawn by the seed")
    add("--view", metavar="NAME", help="one of the method's views (default: all)")
    add("--seed", type=int, default=0, help="decides cases, crops and masks")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.inspection.reconstruct import reconstruct

    print(*reconstruct(**keywords(args)), sep="\n")
