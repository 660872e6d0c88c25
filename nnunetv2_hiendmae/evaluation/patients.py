"""Which cases are of one patient: the user's `patients.json`."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.schemas import Groups, read_as

PATIENTS_FILE = "patients.json"
MEND = 'needed {"patient": ["case", "another case"], …}; mend it, or remove it where every case is another patient'

# case -> the first case of its patient; a case that is not there is its own patient's only one
Patients = Mapping[str, str]


def read_patients(dataset: str, known: Collection[str]) -> Patients:
    """Patients of a dataset: from `patients.json` in its raw folder, beside dataset.json, or in its preprocessed one,
    beside the folds; empty where neither has one.

    Args:
        dataset: full name.
        known: all cases; empty: not known.

    Raises:
        UserError: a damaged file, a case of two patients, two files that differ, or cases that nobody knows while known
            ones are missing, as misspelt names are.
    """
    # raw data need not be on the machine that compares
    roots = filter(None, map(os.environ.get, ("nnUNet_raw", "nnUNet_preprocessed")))
    paths = [Path(root) / dataset / PATIENTS_FILE for root in roots]
    found = {path: _read(path) for path in paths if path.exists()}
    if not found:
        return {}
    (path, patients), *others = found.items()
    for other, differing in others:
        if differing != patients:
            raise UserError(f"{path} and {other} contradict each other; remove the one that is wrong")
    strange, missing = patients.keys() - set(known or patients), set(known) - patients.keys()
    if strange and missing:
        unknown = some(map(printable, sorted(strange)))
        raise UserError(
            f"{path} names {unknown}, no case of the folds, and lacks {some(sorted(missing))}; correct the names, or "
            "add what is missing"
        )
    return patients


def notes_on_patients(
    patients: Patients, folds: Mapping[int, Mapping[str, Any]], cases: Collection[str]
) -> Iterator[str]:
    """What a reader must know: which of `cases` the file leaves out, and which of `folds` (by number) leak, be there a
    file or not."""
    if missing := sorted(set(cases) - patients.keys()) if patients else ():
        yield f"{len(missing)} cases are not in {PATIENTS_FILE} and count as patients of their own: {some(missing)}"
    for number, fold in folds.items():
        if both := sorted(set(fold["train"]) & set(fold["val"])):
            yield f"fold {number} trains on its validation cases ({some(both)}), its Dice are too high"
        if torn := torn_patients(fold, patients):
            yield f"fold {number} trains and validates on the same patients ({some(torn)}), its Dice are too high"


def torn_patients(fold: Mapping[str, Any], patients: Patients) -> list[str]:
    """Patients of a fold that are in training and in validation: one case of each side, 'a and b'."""
    if not patients:
        return []
    validated = {patients.get(case, case): case for case in sorted(fold["val"], reverse=True)}
    both = {patients.get(case, case): case for case in sorted(fold["train"], reverse=True)}
    return [f"{both[patient]} and {validated[patient]}" for patient in sorted(both.keys() & validated.keys())]


def _read(path: Path) -> dict[str, str]:
    groups: Mapping[str, Sequence[str]] = read_as(path, Groups, MEND)
    return {case: min(cases) for cases in groups.values() for case in cases}
