"""`hiendmae inspect`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_json, add_options, from_arguments
from nnunetv2_hiendmae.options.convert import ConvertOptions

HELP = "say what a file is and whether it would load: encoder file, checkpoint of ours or of other programs, run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("file", type=Path, metavar="FILE")
    add_options(parser, ConvertOptions)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import describe_file

    print(describe_file(args.file, from_arguments(ConvertOptions, args), as_json=args.json))
