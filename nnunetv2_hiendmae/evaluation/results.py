"""Dice of trained folds, from the `summary.json` that nnU-Net writes into every fold's `validation` folder."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError

SUMMARY = Path("validation") / "summary.json"
BACKGROUND = "0"


@dataclass(frozen=True)
class FoldDice:
    """Dice of one fold's validation cases.

    Args:
        cases: names, in the order of the file.
        classes: foreground labels or regions as nnU-Net writes them, e.g. "1" or "(1, 2)".
        values: (cases, classes), between 0 and 1; NaN where truth and prediction hold none of the class.
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """Results of one trainer, plans and configuration.

    Args:
        name: TRAINER__PLANS__CONFIGURATION, nnU-Net's folder name.
        folds: number of the fold -> its Dice.
        unfinished: folds that were started and have no `summary.json`.
        class_names: key as in `FoldDice.classes` -> name in dataset.json.
        has_fold_all: there is a `fold_all`, which validates on its training cases and is left out.
    """

    name: str
    folds: Mapping[int, FoldDice]
    unfinished: tuple[int, ...]
    class_names: Mapping[str, str]
    has_fold_all: bool = False


def class_means(values: np.ndarray) -> np.ndarray:
    """Mean per class over cases (cases, classes) -> (classes,), NaN values left out, as nnU-Net does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=0)


def case_means(values: np.ndarray) -> np.ndarray:
    """Mean per case over the classes that truth or prediction hold: (cases, classes) -> (cases,)."""
    return class_means(values.T)


def foreground_mean(values: np.ndarray) -> float:
    """nnU-Net's foreground mean: the mean of the classes' means; NaN if a class has no value in any case."""
    return float(np.mean(class_means(values)))


def results_folder(dataset: str | int) -> Path:
    """`$nnUNet_results/<dataset>` for an id or a name; raw and preprocessed data are not needed.

    Raises:
        UserError: none or several.
    """
    root = nnunet_folder("nnUNet_results")
    text = str(dataset)
    pattern = f"Dataset{int(text):03d}_*" if text.isdigit() else text
    found = sorted(p for p in root.glob("Dataset*") if p.is_dir() and fnmatchcase(p.name, pattern))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"-d {text} is ambiguous ({', '.join(p.name for p in found)}); give the full name")
    raise UserError(f"no results of dataset '{text}' in {root}; train a fold first: nnUNetv2_train")


def run_names(folder: Path) -> list[str]:
    """Names of the run folders of a dataset, sorted; whether there are results in them is not looked at."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and len(p.name.split("__")) == 3)


def collect_runs(folder: Path, wanted: Sequence[str] | None = None) -> list[Run]:
    """Runs of a dataset, also those without a finished fold, in the order of `wanted`, else by name.

    Args:
        folder: `$nnUNet_results/<dataset>`.
        wanted: trainers, plans, whole names, or patterns of one of these with * and ?; None: all.

    Raises:
        UserError: no finished fold at all, a name that fits nothing, or a damaged file.
    """
    there = run_names(folder)
    chosen = there if wanted is None else (name for w in wanted for name in matching(w, there))
    runs = [_read_run(folder / name) for name in dict.fromkeys(chosen)]
    if not any(run.folds for run in runs):
        of = "" if wanted is None else f" of {', '.join(run.name for run in runs)}"
        raise UserError(f"no finished fold{of} in {folder}, needed fold_*/{SUMMARY}; train one first: nnUNetv2_train")
    return runs


def matching(wanted: str, names: Sequence[str], option: str = "--runs") -> list[str]:
    """Names that `wanted` means: the whole name or one of its parts (trainer, plans, configuration), else a pattern.

    What fits literally comes before what fits as a pattern, and the whole name before a part.

    Raises:
        UserError: none fits.
    """
    tests = (
        lambda name: name == wanted,
        lambda name: wanted in name.split("__"),
        lambda name: any(fnmatchcase(text, wanted) for text in (name, *name.split("__"))),
    )
    for fits in tests:
        if found := [name for name in names if fits(name)]:
            return found
    raise UserError(
        f"{option} {wanted} fits no run, needed a trainer, plans, a whole name, or a pattern of one of these; "
        f"there are: {', '.join(names) or 'none'}"
    )


def _read_run(folder: Path) -> Run:
    folds, unfinished = {}, []
    description = _description(folder)
    for path in folder.glob("fold_*"):
        if not (number := re.fullmatch(r"fold_(\d+)", path.name)):
            continue
        if (path / SUMMARY).is_file():
            folds[int(number[1])] = _read_summary(path / SUMMARY, description.get("file_ending", ""))
        else:
            unfinished.append(int(number[1]))
    return Run(
        folder.name,
        dict(sorted(folds.items())),
        tuple(sorted(unfinished)),
        _class_names(description),
        (folder / "fold_all").is_dir(),
    )


def _read_summary(path: Path, file_ending: str) -> FoldDice:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["metric_per_case"]
        classes = tuple(key for key in rows[0]["metrics"] if key != BACKGROUND)
        cases = tuple(_case_name(row["prediction_file"], file_ending) for row in rows)
        values = np.array([[row["metrics"][c]["Dice"] for c in classes] for row in rows], dtype=float)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        fold = path.parents[1]
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}), needed nnU-Net's Dice per case; "
            f"validate {fold.parent.name} fold {fold.name.removeprefix('fold_')} again: nnUNetv2_train … --val"
        ) from e
    if not classes or len(set(cases)) != len(cases):
        raise UserError(f"{path} has no foreground class, or a case twice; validate again: nnUNetv2_train … --val")
    # sorted by label, not as text: 2 before 10
    order = sorted(range(len(classes)), key=lambda i: _labels(classes[i]))
    return FoldDice(cases, tuple(classes[i] for i in order), values[:, order])


def _case_name(file: str, ending: str) -> str:
    # the summary may have been written on another system
    name = re.split(r"[\\/]", file)[-1]
    return name.removesuffix(ending) if ending and name.endswith(ending) else name.split(".")[0]


def _labels(key: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", key))


def _description(folder: Path) -> dict[str, Any]:
    """dataset.json as nnU-Net copied it into the run's folder; {} where it is missing: only names are lost."""
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _class_names(description: Mapping[str, Any]) -> dict[str, str]:
    labels = description.get("labels", {})
    return {str(tuple(v) if isinstance(v, list) else v): name for name, v in labels.items()}
