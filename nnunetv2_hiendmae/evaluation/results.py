"""Dice of trained folds, from the `summary.json` that nnU-Net writes into every fold's `validation` folder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from nnunetv2_hiendmae.environment import dataset_id, device_words, is_called, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import telling_damage
from nnunetv2_hiendmae.schemas import Summary, read_dataset_json, read_json

SUMMARY = Path("validation") / "summary.json"
BACKGROUND = "0"


@dataclass(frozen=True)
class Run:
    """Results of one trainer, plans and configuration.

    Args:
        name: TRAINER__PLANS__CONFIGURATION, nnU-Net's folder name.
        folds: number of the fold -> Dice of its validation cases, a row for each case in the order of the file, a
            column for each foreground label or region as nnU-Net writes it ("1" or "(1, 2)"), sorted by label; values
            between 0 and 1, NaN where truth and prediction hold none of the class.
        unfinished: fold that was started and has no `summary.json` -> nnU-Net's command that finishes it.
        class_names: column as in `folds` -> name in dataset.json.
        has_fold_all: there is a `fold_all`, which validates on its training cases and is left out.
    """

    name: str
    folds: Mapping[int, pd.DataFrame]
    unfinished: Mapping[int, str]
    class_names: Mapping[str, str]
    has_fold_all: bool = False


def results_folder(dataset: str | int) -> Path:
    """`$nnUNet_results/<dataset>` for an id or a name; raw and preprocessed data are not needed.

    Raises:
        UserError: none or several.
    """
    root = nnunet_folder("nnUNet_results")
    found = sorted(p for p in root.glob("Dataset*") if p.is_dir() and is_called(p.name, dataset))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"-d {dataset} is ambiguous ({', '.join(p.name for p in found)}); give the full name")
    raise UserError(f"no results of dataset '{dataset}' in {root}; train a fold first: nnUNetv2_train")


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
    try:
        about = read_dataset_json(folder, for_images=False)
    except UserError:
        about = {}  # only names are lost
    numbered = {int(p.name[5:]): p for p in folder.glob("fold_*") if re.fullmatch(r"fold_\d+", p.name)}
    finished = {n: path / SUMMARY for n, path in sorted(numbered.items()) if (path / SUMMARY).exists()}
    return Run(
        folder.name,
        {n: _read_summary(path, about.get("file_ending", "")) for n, path in finished.items()},
        {n: _finishing_command(numbered[n]) for n in sorted(numbered.keys() - finished.keys())},
        {str(tuple(v) if isinstance(v, list) else v): name for name, v in about.get("labels", {}).items()},
        (folder / "fold_all").is_dir(),
    )


def training_command(fold: Path, option: str = "") -> str:
    """nnU-Net's command for a fold, by its folder, which names dataset, trainer, plans and configuration."""
    trainer, plans, configuration = fold.parent.name.split("__")
    number, dataset = fold.name.removeprefix("fold_"), dataset_id(fold.parents[1].name)
    return f"nnUNetv2_train {dataset} {configuration} {number} -p {plans} -tr {trainer} {option}".rstrip()


def _finishing_command(fold: Path) -> str:
    # nnU-Net validates only what is trained to its end, and continues what has a checkpoint
    there = {file.name for file in fold.glob("checkpoint_*.pth")}
    option = "--val" if "checkpoint_final.pth" in there else "--c" if there else ""
    return f"{training_command(fold, option)}{device_words()}"


def _read_summary(path: Path, file_ending: str) -> pd.DataFrame:
    fold = path.parents[1]
    number = fold.name.removeprefix("fold_")
    again = f"validate {fold.parent.name} fold {number} again: {training_command(fold, '--val')}"
    with telling_damage(path, f"nnU-Net's Dice per case; {again}"):
        rows = read_json(path, Summary, again)["metric_per_case"]
        # by label, not as text: 2 before 10
        keys = sorted(rows[0]["metrics"], key=lambda key: [*map(int, re.findall(r"\d+", key))])
        keys = [key for key in keys if key != BACKGROUND]
        # the summary may have been written on another system; this splits at both kinds of slashes
        files = [PureWindowsPath(row["prediction_file"]).name for row in rows]
        cases = [n.removesuffix(file_ending) if n.endswith(file_ending or "/") else n.split(".")[0] for n in files]
        values = np.array([[row["metrics"][key]["Dice"] for key in keys] for row in rows], dtype=float)
    if not keys or len(set(cases)) != len(cases):
        raise UserError(f"{path} has no foreground class, or a case twice; {again}")
    return pd.DataFrame(values, index=cases, columns=keys)
