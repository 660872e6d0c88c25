"""`hiendmae splits`."""

import argparse
import json
from typing import TYPE_CHECKING

from nnunetv2_hiendmae.commands.arguments import add_json
from nnunetv2_hiendmae.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_hiendmae.evaluation.splits import DatasetSplits

HELP = "append few-shot folds to splits_final.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="dataset id or name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shots", type=int, nargs="+", metavar="K", help="train on K cases; one fold for each K")
    what.add_argument(
        "--fraction",
        type=float,
        nargs="+",
        metavar="F",
        help="train on this part of the cases, 0 < F <= 1, rounded to the nearest number, at least 1; one fold each",
    )
    what.add_argument("--list", action="store_true", help="show all folds and what they mean")
    what.add_argument(
        "--remove",
        type=int,
        nargs="+",
        metavar="FOLD",
        help="remove appended folds: only the last ones, and none with results",
    )
    add("--of-fold", type=int, default=0, metavar="FOLD", help="fold whose training cases are drawn from")
    add("--seed", type=int, default=0, help="decides which cases are drawn first; fewer are always among more")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.evaluation.folds import FRACTION, SHOTS, Subset
    from nnunetv2_hiendmae.evaluation.splits import append_folds, list_folds, remove_folds

    if args.list:
        return _print(list_folds(args.dataset), None, args.json)
    if args.remove:
        return _print(remove_folds(args.dataset, args.remove), None, args.json)
    kind, values = (SHOTS, args.shots) if args.shots else (FRACTION, args.fraction)
    try:
        subsets = [Subset(kind, value, args.of_fold, args.seed) for value in values]
    except ValueError as e:
        raise UserError(str(e)) from e
    found, numbers = append_folds(args.dataset, subsets)
    return _print(found, numbers, args.json)


def _print(found: "DatasetSplits", numbers: list[int] | None, as_json: bool) -> None:
    """All folds when `numbers` is None."""
    shown = range(len(found.splits.folds)) if numbers is None else numbers
    folds = [_describe(found, number) for number in shown]
    if as_json:
        print(json.dumps({"dataset": found.dataset, "file": str(found.file), "folds": folds}))
        return
    print(f"{found.file}:")
    print(
        "\n".join(f"  fold {f['fold']}: {f['meaning']}, {f['train']} to train, {f['val']} to validate" for f in folds)
    )
    if numbers:
        train = f"nnUNetv2_train {found.dataset} 3d_fullres {numbers[0]} -p PLANS -tr TRAINER"
        print(f"next:\n  {train}")


def _describe(found: "DatasetSplits", number: int) -> dict[str, object]:
    fold, subset = found.splits.folds[number], found.splits.appended.get(number)
    about = {} if subset is None else {k: getattr(subset, k) for k in ("kind", "value", "of_fold", "seed")}
    counts = {"train": len(fold["train"]), "val": len(fold["val"])}
    return {"fold": number, "meaning": found.splits.meaning(number), **about, **counts}
