"""Few-shot folds: appended to nnU-Net's `splits_final.json`, and a record beside it of what they mean."""

import hashlib
import json
import logging
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.evaluation.draws import SHOTS, Fold, Subset, draw
from nnunetv2_hiendmae.evaluation.patients import PATIENTS_FILE, Patients, notes_on_patients, read_patients
from nnunetv2_hiendmae.files import locked, telling_damage, write_text
from nnunetv2_hiendmae.schemas import NNUNET_FOLDS, SPLITS_FILE, Folds, read_as, read_dataset_json, read_json

RECORD_FILE = "splits_hiendmae.json"
NNUNET_SEED = 12345  # what nnUNetTrainer.do_split asks for

logger = logging.getLogger(__name__)


class _Record(TypedDict):
    appended: dict[int, Subset]
    sha256: dict[int, str]


@dataclass(frozen=True)
class Splits:
    """Folds of a dataset: `splits_final.json` and our record.

    Args:
        folder: where both are, `$nnUNet_preprocessed/<dataset>`.
        folds: as in the file, in its order; empty when there is none.
        appended: number of a fold that `hiendmae splits` appended -> its meaning.
        lost: number -> digest of folds that the record knows and the file lacks (nnU-Net made it anew, for instance).
    """

    folder: Path
    folds: Sequence[Fold] = ()
    appended: Mapping[int, Subset] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """nnU-Net's file."""
        return self.folder / SPLITS_FILE

    @property
    def original(self) -> list[int]:
        """Numbers of the folds that are not ours."""
        return [i for i in range(len(self.folds)) if i not in self.appended]

    @property
    def cases(self) -> set[str]:
        """All that are in a fold."""
        return {case for fold in self.folds for part in ("train", "val") for case in fold[part]}

    def draw_of(self, fold: int) -> tuple[int, int]:
        """The fold whose cases it validates on, itself unless it was drawn from another, and number of the repeat."""
        subset = self.appended.get(fold)
        return (subset.of_fold, subset.repeat) if subset else (fold, 0)

    def setting(self, fold: int) -> tuple[tuple[float, ...], str]:
        """Place in the order of settings, and name, of the folds that may be averaged: they validate on one split."""
        if subset := self.appended.get(fold):
            place = (1.0 if subset.kind == SHOTS else 2.0, float(subset.value), float(subset.seed))
            return place, f"{subset.amount} (seed {subset.seed})"
        if fold < len(self.folds):
            return (0.0,), self._original_name()
        if not self.folds and fold < NNUNET_FOLDS:
            return (0.0,), f"folds 0 to 4, no {SPLITS_FILE}"
        return (3.0, float(fold)), f"fold {fold}, not in {SPLITS_FILE}"

    def meaning(self, fold: int) -> str:
        """One fold in words."""
        return str(self.appended.get(fold) or self.setting(fold)[1])

    def _original_name(self) -> str:
        validation = [set(self.folds[i]["val"]) for i in self.original]
        if len(validation) == 1:
            return "single split"
        if not any(a & b for a, b in combinations(validation, 2)):
            return f"{len(validation)}-fold cross-validation"
        # a copy of the file without our record may hold few-shot folds: the sizes show it
        sizes = [len(self.folds[i]["train"]) for i in self.original]
        span = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        return f"{len(validation)} overlapping splits, {span} training cases"


def list_folds(dataset: str | int) -> Splits:
    """All folds as they are on disk; changes nothing.

    Raises:
        UserError: no such dataset, no splits yet, or a damaged file.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name(dataset)
    splits = read_splits(folder)
    if not splits.folds:
        name = shlex.quote(folder.name)
        raise UserError(f"{folder} has no {SPLITS_FILE} yet; run: hiendmae splits -d {name} --shots 1")
    patients = read_patients(folder.name, splits.cases)
    for note in notes_on_patients(patients, dict(enumerate(splits.folds)), splits.cases):
        logger.warning(note)
    return splits


def append_folds(dataset: str | int, subsets: Sequence[Subset]) -> tuple[Splits, list[int]]:
    """Appends one fold for each subset that has none yet, and gives the numbers of all of them in order.

    Where there is no `splits_final.json` it is first made as nnU-Net would make it: a copy of the one in the raw
    dataset, else nnU-Net's own 5 folds. Folds that are there are never touched.

    Raises:
        UserError: an unknown fold, more shots than training cases, a repeat of the same cases, damaged files, or
            results that were trained under the number of a new fold before it had a meaning.
    """
    with _changing(dataset) as splits:
        before = splits = _with_nnunet_folds(splits)
        patients = read_patients(splits.folder.name, splits.cases)
        for subset in subsets:
            if subset not in splits.appended.values():
                splits = _with(splits, subset, patients)
        if splits is not before:
            _write(splits)
            _tell(splits, subsets, patients)
    numbers = {subset: number for number, subset in splits.appended.items()}
    return splits, [numbers[subset] for subset in subsets]


def remove_folds(dataset: str | int, numbers: Sequence[int]) -> Splits:
    """Removes appended folds from the end of the list.

    A fold in the middle stays, because those behind it would get other numbers, and nnU-Net knows folds by number.
    So does a fold with results, because they would lose their meaning.

    Raises:
        UserError: a fold that is not ours, not at the end, or has results.
    """
    gone = sorted(set(numbers))
    with _changing(dataset) as splits:
        if foreign := [number for number in gone if number not in splits.appended]:
            ours = listed(splits.appended) or "none"
            raise UserError(f"--remove {foreign[0]}: not a fold that hiendmae splits appended (those are: {ours})")
        kept = len(splits.folds) - len(gone)
        if gone != list(range(kept, len(splits.folds))):
            raise UserError(
                f"--remove {' '.join(map(str, gone))}: only the last folds can go (the last one is "
                f"{len(splits.folds) - 1}), because those behind would get other numbers; remove these as well"
            )
        for number in gone:
            _refuse_results(splits, number, f"would leave them without a meaning; they are '{splits.appended[number]}'")
        splits = Splits(splits.folder, splits.folds[:kept], {n: s for n, s in splits.appended.items() if n < kept})
        _write(splits, shrinking=True)
    return splits


def read_splits(folder: Path) -> Splits:
    """Splits of a preprocessed dataset, `$nnUNet_preprocessed/<dataset>`.

    Raises:
        UserError: a file is damaged, or a fold is no longer what the record describes.
    """
    folds, path = _read_folds(folder / SPLITS_FILE), folder / RECORD_FILE
    if not path.exists():
        return Splits(folder, folds)
    mend = f"put it back, or remove it together with the folds that were appended to {SPLITS_FILE}"
    record = read_as(path, _Record, mend)
    digests, appended = record["sha256"], record["appended"]
    if strange := appended.keys() - digests.keys():
        raise UserError(f"{path} is damaged: fold {min(strange)} without its sha256; {mend}")
    lost = {number: digest for number, digest in digests.items() if number >= len(folds)}
    if changed := [n for n, digest in digests.items() if n not in lost and digest != digest_of(folds[n])]:
        raise UserError(
            f"{folder / SPLITS_FILE} was changed by something else: fold {listed(changed)} is not what {RECORD_FILE} "
            f"describes; put the file back, or remove {path} if the meaning of appended folds is no longer needed"
        )
    for number in sorted(lost.keys() & appended.keys()):
        logger.warning("%s lacks fold %d, which was %s", folder / SPLITS_FILE, number, appended[number])
    return Splits(folder, folds, {n: subset for n, subset in sorted(appended.items()) if n not in lost}, lost)


def digest_of(fold: Fold) -> str:
    """Of a fold's cases, in whatever order they are listed."""
    cases = json.dumps([sorted(fold["train"]), sorted(fold["val"])])
    return hashlib.sha256(cases.encode()).hexdigest()


def _with(splits: Splits, subset: Subset, patients: Patients) -> Splits:
    if subset.of_fold not in splits.original:
        there = f"the original folds of {SPLITS_FILE}, needed: {listed(splits.original)}"
        raise UserError(f"--of-fold {subset.of_fold} is not one of {there}")
    number, fold = len(splits.folds), draw(splits.folds[subset.of_fold], subset, patients)
    _check_relatives(splits, subset, set(fold["train"]))
    if splits.lost.get(number) != digest_of(fold):
        _refuse_results(splits, number, f"would make them results of '{subset}'")
    return replace(splits, folds=[*splits.folds, fold], appended={**splits.appended, number: subset})


def _check_relatives(splits: Splits, subset: Subset, drawn: set[str]) -> None:
    """Refuses a repeat that is no other, and a draw that is not nested with the same draw of another size."""
    for number, other in splits.appended.items():
        there = set(splits.folds[number]["train"])
        if drawn == there and replace(other, repeat=subset.repeat) == subset:
            raise UserError(
                f"'{subset}' would train on the same cases as fold {number}; ask for --repeats {subset.repeat} at most"
            )
        if not (drawn <= there or there <= drawn) and replace(other, kind=subset.kind, value=subset.value) == subset:
            raise UserError(
                f"'{subset}' would not be nested with fold {number}, drawn with another {PATIENTS_FILE}; take another "
                "--seed, or remove that fold"
            )


def _tell(splits: Splits, subsets: Sequence[Subset], patients: Patients) -> None:
    """Warns of what new folds could not be, or what was taken for granted."""
    for note in notes_on_patients(patients, {}, splits.cases):
        logger.warning(note)
    for single in dict.fromkeys(replace(subset, repeat=0) for subset in subsets):
        repeats = [number for number, subset in splits.appended.items() if replace(subset, repeat=0) == single]
        trained = [{patients.get(case, case) for case in splits.folds[number]["train"]} for number in repeats]
        if shared := sorted(unit for unit, count in Counter(chain.from_iterable(trained)).items() if count > 1):
            units = "the patients of" if patients else "the cases"
            told = "%s: %s %s train in more than one of %d repeats, there are too few to keep them apart"
            logger.warning(told, single, units, some(shared), len(repeats))


def _with_nnunet_folds(splits: Splits) -> Splits:
    """Where there are no folds, those that nnU-Net would make; else the first must be those of the raw dataset."""
    raw = nnunet_folder("nnUNet_raw") / splits.folder.name
    first = _read_folds(raw / SPLITS_FILE)
    if not splits.folds:
        return replace(splits, folds=first or _nnunet_folds(raw, splits.folder))
    if [*map(digest_of, first)] != [*map(digest_of, splits.folds[: len(first)])]:
        raise UserError(
            f"{raw / SPLITS_FILE} and {splits.file} contradict each other, and nnU-Net will refuse to plan; remove the "
            "one you do not want"
        )
    return splits


def _nnunet_folds(raw: Path, preprocessed: Path) -> list[Fold]:
    """The 5 of nnU-Net; both folders must hold the same cases, for nnU-Net splits those that are preprocessed."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder as cases_in

    lists = {}
    if (file := raw / "dataset.json").is_file():
        about = read_dataset_json(raw, for_images=False)
        if not (raw / "labelsTr").is_dir() and about.get("labels", {}).keys() == {"background"}:
            told = f"{raw.name} has no labels ({raw / 'labelsTr'} is missing), folds are of labelled cases"
            raise UserError(f"{told}; choose another -d")
        with telling_damage(raw, f"imagesTr, and its file_ending or the cases in {file.name}; mend one of them"):
            lists[raw] = sorted(map(str, about.get("dataset") or cases_in(str(raw / "imagesTr"), about["file_ending"])))
    # each of nnU-Net's storage formats has one such file for every case
    for path in sorted(preprocessed.glob("*/*.pkl")):
        lists.setdefault(path.parent, []).append(path.stem)
    if not lists:
        raise UserError(f"{raw.name} has neither raw nor preprocessed cases; run: hiendmae doctor")
    first, cases = next(iter(lists.items()))
    for folder, found in lists.items():
        if different := set(found) ^ set(cases):
            raise UserError(
                f"{folder} holds {len(found)} cases, {first} {len(cases)}, different first at {min(different)}; "
                "preprocess again, so that the folds are those of all cases"
            )
    patients, groups = read_patients(raw.name, cases), defaultdict(list)
    for case in cases:
        groups[patients.get(case, case)].append(case)
    if len(groups) < NNUNET_FOLDS:
        units = "patients" if patients else "training cases"
        raise UserError(
            f"{raw.name} has {len(groups)} {units}, nnU-Net's own split needs {NNUNET_FOLDS}; "
            f"write {raw / SPLITS_FILE} yourself"
        )
    folds = generate_crossval_split(sorted(groups), seed=NNUNET_SEED, n_splits=NNUNET_FOLDS)
    return [{part: sorted(chain.from_iterable(groups[u] for u in units)) for part, units in f.items()} for f in folds]


def _refuse_results(splits: Splits, number: int, reason: str) -> None:
    if found := sorted((nnunet_folder("nnUNet_results") / splits.folder.name).glob(f"*/fold_{number}")):
        raise UserError(
            f"there are results of fold {number} in {some(found, 1)}, and this {reason}; "
            "remove or move them, then run the command again"
        )


@contextmanager
def _changing(dataset: str | int) -> Iterator[Splits]:
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name(dataset)
    busy = f"another process is changing {folder / SPLITS_FILE}; wait for it to end"
    with locked(folder / ".splits_final.lock", busy, timeout_s=60):
        yield read_splits(folder)


def _read_folds(path: Path) -> list[dict[str, Any]]:
    """[] when there is no file."""
    mend = (
        'needed a list of folds with "train" and "val"; put it back, or remove it: nnU-Net makes its own 5 folds anew'
    )
    return read_json(path, Folds, mend) if path.exists() else []


def _write(splits: Splits, *, shrinking: bool = False) -> None:
    """Both files, in the order in which a fold of ours is never without its record."""
    record = {
        "about": f"Folds that `hiendmae splits` appended to {SPLITS_FILE}: do not edit either file by hand.",
        "appended": {
            number: {**subset.facts(), "meaning": str(subset), "train_cases": len(splits.folds[number]["train"])}
            for number, subset in splits.appended.items()
        },
        # of every fold, so that a change by another hand is noticed
        "sha256": dict(sorted({**splits.lost, **dict(enumerate(map(digest_of, splits.folds)))}.items())),
    }
    # the second as nnU-Net writes it
    texts = {RECORD_FILE: json.dumps(record, indent=4) + "\n", SPLITS_FILE: json.dumps([*splits.folds], indent=4)}
    for name in reversed(texts) if shrinking else texts:
        write_text(splits.folder / name, texts[name])


def listed(items: Iterable[object]) -> str:
    """'a, b, c'."""
    return ", ".join(map(str, items))
