"""The user's CSV of case labels, checked before anything else happens."""

import csv
import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_hiendmae.errors import UserError

logger = logging.getLogger(__name__)

CASE, LABEL = "case", "label"
FOLD, SPLIT = "fold", "split"
# names that a message lists before it only counts
LISTED = 5


@dataclass(frozen=True)
class LabelRow:
    """One line of the file: `place` is the value of its fold or split column, None without one."""

    line: int
    case: str
    label: str
    place: str | None = None


@dataclass(frozen=True)
class LabelFile:
    """The file as it stands; `column` is "fold", "split" or None."""

    path: Path
    rows: tuple[LabelRow, ...]
    column: str | None = None


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
        """Its cases, sorted."""
        return [case for case, target in self.targets.items() if target == index]

    def digest(self) -> str:
        """SHA-256 over cases, labels and places; training depends on all of it."""
        described = [self.classes, self.targets, self.places, self.column]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def read_labels(path: Path) -> LabelFile:
    """Reads a CSV with the columns case, label and, if there, fold or split; other columns are ignored.

    Raises:
        UserError: no such file, not comma-separated UTF-8 text, a column is missing, a value is empty or holds
            invisible characters, a case is there twice, or no row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no label file at {path}, needed a CSV with the columns {CASE},{LABEL}; check --labels")
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as f:
            lines = csv.reader(f, strict=True)
            header = [name.strip() for name in next(lines, [])]
            _check_header(path, header)
            column = next((name for name in (FOLD, SPLIT) if name in header), None)
            rows = tuple(_row(path, header, column, lines.line_num, fields) for fields in lines if any(fields))
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({e}); save it as comma-separated UTF-8 text") from e
    if not rows:
        raise UserError(f"{path} is empty below its header, needed one row per case; check --labels")
    twice = [case for case, count in Counter(row.case for row in rows).items() if count > 1]
    if twice:
        raise UserError(f"{path} names cases twice: {listed(twice)}; keep one row per case")
    return LabelFile(path, rows, column)


def match_labels(file: LabelFile, cases: Sequence[str], classes: Sequence[str] | None = None) -> Labels:
    """Labels of the preprocessed cases ('Dataset/case'); the file may leave the dataset out.

    Cases without a label are left out.

    Args:
        classes: of a trained model; None: for training, those of the file, at least two, and a warning of the cases
            that are left out.

    Raises:
        UserError: the file names cases that are not there or are in several datasets, or the same one twice; only
            one class; a label that is not among `classes`.
    """
    rows = _resolve(file, cases)
    found = {row.label for row in rows.values()}
    if classes is None and len(found) < 2:
        raise UserError(f"all cases in {file.path} have the label '{found.pop()}', needed at least two classes")
    strange = sorted(found - set(classes or found))
    if strange:
        raise UserError(
            f"{file.path} has labels that the model does not know: {listed(strange)}; needed {', '.join(classes)}"
        )
    without = [case for case in cases if case not in rows]
    if without and classes is None:
        logger.warning(
            f"{len(without)} of {len(cases)} preprocessed cases have no label in {file.path} and are ignored: "
            f"{listed(without)}"
        )
    names = tuple(classes or _ordered(found))
    targets = {case: names.index(row.label) for case, row in sorted(rows.items())}
    places = {case: rows[case].place for case in targets} if file.column else None
    return Labels(names, targets, places, file.column)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _check_header(path: Path, header: list[str]) -> None:
    needed = f"needed a header with the columns {CASE},{LABEL}"
    if not header:
        raise UserError(f"{path} is empty, {needed}; check --labels")
    other = next((mark for mark in (";", "\t", "|") if mark in header[0]), None)
    if len(header) == 1 and other:
        raise UserError(f"{path} is separated by {other!r}, needed commas; save it as comma-separated CSV")
    missing = [name for name in (CASE, LABEL) if name not in header]
    if missing:
        raise UserError(f"{path} has no column '{missing[0]}' (its first line: {', '.join(header)}), {needed}")
    twice = [name for name in (CASE, LABEL, FOLD, SPLIT) if header.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the column '{twice[0]}' twice, needed it once; rename the other")
    if FOLD in header and SPLIT in header:
        raise UserError(f"{path} has the columns '{FOLD}' and '{SPLIT}', needed one of them at most; remove the other")


def _row(path: Path, header: list[str], column: str | None, line: int, fields: list[str]) -> LabelRow:
    if len(fields) != len(header):
        raise UserError(f"line {line} of {path} has {len(fields)} values, needed {len(header)} as in the header")
    values = {name: value.strip() for name, value in zip(header, fields, strict=True)}
    for name in filter(None, (CASE, LABEL, column)):
        if not values[name]:
            raise UserError(f"line {line} of {path} has no {name}; fill it in, or leave the row out")
        if not values[name].isprintable():
            # two classes that look alike, for instance
            raise UserError(f"line {line} of {path} has an invisible character in {name} {values[name]!a}; remove it")
    return LabelRow(line, values[CASE], values[LABEL], values[column] if column else None)


def _resolve(file: LabelFile, cases: Sequence[str]) -> dict[str, LabelRow]:
    """Rows by full case name."""
    by_short = defaultdict(list)
    for case in cases:
        by_short[case.partition("/")[2]].append(case)
    known = {case: [case] for case in cases} | by_short
    unknown = [row.case for row in file.rows if row.case not in known]
    if unknown:
        raise UserError(
            f"{len(unknown)} cases of {file.path} are not preprocessed: {listed(unknown)} (there are {len(cases)}: "
            f"{listed(cases)}); take them out, or run: hiendmae preprocess"
        )
    rows = {}
    for row in file.rows:
        if len(known[row.case]) > 1:
            raise UserError(
                f"line {row.line} of {file.path}: '{row.case}' is in several datasets, needed one of "
                f"{', '.join(known[row.case])}"
            )
        (case,) = known[row.case]
        if case in rows:
            raise UserError(f"{file.path} names {case} twice (lines {rows[case].line} and {row.line}); keep one row")
        rows[case] = row
    return rows


def _ordered(labels: set[str]) -> list[str]:
    whole = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if whole else None)
