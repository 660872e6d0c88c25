"""Few-shot folds: appended to nnU-Net's `splits_final.json`, drawn from the training cases of one of its folds."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import (
    SPLITS_FILE,
    Fold,
    Splits,
    Subset,
    digest_of,
    read_folds,
    read_splits,
    write_splits,
)
from nnunetv2_hiendmae.files import telling_disk_errors

LOCK = ".splits_final.lock"
LOCK_TIMEOUT_S = 60
# what nnUNetTrainer.do_split asks for
NNUNET_SEED, NNUNET_FOLDS = 12345, 5


@dataclass(frozen=True)
class DatasetSplits:
    """Splits of a dataset and where they are."""

    dataset: str
    folder: Path
    splits: Splits

    @property
    def file(self) -> Path:
        """nnU-Net's file."""
        return self.folder / SPLITS_FILE


def list_folds(dataset: str | int) -> DatasetSplits:
    """All folds as they are on disk; changes nothing.

    Raises:
        UserError: no such dataset, no splits yet, or a damaged file.
    """
    name, folder = _locate(dataset)
    splits = read_splits(folder)
    if not splits.folds:
        raise UserError(f"{folder} has no {SPLITS_FILE} yet; run: hiendmae splits -d {name} --shots 1")
    return DatasetSplits(name, folder, splits)


def append_folds(dataset: str | int, subsets: Sequence[Subset]) -> tuple[DatasetSplits, list[int]]:
    """Appends one fold for each subset that has none yet, and gives the numbers of all of them in order.

    Where there is no `splits_final.json` it is first made as nnU-Net would make it: a copy of the one in the raw
    dataset, else nnU-Net's own 5 folds. Folds that are there are never touched.

    Raises:
        UserError: an unknown fold, more shots than training cases, damaged files, or results that were trained
            under the number of a new fold before it had a meaning.
    """
    name, folder = _locate(dataset)
    with _locked(folder):
        splits = read_splits(folder)
        splits = splits if splits.folds else replace(splits, folds=_nnunet_folds(name))
        _check_against_raw(name, splits.folds)
        before, numbers = splits, []
        for subset in subsets:
            number = next((n for n, known in splits.appended.items() if known == subset), None)
            if number is None:
                number, splits = len(splits.folds), _with(splits, subset)
                if splits.lost.get(number) != digest_of(splits.folds[number]):
                    _refuse_results(name, number, f"would make them results of '{subset}'")
            numbers.append(number)
        if splits is not before:
            write_splits(folder, splits)
    return DatasetSplits(name, folder, splits), numbers


def remove_folds(dataset: str | int, numbers: Sequence[int]) -> DatasetSplits:
    """Removes appended folds from the end of the list.

    A fold in the middle stays, because those behind it would get other numbers, and nnU-Net knows folds by number.
    So does a fold with results, because they would lose their meaning.

    Raises:
        UserError: a fold that is not ours, not at the end, or has results.
    """
    name, folder = _locate(dataset)
    with _locked(folder):
        splits = read_splits(folder)
        gone = sorted(set(numbers))
        for number in gone:
            if number not in splits.appended:
                ours = ", ".join(map(str, splits.appended)) or "none"
                raise UserError(f"--remove {number}: not a fold that hiendmae splits appended (those are: {ours})")
        kept = len(splits.folds) - len(gone)
        if gone != list(range(kept, len(splits.folds))):
            raise UserError(
                f"--remove {' '.join(map(str, gone))}: only the last folds can go (the last one is "
                f"{len(splits.folds) - 1}), because those behind would get other numbers; remove these as well"
            )
        for number in gone:
            _refuse_results(name, number, f"would leave them without a meaning; they are '{splits.appended[number]}'")
        splits = Splits(splits.folds[:kept], {n: s for n, s in splits.appended.items() if n < kept})
        write_splits(folder, splits, shrinking=True)
    return DatasetSplits(name, folder, splits)


def draw(fold: Fold, subset: Subset) -> dict[str, list[str]]:
    """The new fold: the first cases of an order that depends on nothing but the case names, `of_fold` and `seed`.

    Hence what is drawn for less is part of what is drawn for more, whether by shots or by fraction.

    Raises:
        UserError: fewer training cases than shots, or a fold that trains on validation cases.
    """
    cases = sorted(set(fold["train"]))
    if both := sorted(set(cases) & set(fold["val"])):
        raise UserError(f"fold {subset.of_fold} trains on validation cases ({', '.join(both[:3])}); take another one")
    wanted = subset.num_cases(len(cases))
    if not cases or wanted > len(cases):
        raise UserError(
            f"fold {subset.of_fold} has {len(cases)} training cases, fewer than --shots {wanted}; ask for fewer"
        )
    order = np.random.default_rng([subset.seed, subset.of_fold]).permutation(len(cases))
    return {"train": sorted(cases[i] for i in order[:wanted]), "val": list(fold["val"])}


def _with(splits: Splits, subset: Subset) -> Splits:
    if subset.of_fold not in splits.original:
        there = ", ".join(map(str, splits.original))
        raise UserError(
            f"--of-fold {subset.of_fold} is not one of the original folds of {SPLITS_FILE}, needed: {there}"
        )
    new = draw(splits.folds[subset.of_fold], subset)
    appended = {**splits.appended, len(splits.folds): subset}
    return replace(splits, folds=[*splits.folds, new], appended=appended)


def _locate(dataset: str | int) -> tuple[str, Path]:
    name = dataset_name(dataset)
    return name, nnunet_folder("nnUNet_preprocessed") / name


def _nnunet_folds(name: str) -> list[Fold]:
    raw = read_folds(nnunet_folder("nnUNet_raw") / name / SPLITS_FILE)
    if raw:
        return raw
    cases = _cases(name)
    if len(cases) < NNUNET_FOLDS:
        raise UserError(
            f"{name} has {len(cases)} training cases, nnU-Net's own split needs {NNUNET_FOLDS}; "
            f"write {nnunet_folder('nnUNet_raw') / name / SPLITS_FILE} yourself"
        )
    folds = generate_crossval_split(cases, seed=NNUNET_SEED, n_splits=NNUNET_FOLDS)
    # numpy's strings become plain ones
    return json.loads(json.dumps(folds))


def _cases(name: str) -> list[str]:
    """Sorted training cases; the raw dataset and all preprocessed folders must agree, for nnU-Net splits the latter."""
    lists = {}
    raw = nnunet_folder("nnUNet_raw") / name
    if (raw / "dataset.json").is_file():
        lists[raw] = _raw_cases(raw)
    # each of nnU-Net's storage formats has one such file for every case
    for file in sorted((nnunet_folder("nnUNet_preprocessed") / name).glob("*/*.pkl")):
        lists.setdefault(file.parent, []).append(file.stem)
    if not lists:
        raise UserError(f"{name} has neither raw nor preprocessed cases; run: hiendmae doctor")
    (first, cases), *others = lists.items()
    for folder, other in others:
        if set(other) != set(cases):
            raise UserError(
                f"{folder} holds {len(other)} cases, {first} {len(cases)}, different first at "
                f"{min(set(other) ^ set(cases))}; preprocess again, so that the folds are those of all cases"
            )
    return cases


def _raw_cases(raw: Path) -> list[str]:
    path = raw / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "dataset" in content:
            return sorted(content["dataset"])
        images = get_identifiers_from_splitted_dataset_folder(str(raw / "imagesTr"), content["file_ending"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"cannot list the cases of {raw} ({type(e).__name__}: {e}); mend imagesTr or {path}") from e
    return sorted(str(case) for case in images)


def _check_against_raw(name: str, folds: Sequence[Fold]) -> None:
    """nnU-Net refuses to plan unless the raw dataset's splits are the first ones of the preprocessed dataset's."""
    path = nnunet_folder("nnUNet_raw") / name / SPLITS_FILE
    raw = read_folds(path)
    if [digest_of(fold) for fold in raw] != [digest_of(fold) for fold in folds[: len(raw)]]:
        raise UserError(
            f"{path} and {nnunet_folder('nnUNet_preprocessed') / name / SPLITS_FILE} contradict each other, and "
            "nnU-Net will refuse to plan; remove the one you do not want"
        )


def _refuse_results(name: str, number: int, reason: str) -> None:
    results = nnunet_folder("nnUNet_results") / name
    if found := sorted(results.glob(f"*/fold_{number}")):
        more = f" and {len(found) - 1} more" if found[1:] else ""
        raise UserError(
            f"there are results of fold {number} in {found[0]}{more}, and this {reason}; "
            "remove or move them, then run the command again"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with telling_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=LOCK_TIMEOUT_S)
        try:
            lock.acquire()
        except Timeout as e:
            raise UserError(f"another process is changing {folder / SPLITS_FILE}; wait for it to end") from e
    try:
        yield
    finally:
        lock.release()
