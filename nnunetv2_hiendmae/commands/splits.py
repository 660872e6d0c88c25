"""`hiendmae splits`."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from nnunetv2_hiendmae.commands.arguments import add_json
from nnunetv2_hiendmae.environment import device_words
from nnunetv2_hiendmae.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_hiendmae.evaluation.folds import Splits

HELP = "append few-shot folds to splits_final.json"
PART = "train on this part of the cases, 0 < F <= 1, rounded to the nearest number, at least 1; one fold each"

REPEATS = "that many folds for each amount, on other cases (patients, where patients.json is) while there are enough"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="dataset id or name")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--shots", type=int, nargs="+", metavar="K", help="train on K cases; one fold for each K")
    what("--fraction", type=float, nargs="+", metavar="F", help=PART)
    what("--list", action="store_true", help="show all folds and what they mean")
    last = "remove appended folds: only the last ones, and none with results"
    what("--remove", type=int, nargs="+", metavar="FOLD", help=last)
    add("--of-fold", type=int, default=0, metavar="FOLD", help="fold whose training cases are drawn from")
    add("--repeats", type=int, default=1, metavar="R", help=REPEATS)
    add("--seed", type=int, default=0, help="decides which cases are drawn first; fewer are always among more")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.evaluation.draws import FRACTION, SHOTS, Subset
    from nnunetv2_hiendmae.evaluation.folds import append_folds, list_folds, remove_folds

    new = []
    if args.list or args.remove:
        splits = remove_folds(args.dataset, args.remove) if args.remove else list_folds(args.dataset)
    else:
        if args.repeats < 1:
            raise UserError(f"--repeats is {args.repeats}, needed 1 or more")
        kind, values = (SHOTS, args.shots) if args.shots else (FRACTION, args.fraction)
        try:
            subsets = [Subset(kind, value, args.of_fold, args.seed, r) for value in values for r in range(args.repeats)]
        except ValueError as e:
            raise UserError(str(e)) from e
        splits, new = append_folds(args.dataset, subsets)
    folds = [_describe(splits, number) for number in new or range(len(splits.folds))]
    if args.json:
        print(json.dumps({"dataset": splits.folder.name, "file": str(splits.file), "folds": folds}))
        return
    print(f"{splits.file}:")
    for fold in folds:
        print("  fold {fold}: {meaning}, {train} to train, {val} to validate".format(**fold))
    if new:
        name = shlex.quote(splits.folder.name)
        print(f"next:\n  nnUNetv2_train {name} 3d_fullres {new[0]} -p PLANS -tr TRAINER{device_words()}")


def _describe(splits: "Splits", number: int) -> dict[str, object]:
    fold, subset = splits.folds[number], splits.appended.get(number)
    about = {"fold": number, "meaning": splits.meaning(number), **(subset.facts() if subset else {})}
    return {**about, "train": len(fold["train"]), "val": len(fold["val"])}
