"""`hiendmae pretrain`."""

import argparse
import shlex

from nnunetv2_hiendmae.commands.arguments import add_datasets, add_options, from_arguments
from nnunetv2_hiendmae.files import PROBE_ENCODER
from nnunetv2_hiendmae.options.commands import PretrainOptions

HELP = "pretrain an encoder on preprocessed images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    add_options(parser, PretrainOptions)
    about = "check everything, do three steps, say what time, memory and disk space the run takes; writes nothing"
    parser.add_argument("--dry-run", action="store_true", help=about)


def run(args: argparse.Namespace) -> None:
    options = from_arguments(PretrainOptions, args)
    if args.dry_run:
        from nnunetv2_hiendmae.pretraining.dry_run import dry_run

        if found := dry_run(args.datasets, options):
            print(found.text())
        return
    from nnunetv2_hiendmae.pretraining.loop import pretrain

    encoder = pretrain(args.datasets, options)
    if encoder:
        best = encoder.with_name(PROBE_ENCODER)
        if options.probe is not None and best.exists():
            print(f"best by the probe: {best}")
        print(f"encoder: {encoder}\nnext: hiendmae plan -d LABELLED_DATASET -w {shlex.quote(str(encoder))}")
