"""Metrics beside Dice, from the predictions that nnU-Net's validation stored and the labels that it compared them with,
kept beside `summary.json`."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
import skimage
from nnunetv2.evaluation.evaluate_predictions import key_to_label_or_region, region_or_label_to_mask
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from typing_extensions import TypedDict

from nnunetv2_hiendmae.environment import device_words, nnunet_folder
from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable, some
from nnunetv2_hiendmae.evaluation.metrics import DECIMALS, HD95, MISSED, NSD, SIGNED, VOLUME
from nnunetv2_hiendmae.evaluation.results import Run, training_command
from nnunetv2_hiendmae.evaluation.surfaces import MEASURES, PREDICTED_ML, REFERENCE_ML, measure
from nnunetv2_hiendmae.files import sha256, write_text
from nnunetv2_hiendmae.processes import in_processes
from nnunetv2_hiendmae.schemas import PlansReader, read_as, read_dataset_json, validated

CACHE = "hiendmae_metrics.json"
# counted up when the same files would give other numbers
VERSION = 1
# how far apart equal Dice may lie, of which one was written as text
_SAME_DICE = 1e-6
# how far apart equal spacings may lie, relatively: as in nnU-Net's verify_dataset_integrity
_SAME_SPACING = 1e-5
_MOST_NAMED = 10

logger = logging.getLogger(__name__)

_Measures = TypedDict("_Measures", dict.fromkeys(MEASURES, float))
Values = dict[str, _Measures]  # by class, as nnU-Net writes it


class _Kept(TypedDict):
    sha256: str
    classes: Values


@dataclass(frozen=True)
class _Case:
    """A validation case of a fold, and all that its metrics depend on.

    Args:
        classes: as nnU-Net writes them, each with the tolerance in mm and the Dice in summary.json.
        ignore: label whose voxels belong to neither mask.
    """

    run: str
    fold: int
    name: str
    prediction: Path
    label: Path
    reader: str
    ignore: int | None
    classes: tuple[tuple[str, float, float], ...]

    @property
    def cache(self) -> Path:
        return self.prediction.with_name(CACHE)

    def digest(self) -> str:
        files = [sha256(self.prediction), sha256(self.label)]
        about = [VERSION, scipy.__version__, skimage.__version__, self.reader, self.ignore, self.classes, files]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def measure_runs(
    folder: Path, runs: Sequence[Run], tolerances: Sequence[float], num_processes: int
) -> dict[str, list[Run]]:
    """NSD, HD95 and volume differences of every fold in `runs`.

    What is known from an earlier call, of the same files and tolerances, is not measured again.

    Args:
        folder: `$nnUNet_results/<dataset>`.
        runs: with the Dice of the folds that are wanted.
        tolerances: of the classes, in mm, in the order of the tables.

    Returns:
        Name of a metric, or `SIGNED` or `MISSED` -> the runs, with it in place of Dice.

    Raises:
        UserError: of some cases the prediction or the label is missing, damaged, or no longer what nnU-Net compared.
    """
    cases = [case for run in runs if run.folds for case in _cases(folder / run.name, run, tolerances)]
    _refuse({case: reason for case in cases if (reason := _missing(case))})
    digests = {case: case.digest() for case in cases}
    kept = {cache: _read_cache(cache) for cache in {case.cache for case in cases}}
    known = {case: found for case in cases if (found := _known(case, kept[case.cache], digests[case]))}
    todo, problems = [case for case in cases if case not in known], {}
    if known:
        logger.info("metrics of %d of %d predictions are known from an earlier call", len(known), len(cases))
    jobs, last_of_fold = [partial(_measured, case) for case in todo], {case.cache: case for case in todo}
    for case, outcome in zip(todo, in_processes(jobs, num_processes, "measuring surfaces"), strict=True):
        (problems if isinstance(outcome, str) else known)[case] = outcome
        if case is last_of_fold[case.cache]:
            there = [other for other in cases if other.cache == case.cache and other in known]
            _write_cache(case.cache, {c.name: {"sha256": digests[c], "classes": known[c]} for c in there})
    _refuse(problems)
    return _tables(runs, {(case.run, case.fold, case.name): values for case, values in known.items()})


def _cases(folder: Path, run: Run, tolerances: Sequence[float]) -> Iterator[_Case]:
    again = f"copy it from the machine that trained {run.name}"
    ending = read_dataset_json(folder)["file_ending"]
    reader = read_as(folder / "plans.json", PlansReader, again)["image_reader_writer"]
    try:
        recursive_find_reader_writer_by_name(reader)
    except RuntimeError as e:
        raise UserError(
            f"{folder / 'plans.json'} names the reader {reader}, which nnunetv2.imageio lacks; {again}"
        ) from e
    ignore = next((int(key) for key, name in run.class_names.items() if name == "ignore"), None)
    for fold, dice in run.folds.items():
        for name, values in dice.iterrows():
            file = f"{name}{ending}"
            classes = tuple(zip(dice.columns, tolerances, map(float, values), strict=True))
            prediction = folder / f"fold_{fold}" / "validation" / file
            label = _label(folder.parent.name, file)
            yield _Case(run.name, fold, name, prediction, label, reader, ignore, classes)


def _label(dataset: str, file: str) -> Path:
    """That with which nnU-Net compared: its copy, or where it was copied from."""
    copy = nnunet_folder("nnUNet_preprocessed") / dataset / "gt_segmentations" / file
    if copy.is_file():
        return copy
    raw = nnunet_folder("nnUNet_raw") / dataset / "labelsTr" / file
    return raw if raw.is_file() else copy


def _missing(case: _Case) -> str:
    lacking = [("prediction", case.prediction), ("label", case.label)]
    return " and ".join(f"no {what} {_short(path)}" for what, path in lacking if not path.is_file())


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _refuse(problems: Mapping[_Case, str]) -> None:
    """Raises UserError: there are problems; tells all of them, and for each fold the command that predicts again."""
    told = []
    for (run, fold), cases in groupby(problems, lambda case: (case.run, case.fold)):
        of_fold = [*cases]
        command = f"{training_command(of_fold[0].prediction.parents[1], '--val')}{device_words()}"
        named = some((f"{case.name} ({problems[case]})" for case in of_fold), _MOST_NAMED)
        told.append(f"{run} fold {fold}, {len(of_fold)} of its cases: {named}; this makes predictions again: {command}")
    if told:
        raise UserError(f"metrics beside Dice need nnU-Net's predictions and labels. {'. '.join(told)}")


def _measured(case: _Case) -> Values | str:
    """Metrics of a case, or what is wrong with it."""
    reader, read = recursive_find_reader_writer_by_name(case.reader)(), []
    for what, path in (("label", case.label), ("prediction", case.prediction)):
        try:
            array, properties = reader.read_seg(str(path))
        # every reader has errors of its own
        except Exception as e:
            return f"{what} {_short(path)} cannot be read: {printable(f'{type(e).__name__}: {e}', LONGEST_ERROR)}"
        read.append((array[0], np.asarray(properties["spacing"], dtype=float)))
    (reference, spacing), (prediction, other_spacing) = read
    if reference.shape != prediction.shape or not np.allclose(spacing, other_spacing, rtol=_SAME_SPACING):
        sizes = (f"{array.shape} voxels of {tuple(map(float, mm.round(4)))} mm" for array, mm in read)
        return "the label has {}, the prediction {}".format(*sizes)
    counted = None if case.ignore is None else reference != case.ignore
    found = {}
    for key, tolerance, dice in case.classes:
        label_or_region = key_to_label_or_region(key)
        masks = [region_or_label_to_mask(array, label_or_region) for array in (reference, prediction)]
        if counted is not None:
            masks = [mask & counted for mask in masks]
        if not np.isclose(now := _dice(*masks), dice, rtol=0, atol=_SAME_DICE, equal_nan=True):
            return f"Dice of class {key} is {now:.4f} and summary.json says {dice:.4f}: a file was changed since"
        found[key] = measure(*masks, spacing, tolerance)
    return found


def _dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    total = np.count_nonzero(reference) + np.count_nonzero(prediction)
    return 2 * np.count_nonzero(reference & prediction) / total if total else np.nan


def _tables(runs: Iterable[Run], values: Mapping[tuple[str, int, str], Values]) -> dict[str, list[Run]]:
    """As `measure_runs` returns them."""
    tables = {}
    for run in runs:
        for fold, dice in run.folds.items():
            cases = [values[run.name, fold, case] for case in dice.index]
            of = {
                name: pd.DataFrame([[case[key][name] for key in dice] for case in cases], dice.index, dice.columns)
                for name in MEASURES
            }
            there = of[NSD.name].notna()
            signed = (of[PREDICTED_ML] - of[REFERENCE_ML]).where(there).round(DECIMALS)
            missed = ((of[PREDICTED_ML] == 0) ^ (of[REFERENCE_ML] == 0)).astype(float)
            extra = {VOLUME.name: signed.abs(), SIGNED: signed, MISSED: missed}
            for name, table in {NSD.name: of[NSD.name], HD95.name: of[HD95.name], **extra}.items():
                tables.setdefault(name, {}).setdefault(run.name, {})[fold] = table
    return {name: [replace(run, folds=folds.get(run.name, {})) for run in runs] for name, folds in tables.items()}


def _read_cache(path: Path) -> dict[str, _Kept]:
    """{} where there is none, or one that cannot be used: then all is measured again."""
    try:
        return validated(dict[str, _Kept], path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        logger.warning("%s cannot be used, and its cases are measured again (%s)", path, printable(e))
        return {}


def _known(case: _Case, kept: Mapping[str, _Kept], digest: str) -> Values | None:
    entry = kept.get(case.name)
    same = entry and entry["sha256"] == digest and entry["classes"].keys() == {key for key, *_ in case.classes}
    return entry["classes"] if same else None


def _write_cache(path: Path, kept: Mapping[str, _Kept]) -> None:
    try:
        write_text(path, json.dumps(kept, indent=1) + "\n")
    except UserError as e:
        logger.warning("the metrics are not kept for the next call: %s", e)
