"""How an image becomes an array: the one description that plans, encoder files, runs and pictures share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

# nnU-Net's name of the scheme that a window in HU belongs to
CT_SCHEME = "CTNormalization"
# keys of the JSON form, in the order in which files of 0.1 have them; the digest of a run's data depends on it
_KEYS = (
    "channel_names",
    "spacing_mm",
    "normalization_schemes",
    "window_hu",
    "foreground_above",
    "image_reader_writer",
    "foreground_channel",
    "intensity_offset",
    "intensity_scale",
)
_DERIVED = ("foreground_above", "foreground_channel")


@dataclass(frozen=True)
class VolumeFormat:
    """How an image becomes an array. None and () mean nnU-Net's own rule where one plans, and "not known" or "it
    varied" where one describes.

    Args:
        spacing_mm: voxel spacing (D, H, W) of the array.
        window_hu: (lo, hi) that CT channels are clipped to; other channels keep nnU-Net's scheme.
        image_reader_writer: nnU-Net's reader class; it decides the orientation of the array.
        intensity_offset, intensity_scale: subtracted and divided by after clipping, in HU; None: lo and hi − lo, so
            that the window becomes [0, 1]. Stock nnU-Net plans have the dataset's mean and standard deviation.
        normalization_schemes: nnU-Net's scheme of every input channel.
        channel_names: of every input channel.
        orientation: in words, e.g. "as SimpleITKIO reads it" or "RAS".

    Raises:
        ValueError: a field is not of its kind; the message names it.
    """

    spacing_mm: tuple[float, float, float] | None = None
    window_hu: tuple[float, float] | None = None
    image_reader_writer: str | None = None
    intensity_offset: float | None = None
    intensity_scale: float | None = None
    normalization_schemes: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()
    orientation: str = "as stored"

    def __post_init__(self):
        spacing, window = self.spacing_mm, self.window_hu
        if spacing is not None:
            self._require(_are_numbers(spacing, 3) and min(spacing) > 0, "spacing_mm", "three positive numbers (D H W)")
            object.__setattr__(self, "spacing_mm", tuple(float(s) for s in spacing))
        if window is not None:
            self._require(_are_numbers(window, 2) and window[0] < window[1], "window_hu", "two numbers LO < HI")
            object.__setattr__(self, "window_hu", tuple(float(w) for w in window))
        for name in ("intensity_offset", "intensity_scale"):
            value = getattr(self, name)
            self._require(value is None or _are_numbers((value,), 1), name, "a finite number or None")
        for name in ("normalization_schemes", "channel_names"):
            value = getattr(self, name)
            self._require(isinstance(value, tuple) and all(isinstance(v, str) for v in value), name, "a list of texts")
        self._require(isinstance(self.image_reader_writer, str | None), "image_reader_writer", "text or None")
        self._require(isinstance(self.orientation, str), "orientation", "text")

    def _require(self, fine: bool, name: str, needed: str) -> None:
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)!r}, needed {needed}")

    def overridden(
        self, spacing_mm: Sequence[float] | None = None, window_hu: Sequence[float] | None = None
    ) -> "VolumeFormat":
        """With what the user gave; a window that is given becomes [0, 1]."""
        given = {} if spacing_mm is None else {"spacing_mm": tuple(spacing_mm)}
        if window_hu is not None:
            given |= {"window_hu": tuple(window_hu), "intensity_offset": None, "intensity_scale": None}
        return replace(self, **given)

    def is_ct(self, channel: int) -> bool:
        """Whether a channel is normalised as CT."""
        return self.normalization_schemes[channel : channel + 1] == (CT_SCHEME,)

    @property
    def ct_statistics(self) -> dict[str, float]:
        """What nnU-Net's CTNormalization reads from plans: it clips to the percentiles, subtracts the mean, divides
        by the std. Empty without a window."""
        if self.window_hu is None:
            return {}
        low, high = self.window_hu
        offset = low if self.intensity_offset is None else self.intensity_offset
        scale = high - low if self.intensity_scale is None else self.intensity_scale
        return {"mean": offset, "std": scale, "percentile_00_5": low, "percentile_99_5": high}

    @property
    def foreground_channel(self) -> int:
        """The first CT channel, else channel 0."""
        return self.normalization_schemes.index(CT_SCHEME) if CT_SCHEME in self.normalization_schemes else 0

    @property
    def foreground_above(self) -> float:
        """Normalised value that foreground exceeds: the window's lower bound for CT, 0 (the mean or the minimum,
        depending on nnU-Net's scheme) for anything else."""
        statistics = self.ct_statistics
        if not statistics or not self.is_ct(self.foreground_channel):
            return 0.0
        return (statistics["percentile_00_5"] - statistics["mean"]) / statistics["std"]

    def to_intensity(self, values: np.ndarray, channel: int) -> np.ndarray:
        """Undoes CT normalisation (value · scale + offset is HU); values of other channels stay normalised."""
        if not self.is_ct(channel):
            return values
        return values * self.ct_statistics["std"] + self.ct_statistics["mean"]

    def to_dict(self) -> dict[str, Any]:
        """What decides the arrays, for classifier files and the digest of a run's data; tuples stay tuples."""
        return {key: getattr(self, key) for key in _KEYS}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VolumeFormat":
        """Inverse of `to_dict`.

        Raises:
            ValueError: see the class.
            TypeError: unknown keys.
        """
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k not in _DERIVED})


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == count
        and all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
