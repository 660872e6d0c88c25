"""`hiendmae demo`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.environment import enable_discovery

DEFAULT_METHOD = "hiendmae"
HELP = "the whole road on the embedded CT data: pretrain, fine-tune, predict, Dice"


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
    add("--pretrain-epochs", type=int, metavar="N", help="pretraining epochs")
    add("--steps-per-epoch", type=int, metavar="N", help="pretraining steps per epoch")
    add("--epochs", type=int, metavar="N", help="fine-tuning epochs")
    add("--iterations-per-epoch", type=int, metavar="N", help="fine-tuning batches per epoch")
    add("--seed", type=int, default=0)
    add("-np", dest="processes", type=int, default=2, metavar="N", help="processes")
    add("-device", default="cpu", choices=["cuda", "cpu"], help="device")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.demo.budget import METHODS
    from nnunetv2_hiendmae.demo.run import run_demo

    enable_discovery()
    budget = {
        "pretrain_epochs": args.pretrain_epochs,
        "steps_per_epoch": args.steps_per_epoch,
        "finetune_epochs": args.epochs,
        "iterations_per_epoch": args.iterations_per_epoch,
    }
    run_demo(
        args.output,
        data=args.data,
        methods=METHODS if args.all else (getattr(args, "method", DEFAULT_METHOD),),
        seed=args.seed,
        num_processes=args.processes,
        device=args.device,
        **{k: v for k, v in budget.items() if v is not None},
    )
