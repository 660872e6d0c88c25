"""`hiendmae plan`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import ENCODER_FILE, add_options, from_arguments
from nnunetv2_hiendmae.options.commands import PlanOptions

HELP = "write nnU-Net plans that fine-tune an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="labelled dataset to fine-tune on")
    add("-w", dest="encoder_file", type=Path, required=True, metavar="FILE", help=ENCODER_FILE)
    add_options(parser, PlanOptions)


def run(args: argparse.Namespace) -> None:
    options = from_arguments(PlanOptions, args)
    from nnunetv2_hiendmae.planning.finetune import plan_finetuning

    planned = plan_finetuning(args.dataset, args.encoder_file, options)
    print("\n".join([f"plans: {planned.path}", *planned.messages, "next:"]))
    print("\n".join(f"  {line}" for line in ('eval "$(hiendmae env)"', *planned.next_commands)))
