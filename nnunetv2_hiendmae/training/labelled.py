"""Preprocessed cases of a fold with their labels, which a probe is fitted to and tested on: nothing else in pretraining
reads labels."""

import pickle
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder, preprocess_command
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.schemas import SPLITS_FILE, Folds, read_dataset_json, read_json
from nnunetv2_hiendmae.training.views import grid_corners
from nnunetv2_hiendmae.training.volumes import Case, find_cases, telling_unreadable
from nnunetv2_hiendmae.volume_format import VolumeFormat

# of a fold's training and test cases each, where nobody says how many and the fold has as many
DEFAULT_CASES = 4
# stands for voxels that nobody labelled: what dataset.json calls "ignore", and outside of the volume
UNKNOWN = -2
# of a case; where it has more, those with the most foreground
MOST_CROPS = 32


@dataclass(frozen=True)
class LabelledCases:
    """Training and test cases of a fold, and what their labels mean.

    Args:
        classes: foreground class → values of its voxels; several for a region.
        ignored: value of voxels without a label, None: there are none.
    """

    dataset: str
    fold: int
    format: VolumeFormat
    classes: dict[str, tuple[int, ...]]
    ignored: int | None
    train: tuple[Case, ...]
    test: tuple[Case, ...]

    def read_labels(self, case: Case) -> np.ndarray:
        """(D, H, W) values; `UNKNOWN` where nobody labelled.

        Raises:
            UserError: the file cannot be read.
        """
        seg, _ = _load(case)
        with telling_unreadable(case):
            seg = seg[0]
        return np.where(seg == self.ignored, UNKNOWN, seg) if self.ignored is not None else seg


def find_labelled(
    dataset: str | int,
    plans_name: str,
    configuration: str,
    fold: int = 0,
    cases: int | None = None,
    like: VolumeFormat | None = None,
) -> LabelledCases:
    """Cases of a fold of `splits_final.json`, drawn by their names alone.

    Args:
        cases: training cases, and as many test cases; None: up to `DEFAULT_CASES`.
        like: format that they must have.

    Raises:
        UserError: everything that is wrong with the dataset for this, at once; only where it cannot be found or is not
            preprocessed with such plans, that alone.
    """
    name = dataset_name(dataset)
    with_labels = preprocess_command(name, plans_name, configuration)
    try:
        found = find_cases([name], plans_name, configuration)
    except UserError as e:
        raise UserError(f"{e}, then, since that leaves labels out: {with_labels}") from e
    root = nnunet_folder("nnUNet_preprocessed") / name
    faults = _differences(found.format, like) if like else []
    classes, ignored = _classes(read_dataset_json(root, for_images=False).get("labels", {}))
    if not classes:
        faults.append(f"{root / 'dataset.json'} names no label besides background")
    drawn: dict[str, tuple[Case, ...]] = {}
    try:
        drawn = _draw(_read_fold(root, fold), fold, cases, found.cases)
    except UserError as e:
        faults.append(str(e))
    if wrong := _label_faults(drawn):
        faults.append(f"{wrong}; run: {with_labels}")
    if faults:
        raise UserError("; ".join(faults))
    return LabelledCases(name, fold, found.format, classes, ignored, *drawn.values())


def _differences(ours: VolumeFormat, wanted: VolumeFormat) -> list[str]:
    differing = ours.differences(wanted)
    if len(ours.channel_names) == len(wanted.channel_names) == 1:
        # "T1" and "MR" cannot be confused; how they were normalised is another key
        differing.pop("channel_names", None)
    told = ", ".join(f"{key} is {own}, needed {other}" for key, (own, other) in differing.items())
    return [f"{told} as in the images of pretraining: preprocess it as those were"] if told else []


def _classes(labels: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Foreground classes and the value to ignore of dataset.json."""
    values = {name: tuple(map(int, v if isinstance(v, list) else [v])) for name, v in labels.items()}
    ignored = values.pop("ignore", (None,))[0]
    return {name: v for name, v in values.items() if name != "background" and v != (0,)}, ignored


def _read_fold(root: Path, fold: int) -> dict[str, list[str]]:
    file = root / SPLITS_FILE
    if not file.exists():
        raise UserError(f"{file} is missing; run: hiendmae splits -d {shlex.quote(root.name)} --shots 1")
    folds = read_json(file, Folds, 'needed a list of folds with "train" and "val"; put it back')
    if fold >= len(folds):
        raise UserError(f"{file} has the folds 0 to {len(folds) - 1}, no {fold}")
    return folds[fold]


def _draw(
    fold: Mapping[str, list[str]], number: int, cases: int | None, there: Sequence[Case]
) -> dict[str, tuple[Case, ...]]:
    """So many of a fold's training and test cases, by an order that depends on their names alone."""
    names = {"training": sorted(set(fold["train"])), "test": sorted(set(fold["val"]))}
    if both := sorted({*names["training"]} & {*names["test"]}):
        raise UserError(f"fold {number} trains on its own test cases ({some(both)})")
    fewest = min(map(len, names.values()))
    if fewest < (cases or 1):
        counts = " and ".join(f"{len(of_part)} {part}" for part, of_part in names.items())
        raise UserError(f"fold {number} has {counts} cases, needed {cases or 1} of each (--probe-cases)")
    rng, count = np.random.default_rng(number), cases or min(DEFAULT_CASES, fewest)
    drawn = {part: sorted(rng.permutation(of_part)[:count].tolist()) for part, of_part in names.items()}
    by_name = {case.path.stem: case for case in there}
    if missing := [name for of_part in drawn.values() for name in of_part if name not in by_name]:
        raise UserError(f"{some(missing)} of fold {number} {'is' if len(missing) == 1 else 'are'} not preprocessed")
    return {part: tuple(by_name[name] for name in of_part) for part, of_part in drawn.items()}


def _label_faults(drawn: Mapping[str, Sequence[Case]]) -> str:
    """What is wrong with the labels of cases; "" if nothing is."""
    # nnU-Net's preprocessing records places of every class of a case that it had labels for
    places = {case: _load(case)[1].get("class_locations") for cases in drawn.values() for case in cases}
    if without := [case.path.stem for case, found in places.items() if found is None]:
        return f"the arrays of {some(without)} hold no labels (hiendmae preprocess leaves them out)"
    # where voxels may be ignored, all that are not are recorded too, by a key of all values with -1
    classes = {case: [v for key, v in found.items() if np.min(key) >= 0] for case, found in places.items()}
    empty = [part for part, cases in drawn.items() if not any(map(len, (v for c in cases for v in classes[c])))]
    return f"the {' and '.join(empty)} cases hold no foreground" if empty else ""


def _load(case: Case) -> tuple[Any, dict[str, Any]]:
    """Segmentation (1, D, H, W), still to be read, of a case and what nnU-Net recorded of it."""
    try:
        _, seg, _, properties = nnUNetDatasetBlosc2(str(case.path.parent), [case.path.stem]).load_case(case.path.stem)
        return seg, properties
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(
            f"cannot read the labels of case {case.name} ({type(e).__name__}: {e}); delete the case's files and "
            "preprocess again"
        ) from e


def num_crops(shape: Sequence[int], size: Sequence[int]) -> int:
    """Crops of a case that are used."""
    return min(MOST_CROPS, len(grid_corners(shape, size)))
