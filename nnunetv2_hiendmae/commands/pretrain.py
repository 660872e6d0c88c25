"""`hiendmae pretrain`."""

import argparse
import shlex

from nnunetv2_hiendmae.commands.arguments import add_datasets, add_options, from_arguments
from nnunetv2_hiendmae.options.commands import PretrainOptions

HELP = "pretrain an encoder on preprocessed images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    add_options(parser, PretrainOptions)


def run(args: argparse.Namespace) -> None:
    options = from_arguments(PretrainOptions, args)
    from nnunetv2_hiendmae.pretraining.loop import pretrain

    encoder = pretrain(args.datasets, options)
    if encoder:
        print(f"encoder: {encoder}\nnext: hiendmae plan -d LABELLED_DATASET -w {shlex.quote(str(encoder))}")
