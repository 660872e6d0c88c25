"""`hiendmae preprocess`."""

import argparse
import sys

from nnunetv2_hiendmae.commands.arguments import add_datasets
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS

HELP = "fingerprint, plan and preprocess images; labels are not needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    parser.add_argument("-p", dest="plans", default=PRETRAIN_PLANS, metavar="PLANS", help="name of the plans")
    parser.add_argument("--like", metavar="METHOD|FILE", help="method or encoder file whose spacing and window to use")
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="target spacing in mm")
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("LO", "HI"), help="CT window in HU that becomes [0, 1]"
    )
    parser.add_argument("-np", dest="processes", type=int, default=4, metavar="N", help="processes")


def run(args: argparse.Namespace) -> int:
    from nnunetv2_hiendmae.preprocessing.preprocess import preprocess_datasets

    summary = preprocess_datasets(
        args.datasets,
        plans_name=args.plans,
        like=args.like,
        spacing_mm=args.spacing,
        window_hu=args.window,
        num_processes=args.processes,
    )
    print(
        f"{summary.done} cases preprocessed, {summary.skipped} were finished before, {len(summary.broken)} are broken"
    )
    for dataset, case, reason in summary.broken:
        print(f"broken: {dataset}/{case}: {reason}", file=sys.stderr)
    if summary.broken:
        return 2
    print(f"next: hiendmae pretrain -d {' '.join(args.datasets)} -p {args.plans}")
    return 0
