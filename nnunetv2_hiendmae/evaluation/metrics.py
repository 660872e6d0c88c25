"""Metrics of `hiendmae compare`: what they are called, which way is better, and what the foot of a table says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation.folds import listed

MEAN = "mean"  # stands where the name of a class could stand
DEFAULT_TOLERANCE_MM = 1.0
# of what is measured or ranked: rounding errors must not break ties between runs
DECIMALS = 9
# tables beside those of the metrics: signed difference of volumes, and whether one of truth and prediction is empty
SIGNED, MISSED = "signed", "missed"


@dataclass(frozen=True)
class Metric:
    """One metric of a case and class.

    Args:
        name: as in `--metrics`, and in the names of files.
        title: as in tables; `unit`: of it, "" for none.
        higher_is_better: which way.
        largest: no value is above it; None: no such bound. None is below 0.
        decimals: shown in tables.
        definition: what it is, and what becomes of classes that truth or prediction lacks.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    largest: float | None
    decimals: int
    definition: str = ""

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def told_with(self, tolerances: Mapping[str, float]) -> "Metric":
        """With the tolerances in mm of the classes in its definition, if it depends on them."""
        if self.name != NSD.name:
            return self
        values = {*tolerances.values()}
        told = f"{min(values):g} mm"
        if len(values) > 1:
            told = listed(f"{value:g} mm for {name}" for name, value in tolerances.items())
        return replace(self, definition=f"{self.definition} Tolerance: {told}.")


_SURFACE = (
    "The surface runs half-way between voxels inside and outside; its elements lie at the corners of voxels and count "
    "by their area (marching cubes), at the label's spacing (Nikolov et al. 2021, as in DeepMind's surface-distance)."
)
_EMPTY = "where neither truth nor prediction holds the class, n/a, as for Dice"
DICE = Metric("dice", "Dice", "", True, 1, 4)
NSD = Metric(
    *("nsd", "NSD", "", True, 1, 4),
    f"Normalised surface Dice: the part of both surfaces that lies within the tolerance of the other one. {_SURFACE} "
    f"Empty: {_EMPTY}; where only one of them holds it, 0.",
)
HD95 = Metric(
    *("hd95", "HD95", "mm", False, None, 2),
    "95% Hausdorff distance: the distance from the other surface within which 95% of the area lie, the larger one of "
    f"both directions. {_SURFACE} Empty: {_EMPTY}; where only one of them holds it, the diagonal of the image, so that "
    "a miss counts: notes say how many.",
)
VOLUME = Metric(
    *("volume", "volume difference", "mL", False, None, 3),
    "Absolute difference of the volumes of prediction and truth; below it the signed one, prediction − truth, whose "
    f"mean is the bias. Empty: {_EMPTY}; where only one of them holds it, the volume of that one.",
)
METRICS = {metric.name: metric for metric in (DICE, NSD, HD95, VOLUME)}


def chosen_metrics(names: Sequence[str], tolerances: Sequence[str]) -> list[Metric]:
    """The metrics beside Dice, in the order in which they were asked for.

    Raises:
        UserError: an unknown one, or tolerances without one that has a tolerance.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]!r} is no metric, needed some of: {','.join(METRICS)}")
    chosen = [METRICS[name] for name in dict.fromkeys(names) if name != DICE.name]
    if tolerances and NSD not in chosen:
        raise UserError(f"--tolerance is that of {NSD.name}, which is not asked for; add --metrics dice,{NSD.name}")
    return chosen


def tolerances_mm(texts: Sequence[str], classes: Sequence[str]) -> list[float]:
    """Tolerance of every class from "2" (of all) and "CLASS=2" (of one, whatever was said of all).

    Raises:
        UserError: an unknown class, one that is named twice, or no number of 0 or above.
    """
    of_all, of_one = [], {}
    for text in texts:
        name, separator, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(f"--tolerance {text!r}: needed mm, 0 or more, for all classes (2) or for one (CLASS=2)")
        if separator and name not in classes:
            raise UserError(f"--tolerance {text!r}: no class {name!r}; there are: {listed(classes)}")
        if name in of_one or (of_all and not separator):
            raise UserError(f"--tolerance {text!r}: {'class ' + name if separator else 'all'} has one already")
        if separator:
            of_one[name] = value
        else:
            of_all = [value]
    return [of_one.get(name, *of_all or [DEFAULT_TOLERANCE_MM]) for name in classes]
