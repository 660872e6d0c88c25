"""`hiendmae inspect`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.options import add_json

HELP = "say what a file is and whether it would load: encoder file, checkpoint of ours or of other programs, run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("file", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import describe_file

    print(describe_file(args.file, as_json=args.json))
