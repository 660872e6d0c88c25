"""`hiendmae presets`."""

import argparse

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "list encoder presets with their parameter counts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import list_presets

    print(list_presets(as_json=args.json))
