"""The user's CSV of case labels, checked before anything is written, and which of its cases train, validate and
test: seeded stratified folds, label fractions, or the user's column."""

import csv
import hashlib
import json
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold

from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.options import share_of
from nnunetv2_hiendmae.schemas import CLOSED, read_as

logger = logging.getLogger(__name__)

CASE, LABEL, FOLD, SPLIT = "case", "label", "fold", "split"
PLACES = TRAIN, VALIDATION, TEST = "train", "val", "test"
FOLDS, ALL = 5, "all"
# what tables hold where there is no value
NO_LABEL = ("nan", "n/a", "#n/a", "<na>", "null")
SPLITS = "splits.json"
# names that a message lists before it only counts
LISTED = 5


class _Row(NamedTuple):
    """One line of the file: `place` is the value of its fold or split column, None without one."""

    line: int
    case: str
    label: str
    place: str | None


@dataclass(frozen=True)
class Labels:
    """Labels of preprocessed cases.

    Args:
        classes: names in the order of the outputs: integers by value, anything else by spelling. Of two classes the
            second is the positive one.
        targets: index of the class per case ('Dataset/case'), sorted by case.
        places: value of the file's fold or split column per case; None without such a column.
        column: "fold", "split" or None.
    """

    classes: tuple[str, ...]
    targets: dict[str, int]
    places: dict[str, str] | None = None
    column: str | None = None

    def of_class(self, index: int) -> list[str]:
        """Cases of a class, sorted."""
        return [case for case, target in self.targets.items() if target == index]

    def digest(self) -> str:
        """SHA-256 over cases, labels and places; training depends on all of it."""
        described = [self.classes, self.targets, self.places, self.column]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def read_labels(path: Path, cases: Sequence[str], classes: Sequence[str] | None = None) -> Labels:
    """Labels of the preprocessed cases ('Dataset/case') from a CSV with the columns case, label and, if there, fold or
    split; other columns are ignored, and the file may leave the dataset out. Cases without a label are left out.

    Args:
        classes: of a trained model; None: for training, those of the file, at least two, and a warning of the cases
            that are left out.

    Raises:
        UserError: no such file, not comma-separated UTF-8 text, a column is missing, a value is empty, holds
            invisible characters or is spelt in two ways, a case is there twice, not preprocessed or in several
            datasets, no row, only one class, or a label that is not among `classes`.
    """
    path = Path(path)
    column, listed = _read_rows(path)
    rows = _resolve(path, listed, cases)
    found = {row.label for row in rows.values()}
    for name, values in ((LABEL, found), (column, {row.place for row in rows.values()} if column else ())):
        if alike := _look_alike(values):
            told = f"{path} has {name}s that look like one: {' and '.join(map(repr, alike))}"
            raise UserError(f"{told}; needed one spelling of each, write them alike")
    if classes is None and len(found) < 2:
        raise UserError(f"all cases in {path} have the label '{found.pop()}', needed at least two classes")
    if strange := sorted(found - set(classes or found)):
        raise UserError(
            f"{path} has labels that the model does not know: {some(strange, LISTED)}; needed {', '.join(classes)}"
        )
    without = [case for case in cases if case not in rows]
    if without and classes is None:
        told = f"{len(without)} of {len(cases)} preprocessed cases have no label in {path} and are ignored"
        logger.warning(f"{told}: {some(without, LISTED)}")
    whole = all(re.fullmatch(r"-?\d+", label) for label in found)
    names = tuple(classes or sorted(found, key=(lambda label: (int(label), label)) if whole else None))
    targets = {case: names.index(row.label) for case, row in sorted(rows.items())}
    return Labels(names, targets, {case: rows[case].place for case in targets} if column else None, column)


def _look_alike(values: Collection[str]) -> list[str]:
    """Different texts for one value, as tables have them that were put together of several: 1 and 1.0, yes and Yes; []
    where there are none."""
    spelt: dict[str | float, list[str]] = {}
    for value in sorted(values):
        key: str | float = " ".join(value.casefold().split())
        with suppress(ValueError):
            key = float(value)
        spelt.setdefault(key, []).append(value)
    return next((texts for texts in spelt.values() if len(texts) > 1), [])


def _read_rows(path: Path) -> tuple[str | None, list[_Row]]:
    """The column of folds or splits, and the lines."""
    if not path.is_file():
        raise UserError(f"no label file at {path}, needed a CSV with the columns {CASE},{LABEL}; check --labels")
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as f:
            lines = csv.reader(f, strict=True)
            header = [name.strip() for name in next(lines, [])]
            _check_header(path, header)
            column = next((name for name in (FOLD, SPLIT) if name in header), None)
            rows = [_row(path, header, column, lines.line_num, fields) for fields in lines if any(fields)]
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({e}); save it as comma-separated UTF-8 text") from e
    if not rows:
        raise UserError(f"{path} is empty below its header, needed one row per case; check --labels")
    return column, rows


def _check_header(path: Path, header: list[str]) -> None:
    needed = f"needed a header with the columns {CASE},{LABEL}"
    if not header:
        raise UserError(f"{path} is empty, {needed}; check --labels")
    other = next((mark for mark in (";", "\t", "|") if mark in header[0]), None)
    if len(header) == 1 and other:
        raise UserError(f"{path} is separated by {other!r}, needed commas; save it as comma-separated CSV")
    if missing := [name for name in (CASE, LABEL) if name not in header]:
        raise UserError(f"{path} has no column '{missing[0]}' (its first line: {', '.join(header)}), {needed}")
    if twice := [name for name in (CASE, LABEL, FOLD, SPLIT) if header.count(name) > 1]:
        raise UserError(f"{path} has the column '{twice[0]}' twice, needed it once; rename the other")
    if FOLD in header and SPLIT in header:
        raise UserError(f"{path} has the columns '{FOLD}' and '{SPLIT}', needed one of them at most; remove the other")


def _row(path: Path, header: list[str], column: str | None, line: int, fields: list[str]) -> _Row:
    if len(fields) != len(header):
        raise UserError(f"line {line} of {path} has {len(fields)} values, needed {len(header)} as in the header")
    values = {name: value.strip() for name, value in zip(header, fields, strict=True)}
    for name in filter(None, (CASE, LABEL, column)):
        if not values[name]:
            raise UserError(f"line {line} of {path} has no {name}; fill it in, or leave the row out")
        if name == LABEL and values[name].casefold() in NO_LABEL:
            raise UserError(
                f"line {line} of {path} has the label '{values[name]}', which is no class; leave the row out"
            )
        if not values[name].isprintable():
            # two classes that look alike, for instance
            raise UserError(f"line {line} of {path} has an invisible character in {name} {values[name]!a}; remove it")
    return _Row(line, values[CASE], values[LABEL], values[column] if column else None)


def _resolve(path: Path, listed: Sequence[_Row], cases: Sequence[str]) -> dict[str, _Row]:
    """Rows by full case name."""
    known = {case: [case] for case in cases}
    for case in cases:
        known.setdefault(case.partition("/")[2], []).append(case)
    if unknown := [row.case for row in listed if row.case not in known]:
        raise UserError(
            f"{len(unknown)} cases of {path} are not preprocessed: {some(unknown, LISTED)} (there are {len(cases)}: "
            f"{some(cases, LISTED)}); take them out, or run: hiendmae preprocess"
        )
    rows: dict[str, _Row] = {}
    for row in listed:
        case, *others = known[row.case]
        if others:
            among = ", ".join([case, *others])
            raise UserError(f"line {row.line} of {path}: '{row.case}' is in several datasets, needed one of {among}")
        if case in rows:
            raise UserError(f"{path} names {case} twice (lines {rows[case].line} and {row.line}); keep one row")
        rows[case] = row
    return rows


@dataclass(frozen=True)
class Split:
    """Case names. `val` is empty where all cases train; `test` cases neither train nor choose the model."""

    __pydantic_config__: ClassVar = CLOSED
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def write(self, run_dir: Path) -> None:
        """Writes splits.json of a run: the case names under "train", "val" and "test"."""
        write_text(run_dir / SPLITS, json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, run_dir: Path) -> "Split":
        """Inverse of `write`.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_as(run_dir / SPLITS, cls, "start anew under another --name")


def choose_split(labels: Labels, fold: str | None, fraction: float, split_seed: int) -> Split:
    """The split of a run.

    The file's fold or split column decides where there is one. Without it, the cases (sorted by name) are dealt into
    five folds by scikit-learn's StratifiedKFold with `split_seed`, so that the order of the file does not matter.

    Args:
        fold: number of the validation fold, or "all": every case trains, none validates; None: 0, or the split
            column.
        fraction: of the training cases of every class, halves up, at least one. Cases are ranked once per class by
            `split_seed`, so smaller fractions are subsets of larger ones.

    Raises:
        UserError: no such fold or value, too few cases of a class, or a class missing in training or validation.
    """
    if labels.column == SPLIT:
        places = _split_places(labels, fold)
    elif fold == ALL:
        places = dict.fromkeys(labels.targets, TRAIN)
    else:
        places = _fold_places(labels, fold or "0", split_seed)
    split = Split(*(tuple(case for case, place in places.items() if place == name) for name in PLACES))
    for name, cases in ((TRAIN, split.train), (VALIDATION, split.val)):
        missing = set(range(len(labels.classes))) - {labels.targets[case] for case in cases}
        if missing and (name == TRAIN or fold != ALL):
            raise UserError(
                f"no case of class {', '.join(labels.classes[i] for i in sorted(missing))} among the {len(cases)} "
                f"{name} cases, needed one of every class; choose another -f, or change the column '{labels.column}' "
                "of the labels"
            )
    return replace(split, train=_fraction(labels, split.train, fraction, split_seed))


def _split_places(labels: Labels, fold: str | None) -> dict[str, str]:
    if fold is not None:
        raise UserError(f"-f {fold} with a column '{SPLIT}' in the labels, needed one of the two; leave -f out")
    if strange := sorted(set(labels.places.values()) - set(PLACES)):
        raise UserError(f"the column '{SPLIT}' of the labels holds '{strange[0]}', needed one of {', '.join(PLACES)}")
    return labels.places


def _fold_places(labels: Labels, fold: str, split_seed: int) -> dict[str, str]:
    folds = labels.places if labels.column == FOLD else _seeded_folds(labels, split_seed)
    there = sorted(set(folds.values()), key=lambda place: (len(place), place))
    if fold not in there:
        raise UserError(f"no fold '{fold}', needed one of {', '.join(there)} or {ALL}; choose with -f")
    return {case: VALIDATION if folds[case] == fold else TRAIN for case in labels.targets}


def _seeded_folds(labels: Labels, split_seed: int) -> dict[str, str]:
    for index, name in enumerate(labels.classes):
        count = len(labels.of_class(index))
        if count < FOLDS:
            raise UserError(
                f"class '{name}' has {count} cases, needed {FOLDS}, one per fold; add a column '{FOLD}' or '{SPLIT}' "
                f"to the labels, or train on all with -f {ALL}"
            )
    cases, targets = list(labels.targets), list(labels.targets.values())
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=split_seed).split(cases, targets)
    return {cases[i]: str(fold) for fold, (_, validation) in enumerate(folds) for i in validation}


def _fraction(labels: Labels, train: tuple[str, ...], fraction: float, split_seed: int) -> tuple[str, ...]:
    there, kept = set(train), set()
    for index in range(len(labels.classes)):
        cases = labels.of_class(index)
        # all cases of the class are ranked, not those of the fold: ranks do not depend on the fold
        order = np.random.default_rng([split_seed, index]).permutation(len(cases))
        ranked = [cases[i] for i in order if cases[i] in there]
        kept |= set(ranked[: share_of(len(ranked), fraction)])
    return tuple(case for case in train if case in kept)
