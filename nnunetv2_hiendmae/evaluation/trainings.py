"""What nnU-Net's folders say of the trainings behind results: other plans of the same name, other names of classes, and
trainings that are not finished."""

import ast
import json
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.evaluation.results import Run
from nnunetv2_hiendmae.former_plans import changes

# nnU-Net writes it into each fold when a training starts or goes on: its trainer's attributes as texts
DEBUG = "debug.json"
# what a trainer was made with: of one that goes on, that of its checkpoint
_ARGUMENTS = "my_init_kwargs"
# there from the first save until a training is finished
_UNFINISHED = "checkpoint_latest.pth"


def notes_on_trainings(folder: Path, runs: Sequence[Run], folds: Set[int]) -> Iterator[str]:
    """What a reader must know of how the results of `folds` came about.

    Args:
        folder: `$nnUNet_results/<dataset>`.
    """
    yield from _notes_on_names([run for run in runs if folds.intersection(run.folds)])
    for run in runs:
        trained = {fold: folder / run.name / f"fold_{fold}" for fold in run.folds if fold in folds}
        plans = {fold: found for fold, path in trained.items() if (found := _plans(path))}
        first, *others = plans or (None,)
        for fold in others:
            if told := str(changes(plans[first], plans[fold], run.name.split("__")[2])):
                yield f"{run.name}: fold {fold} was trained with other plans than fold {first}: {told}"
        for fold, path in trained.items():
            if (path / _UNFINISHED).exists():
                yield (
                    f"{run.name}: fold {fold} is being trained, or was stopped ({_UNFINISHED} is there): its results "
                    "are of an earlier training"
                )


def _notes_on_names(runs: Sequence[Run]) -> Iterator[str]:
    """Classes go by their numbers: where dataset.json was changed between trainings, one may stand for two things."""
    named = [run for run in runs if run.class_names]
    for run in named[1:]:
        first = named[0]
        for number in sorted(first.class_names.keys() & run.class_names.keys()):
            name, other = first.class_names[number], run.class_names[number]
            if name != other:
                yield f"class {number} is {name} in {first.name} and {other} in {run.name}: are they the same?"


def _plans(fold: Path) -> dict[str, Any]:
    """Plans that a fold was trained with; {} where they are not known."""
    with suppress(OSError, ValueError, LookupError, TypeError, SyntaxError, RecursionError, MemoryError):
        arguments = json.loads((fold / DEBUG).read_bytes())[_ARGUMENTS]
        # the arguments are no literals: the device is among them
        plans = ast.literal_eval(re.search(r"'plans': (\{.*\}), 'configuration': '", arguments)[1])
        return plans if isinstance(plans, dict) else {}
    return {}
