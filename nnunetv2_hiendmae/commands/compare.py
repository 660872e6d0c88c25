"""`hiendmae compare`."""

import argparse
import json
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_json, keywords

HELP = "compare trained runs of a dataset: tables, paired tests, a figure"
RUNS = "trainers, plans, whole names TRAINER__PLANS__CONFIG, or patterns of one of these with * and ?, in quotes"
EXAMPLE = "'FewShot_*' takes all plans of that beginning"
BASELINE = "compare all others with this run, told in the same way; it must fit one run (default: every pair)"
METRICS = "some of dice,nsd,hd95,volume; those beside Dice are measured in nnU-Net's stored predictions (default: dice)"
TOLERANCE = "of nsd in mm: a number for all classes, CLASS=MM for one (default: 1)"
EQUIVALENCE = "margin in Dice points of 0.01: runs are equivalent where they are shown to differ by less"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="dataset id or name")
    add("--runs", nargs="+", metavar="NAME", help=f"{RUNS}: {EXAMPLE} (default: all with results)")
    add("--baseline", metavar="NAME", help=BASELINE)
    add("--folds", type=int, nargs="+", metavar="FOLD", help="only these folds (default: all)")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--equivalence", type=float, default=1.0, metavar="POINTS", help=EQUIVALENCE)
    add("--metrics", type=_names, default=argparse.SUPPRESS, metavar="NAME,…", help=METRICS)
    add("--tolerance", nargs="+", default=argparse.SUPPRESS, metavar="MM", help=TOLERANCE)
    add("-np", dest="num_processes", type=int, default=4, metavar="N", help="processes that measure surfaces")
    add("-o", dest="output", type=Path, metavar="DIR", help="also write Markdown, JSON, LaTeX, CSV and pictures")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.evaluation.compare import compare
    from nnunetv2_hiendmae.evaluation.report import as_json, markdown, write

    report = compare(**keywords(args, "output", "json"))
    written = write(report, args.output) if args.output else []
    if args.json:
        print(json.dumps(as_json(report)))
        return
    print(markdown(report))
    print("\n".join(f"wrote {path}" for path in written))


def _names(text: str) -> list[str]:
    return text.split(",")
