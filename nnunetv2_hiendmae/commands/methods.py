"""`hiendmae methods`."""

import argparse

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "list pretraining methods with their defaults and sources"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import list_methods

    print(list_methods(as_json=args.json))
