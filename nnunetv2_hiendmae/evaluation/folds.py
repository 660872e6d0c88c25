"""What the folds of `splits_final.json` mean: nnU-Net's file, and our record of the folds that were appended to it."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import combinations
from math import floor
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text

SPLITS_FILE = "splits_final.json"
RECORD_FILE = "splits_hiendmae.json"
SHOTS, FRACTION = "shots", "fraction"
ABOUT = "Folds that `hiendmae splits` appended to splits_final.json: do not edit either file by hand."

logger = logging.getLogger(__name__)

Fold = Mapping[str, Any]  # as in the file: "train" and "val", lists of case names


@dataclass(frozen=True)
class Subset:
    """A part of the training cases of a fold; its validation cases stay those of that fold.

    Args:
        kind: "shots" or "fraction".
        value: number of cases, or the part of the training cases in (0, 1].
        of_fold: the fold it is taken from.
        seed: decides the order in which cases are drawn.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str
    value: int | float
    of_fold: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.kind not in (SHOTS, FRACTION):
            raise ValueError(f"kind {self.kind!r} must be '{SHOTS}' or '{FRACTION}'")
        if self.kind == SHOTS and not (isinstance(self.value, int) and self.value >= 1):
            raise ValueError(f"--shots {self.value} must be a whole number of cases, at least 1")
        if self.kind == FRACTION and not 0 < self.value <= 1:
            raise ValueError(f"--fraction {self.value:g} must lie above 0 and not above 1 (0.1 is 10 percent)")
        if not (isinstance(self.of_fold, int) and self.of_fold >= 0):
            raise ValueError(f"--of-fold {self.of_fold} must be the number of a fold, 0 or above")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise ValueError(f"--seed {self.seed} must be a whole number, 0 or above")

    @property
    def amount(self) -> str:
        """'3-shot' or '10%'."""
        return f"{self.value}-shot" if self.kind == SHOTS else f"{100 * self.value:.10g}%"

    def num_cases(self, available: int) -> int:
        """Cases drawn from `available` ones; a fraction is rounded to the nearest number, halves up, but never to 0."""
        if self.kind == SHOTS:
            return self.value
        # str: 0.145 means 145/1000, not the nearest binary number below it
        return max(1, floor(Fraction(str(self.value)) * available + Fraction(1, 2)))

    def __str__(self) -> str:
        return f"{self.amount} of fold {self.of_fold} (seed {self.seed})"


@dataclass(frozen=True)
class Setting:
    """What folds have in common so that their results may be put together.

    Args:
        order: settings are shown in this order.
        name: e.g. "5-fold cross-validation", "1-shot (seed 0)".
    """

    order: tuple[float, ...]
    name: str


@dataclass(frozen=True)
class Splits:
    """Content of `splits_final.json` and of our record.

    Args:
        folds: as in the file, in its order; empty when there is none.
        appended: number of a fold that `hiendmae splits` appended -> its meaning.
        lost: number -> digest of folds that the record knows and the file lacks (nnU-Net made it anew, for instance).
    """

    folds: Sequence[Fold] = ()
    appended: Mapping[int, Subset] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def original(self) -> list[int]:
        """Numbers of the folds that are not ours."""
        return [i for i in range(len(self.folds)) if i not in self.appended]

    def setting(self, fold: int) -> Setting:
        """To which setting results of `fold` belong. Folds of the same setting validate on the cases of one split."""
        if fold in self.appended:
            subset = self.appended[fold]
            order = (1.0 if subset.kind == SHOTS else 2.0, float(subset.value), float(subset.seed))
            return Setting(order, f"{subset.amount} (seed {subset.seed})")
        if fold in self.original:
            return Setting((0.0,), self._original_name())
        if not self.folds and fold < 5:
            return Setting((0.0,), "folds 0 to 4, no splits_final.json")
        return Setting((3.0, float(fold)), f"fold {fold}, not in splits_final.json")

    def meaning(self, fold: int) -> str:
        """One fold in words."""
        if fold in self.appended:
            return str(self.appended[fold])
        return self._original_name() if fold in self.original else self.setting(fold).name

    def _original_name(self) -> str:
        validation = [set(self.folds[i]["val"]) for i in self.original]
        if len(validation) == 1:
            return "single split"
        disjoint = all(not a & b for a, b in combinations(validation, 2))
        if disjoint:
            return f"{len(validation)}-fold cross-validation"
        sizes = sorted({len(self.folds[i]["train"]) for i in self.original})
        # a copy of the file without our record may hold few-shot folds: the sizes show it
        span = f"{sizes[0]} to {sizes[-1]}" if sizes[1:] else sizes[0]
        return f"{len(validation)} overlapping splits, {span} training cases"


def read_splits(folder: Path) -> Splits:
    """Splits of a preprocessed dataset, `$nnUNet_preprocessed/<dataset>`.

    Raises:
        UserError: a file is damaged, or a fold is no longer what the record describes.
    """
    folds = read_folds(folder / SPLITS_FILE)
    path = folder / RECORD_FILE
    if not path.is_file():
        return Splits(folds)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        digests = {int(number): digest for number, digest in record["sha256"].items()}
        appended = {int(number): Subset(**_known(entry)) for number, entry in record["appended"].items()}
        if strange := appended.keys() - digests.keys():
            raise ValueError(f"fold {min(strange)} without its sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}), needed what `hiendmae splits` wrote; put it back, or remove "
            f"it together with the folds that were appended to {SPLITS_FILE}"
        ) from e
    lost = {number: digest for number, digest in digests.items() if number >= len(folds)}
    changed = [
        number for number, digest in digests.items() if number not in lost and digest != digest_of(folds[number])
    ]
    if changed:
        listed = ", ".join(map(str, changed))
        raise UserError(
            f"{folder / SPLITS_FILE} was changed by something else: fold {listed} is not what {RECORD_FILE} describes; "
            f"put the file back, or remove {path} if the meaning of appended folds is no longer needed"
        )
    for number in sorted(lost.keys() & appended.keys()):
        logger.warning("%s lacks fold %d, which was %s", folder / SPLITS_FILE, number, appended[number])
    return Splits(folds, {n: subset for n, subset in sorted(appended.items()) if n not in lost}, lost)


def read_folds(path: Path) -> list[dict[str, Any]]:
    """Folds of a `splits_final.json`, [] when there is none.

    Raises:
        UserError: not what nnU-Net reads.
    """
    if not path.is_file():
        return []
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        if not folds:
            raise ValueError("no folds")
        for fold in folds:
            # a text is no list of cases, though its letters are text too
            if not all(isinstance(fold[part], list) for part in ("train", "val")):
                raise ValueError("cases that are no list")
            if not all(isinstance(case, str) for part in ("train", "val") for case in fold[part]):
                raise ValueError("a case that is no name")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{path} is damaged ({type(e).__name__}: {e}), needed a list of folds with "train" and "val"; put it back, '
            "or remove it: nnU-Net makes its own 5 folds anew"
        ) from e
    return folds


def write_splits(folder: Path, splits: Splits, *, shrinking: bool = False) -> None:
    """Writes both files, in the order in which a fold of ours is never without its record."""
    kept = [(number, digest) for number, digest in splits.lost.items() if number >= len(splits.folds)]
    record = {
        "about": ABOUT,
        "appended": {
            str(number): {**asdict(subset), "meaning": str(subset), "train_cases": len(splits.folds[number]["train"])}
            for number, subset in splits.appended.items()
        },
        # of every fold, so that a change by another hand is noticed
        "sha256": {str(number): digest for number, digest in [*enumerate(map(digest_of, splits.folds)), *kept]},
    }
    texts = [
        (folder / RECORD_FILE, json.dumps(record, indent=4) + "\n"),
        # as nnU-Net writes it
        (folder / SPLITS_FILE, json.dumps(list(splits.folds), indent=4)),
    ]
    for path, text in reversed(texts) if shrinking else texts:
        write_text(path, text)


def digest_of(fold: Fold) -> str:
    """Of a fold's cases, in whatever order they are listed."""
    cases = json.dumps([sorted(fold["train"]), sorted(fold["val"])])
    return hashlib.sha256(cases.encode()).hexdigest()


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("kind", "value", "of_fold", "seed")}
