"""`hiendmae inspect`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_json, add_weight_hints

HELP = "say what a file is and whether it would load: encoder file, checkpoint of ours or of other programs, run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("file", type=Path, metavar="FILE")
    add_weight_hints(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import describe_file
    from nnunetv2_hiendmae.weights import ConvertOptions

    print(describe_file(args.file, ConvertOptions.of(vars(args)), as_json=args.json))
