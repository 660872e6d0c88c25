"""`hiendmae preprocess`."""

import argparse
import shlex
import sys

from nnunetv2_hiendmae.commands.arguments import add_datasets, add_options, from_arguments
from nnunetv2_hiendmae.environment import device_words
from nnunetv2_hiendmae.options.commands import PreprocessOptions
from nnunetv2_hiendmae.recipes import HEAD_CROP, MRI

HELP = "fingerprint, plan and preprocess images; labels are not needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    add_options(parser, PreprocessOptions)


def run(args: argparse.Namespace) -> int:
    from nnunetv2_hiendmae.preprocessing.preprocess import preprocess_datasets

    options = from_arguments(PreprocessOptions, args)
    summary = preprocess_datasets(args.datasets, options)
    print(
        f"{summary.done} cases preprocessed, {summary.skipped} were finished before, {len(summary.broken)} are broken"
    )
    for dataset, case, reason in summary.broken:
        print(f"broken: {dataset}/{case}: {reason}", file=sys.stderr)
    if summary.broken:
        return 2
    crop = ["--crop-size", *map(str, HEAD_CROP)] if options.like == MRI else []
    command = shlex.join(["hiendmae", "pretrain", "-d", *args.datasets, "-p", options.plans_name, *crop])
    print(f"next: {command}{device_words()}")
    return 0
