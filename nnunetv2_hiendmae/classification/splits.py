"""Which labelled cases train, validate and test: seeded stratified folds, label fractions, or the user's column."""

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedKFold

from nnunetv2_hiendmae.classification.labels import FOLD, SPLIT, Labels
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text

FOLDS = 5
ALL = "all"
SPLITS = "splits.json"
TRAIN, VALIDATION, TEST = "train", "val", "test"


@dataclass(frozen=True)
class Split:
    """Case names. `val` is empty where all cases train; `test` cases neither train nor choose the model."""

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


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
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction is {fraction}, needed more than 0 and at most 1")
    if not 0 <= split_seed < 2**32:
        raise UserError(f"--split-seed is {split_seed}, needed 0 to 2^32 - 1")
    if labels.column == SPLIT:
        split = _from_split_column(labels, fold)
    elif fold == ALL:
        split = Split(tuple(labels.targets))
    else:
        split = _fold(_places(labels, split_seed), fold or "0")
    validated = {} if fold == ALL else {VALIDATION: split.val}
    _check_classes(labels, {TRAIN: split.train, **validated})
    return Split(_fraction(labels, split.train, fraction, split_seed), split.val, split.test)


def write_split(run_dir: Path, split: Split) -> None:
    """Writes splits.json of a run: the case names under "train", "val" and "test"."""
    write_text(run_dir / SPLITS, json.dumps(asdict(split), indent=2))


def read_split(run_dir: Path) -> Split:
    """Inverse of `write_split`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        data = json.loads((run_dir / SPLITS).read_text(encoding="utf-8"))
        return Split(**{key: tuple(cases) for key, cases in data.items()})
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"cannot read {run_dir / SPLITS} ({e}); start anew under another --name") from e


def _places(labels: Labels, split_seed: int) -> dict[str, str]:
    """Fold per case."""
    if labels.column == FOLD:
        return labels.places
    for index, name in enumerate(labels.classes):
        count = len(labels.of_class(index))
        if count < FOLDS:
            raise UserError(
                f"class '{name}' has {count} cases, needed {FOLDS}, one per fold; add a column '{FOLD}' or '{SPLIT}' "
                f"to the labels, or train on all with -f {ALL}"
            )
    cases, targets = list(labels.targets), list(labels.targets.values())
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=split_seed).split(cases, targets)
    place = {cases[i]: str(fold) for fold, (_, validation) in enumerate(folds) for i in validation}
    return {case: place[case] for case in cases}


def _fold(places: dict[str, str], fold: str) -> Split:
    there = sorted(set(places.values()), key=lambda place: (len(place), place))
    if fold not in there:
        raise UserError(f"no fold '{fold}', needed one of {', '.join(there)} or {ALL}; choose with -f")
    return Split(
        tuple(case for case, place in places.items() if place != fold),
        tuple(case for case, place in places.items() if place == fold),
    )


def _from_split_column(labels: Labels, fold: str | None) -> Split:
    if fold is not None:
        raise UserError(f"-f {fold} with a column '{SPLIT}' in the labels, needed one of the two; leave -f out")
    known = (TRAIN, VALIDATION, TEST)
    strange = sorted(set(labels.places.values()) - set(known))
    if strange:
        raise UserError(f"the column '{SPLIT}' of the labels holds '{strange[0]}', needed one of {', '.join(known)}")
    return Split(*(tuple(case for case, place in labels.places.items() if place == name) for name in known))


def _check_classes(labels: Labels, sets: dict[str, tuple[str, ...]]) -> None:
    for name, cases in sets.items():
        missing = set(range(len(labels.classes))) - {labels.targets[case] for case in cases}
        if missing:
            told = ", ".join(labels.classes[index] for index in sorted(missing))
            raise UserError(
                f"no case of class {told} among the {len(cases)} {name} cases, needed one of every class; choose "
                f"another -f, or change the column '{labels.column}' of the labels"
            )


def _fraction(labels: Labels, train: tuple[str, ...], fraction: float, split_seed: int) -> tuple[str, ...]:
    there, kept = set(train), set()
    for index in range(len(labels.classes)):
        cases = labels.of_class(index)
        # all cases of the class are ranked, not those of the fold: ranks do not depend on the fold
        order = np.random.default_rng([split_seed, index]).permutation(len(cases))
        ranked = [cases[i] for i in order if cases[i] in there]
        # str: 0.145 means 145/1000, not the nearest binary number below it
        kept |= set(ranked[: max(1, floor(Fraction(str(fraction)) * len(ranked) + Fraction(1, 2)))])
    return tuple(case for case in train if case in kept)
