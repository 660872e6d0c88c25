"""`hiendmae demo`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.environment import enable_discovery
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD

HELP = "the whole road on the embedded CT data: pretrain, fine-tune, predict, Dice"
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
    add("--data", type=Path, metavar="DIR", help="folder with two nnU-Net datasets, one of them with labels")
    which = parser.add_mutually_exclusive_group()
    # no default value: argparse would take the default, given beside --all, for not given
    which.add_argument(
        "--method", default=argparse.SUPPRESS, metavar="M", help=f"see: hiendmae methods (default: {DEFAULT_METHOD})"
    )
    which.add_argument("--all", action="store_true", help="all methods and scratch in one table")
    for option, (name, what) in BUDGET.items():
        add(option, dest=name, type=int, metavar="N", help=what)
    add("--seed", type=int, default=0)
    add("-np", dest="processes", type=int, default=2, metavar="N", help="processes")
    add("-device", default="cpu", choices=["cuda", "cpu"], help="device")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.demo.run import METHODS, run_demo

    enable_discovery()
    given = {name: getattr(args, name) for name, _ in BUDGET.values()}
    run_demo(
        args.output,
        data=args.data,
        methods=METHODS if args.all else (getattr(args, "method", DEFAULT_METHOD),),
        seed=args.seed,
        num_processes=args.processes,
        device=args.device,
        **{name: value for name, value in given.items() if value is not None},
    )
