"""`hiendmae demo`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_device, keywords
from nnunetv2_hiendmae.environment import enable_discovery
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, MAIN_METHODS

HELP = "the whole road on the embedded images: pretrain, fine-tune, predict, Dice"
# option -> field of the demo's budget, and what it counts
BUDGET = {
    "--pretrain-epochs": ("pretrain_epochs", "pretraining epochs"),
    "--steps-per-epoch": ("steps_per_epoch", "pretraining steps per epoch"),
    "--epochs": ("finetune_epochs", "fine-tuning epochs"),
    "--iterations-per-epoch": ("iterations_per_epoch", "fine-tuning batches per epoch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", dest="output", type=Path, default=Path("demo_output"), metavar="DIR", help="new folder for everything")
    images = parser.add_mutually_exclusive_group().add_argument
    task = {"default": argparse.SUPPRESS, "metavar": "{brain,ct}"}
    images("--task", help="embedded images: tissue of MR brain templates (default), or organs of abdominal CT", **task)
    own = "folder with two nnU-Net datasets, one of them with labels; encoder.safetensors in it is fine-tuned as well"
    images("--data", type=Path, metavar="DIR", help=own)
    which = parser.add_mutually_exclusive_group().add_argument
    # no default value: argparse would take the default, given beside --all, for not given
    one = {"dest": "methods", "default": argparse.SUPPRESS}
    which("--method", nargs=1, metavar="M", help=f"see: hiendmae methods (default: {DEFAULT_METHOD})", **one)
    which("--all", action="store_const", const=[*MAIN_METHODS], help="the four methods and scratch in one table", **one)
    for option, (name, what) in BUDGET.items():
        add(option, dest=name, type=int, default=argparse.SUPPRESS, metavar="N", help=what)
    add("--seed", type=int, default=0)
    add("-np", dest="num_processes", type=int, default=2, metavar="N", help="processes")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.demo import run_demo

    enable_discovery()
    run_demo(**keywords(args))
