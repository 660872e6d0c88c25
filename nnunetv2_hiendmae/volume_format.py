"""How an image becomes an array: the one description that plans, encoder files, runs and pictures share."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from nnunetv2_hiendmae.schemas import CLOSED, CT_SCHEME, channels_of, validated

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

# linear: the published methods'; cubic: the closest to the image, and slow; nnunet: nnU-Net's own, which is cubic
# within slices and repeats slices that are much thicker than their pixels
Interpolation = Literal["linear", "cubic", "nnunet"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
DEFAULT_INTERPOLATION: Interpolation = "linear"
# nnU-Net's readers whose arrays are the same: the first of two also reads sheared files, the second more file endings
# and (X, Y, Z, 1)
REORIENTING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
_AS_STORED = ("NibabelIO", "SimpleITKIO")
# nnU-Net's functions: of its default planner and of its planners with "torchres" in their names
_DEFAULT_FUNCTION, TORCH_FUNCTION = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"
# the second one holds every label of a volume at once, in two bytes a voxel
_MOST_LABELS_OF_TORCH = 32


def resampling(interpolation: Interpolation, labels: int = 0) -> dict[str, Any]:
    """Entries of nnU-Net's plans that make it resample images so. Segmentations and predicted probabilities are
    interpolated linearly, along the same axes as the images: the edge of a label stays where its image's edge is.

    Args:
        labels: how many the segmentations have.
    """
    separate_z = None if interpolation == "nnunet" else False

    def default(order: int) -> tuple[str, dict[str, Any]]:
        return _DEFAULT_FUNCTION, {"order": order, "order_z": 0, "force_separate_z": separate_z}

    linear = default(1) if interpolation == "nnunet" else (TORCH_FUNCTION, {"force_separate_z": False})
    functions = {
        "data": linear if interpolation == "linear" else default(3),
        "seg": linear if labels <= _MOST_LABELS_OF_TORCH else default(1),
        "probabilities": linear,
    }
    entries = {}
    for what, (name, arguments) in functions.items():
        entries[f"resampling_fn_{what}"] = name
        entries[f"resampling_fn_{what}_kwargs"] = {"is_seg": what == "seg", **arguments}
    return entries


def twins(reader: str | None) -> tuple[str | None, ...]:
    """The reader, and those whose arrays are the same."""
    same = next((group for group in (REORIENTING, _AS_STORED) if reader in group), ())
    return (reader, *(other for other in same if other != reader))


def interpolation_of(configuration: dict[str, Any]) -> Interpolation | None:
    """What a configuration of nnU-Net's plans does to images; None: something else."""
    own = resampling("nnunet")
    name = configuration.get("resampling_fn_data", own["resampling_fn_data"])
    arguments = configuration.get("resampling_fn_data_kwargs", own["resampling_fn_data_kwargs"])
    # without what only changes speed, or segmentations
    arguments = {k: v for k, v in arguments.items() if k not in ("num_threads", "memefficient_seg_resampling")}
    for interpolation in INTERPOLATIONS:
        entries = resampling(interpolation)
        if (name, arguments) == (entries["resampling_fn_data"], entries["resampling_fn_data_kwargs"]):
            return interpolation
    return None


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
        use_mask_for_norm: of every input channel, whether z-scores are those of the voxels that are not 0, and 0 stays
            0: nnU-Net does so where images have large empty borders, as skulls that were stripped leave them.
        interpolation: how images are resampled to the spacing; that of files that do not say it, which are of 0.1, is
            nnU-Net's.

    Raises:
        ValueError: a number is impossible; the message names it.
    """

    __pydantic_config__: ClassVar = CLOSED
    spacing_mm: tuple[float, float, float] | None = None
    window_hu: tuple[float, float] | None = None
    image_reader_writer: str | None = None
    intensity_offset: float | None = None
    intensity_scale: float | None = None
    normalization_schemes: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()
    orientation: str = "as stored"
    interpolation: Interpolation | None = "nnunet"
    use_mask_for_norm: tuple[bool, ...] = ()

    def __post_init__(self):
        for name, (fits, needed) in _CHECKS.items():
            value = getattr(self, name)
            numbers = np.ravel(() if value is None else value).tolist()
            if numbers and not (all(map(math.isfinite, numbers)) and fits(*numbers)):
                raise ValueError(f"{name} is {value!r}, needed {needed}")
            if name in ("spacing_mm", "window_hu") and value is not None:
                object.__setattr__(self, name, tuple(map(float, value)))

    def overridden(
        self,
        spacing_mm: Sequence[float] | None = None,
        window_hu: Sequence[float] | None = None,
        interpolation: Interpolation | None = None,
    ) -> "VolumeFormat":
        """With what the user gave; a window that is given becomes [0, 1]."""
        given = {} if spacing_mm is None else {"spacing_mm": tuple(spacing_mm)}
        if interpolation is not None:
            given["interpolation"] = interpolation
        if window_hu is not None:
            given |= {"window_hu": tuple(window_hu), "intensity_offset": None, "intensity_scale": None}
        return replace(self, **given)

    def masks(self, schemes: Sequence[str], otherwise: Sequence[bool]) -> list[bool]:
        """`use_mask_for_norm` of channels with these schemes: as here, where a channel has the same scheme."""
        known = dict(zip(self.normalization_schemes, self.use_mask_for_norm, strict=False))
        return [known.get(scheme, mask) for scheme, mask in zip(schemes, otherwise, strict=True)]

    def differences(self, other: "VolumeFormat") -> dict[str, tuple[Any, Any]]:
        """Fields in which arrays of the two differ, with both values; readers whose arrays are the same do not. Masks,
        which follow the dataset, are left out."""
        same = {"use_mask_for_norm"}
        if other.image_reader_writer in twins(self.image_reader_writer):
            same |= {"image_reader_writer", "orientation"}
        return {k: (v, vars(other)[k]) for k, v in vars(self).items() if k not in same and v != vars(other)[k]}

    def is_ct(self, channel: int) -> bool:
        """Whether a channel is normalised as CT."""
        return self.normalization_schemes[channel : channel + 1] == (CT_SCHEME,)

    @property
    def scheme_of_all(self) -> str | None:
        """nnU-Net's scheme of any channel, whatever it is called, CT too; None: it goes by the channels' names, as
        nnU-Net's rule has it. So it is where a program normalised all that it saw alike."""
        schemes = set(self.normalization_schemes)
        alike = len(schemes) == 1 and not schemes & {CT_SCHEME} and not self.channel_names and self.window_hu is None
        return self.normalization_schemes[0] if alike else None

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

    @classmethod
    def of_plans(cls, plans: dict[str, Any], configuration: dict[str, Any], dataset: dict[str, Any]) -> "VolumeFormat":
        """What nnU-Net does with plans, one of their configurations (without `inherits_from`), and a dataset.json, of
        which only the names of the channels are used, if it has some.

        Raises:
            ValueError: CT channels are normalised differently, or without statistics.
        """
        schemes, reader = tuple(configuration["normalization_schemes"]), plans["image_reader_writer"]
        known = cls(
            tuple(configuration["spacing"]),
            image_reader_writer=reader,
            normalization_schemes=schemes,
            channel_names=channels_of(dataset) or tuple(map(str, range(len(schemes)))),
            orientation=f"as {reader} reads it",
            interpolation=interpolation_of(configuration),
            # CT has none
            use_mask_for_norm=tuple(configuration.get("use_mask_for_norm", ())) if {*schemes} - {CT_SCHEME} else (),
        )
        keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
        properties = plans["foreground_intensity_properties_per_channel"]
        channels = [properties.get(str(i), {}) for i in range(len(schemes)) if known.is_ct(i)]
        if any(set(keys) - set(channel) for channel in channels):
            raise ValueError(f"a CT channel has no {', '.join(keys)}")
        stats = {tuple(float(channel[k]) for k in keys) for channel in channels}
        if not stats:
            return known
        if len(stats) > 1:
            raise ValueError("CT channels were normalised differently")
        low, high, offset, std = stats.pop()
        return replace(known, window_hu=(low, high), intensity_offset=offset, intensity_scale=std)

    def to_dict(self) -> dict[str, Any]:
        """What decides the arrays, for classifier files and the digest of a run's data; tuples stay tuples."""
        described = {key: getattr(self, key) for key in _KEYS}
        # runs of 0.1 go on: their digests know no interpolation
        return described if self.interpolation == "nnunet" else {**described, "interpolation": self.interpolation}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VolumeFormat":
        """Inverse of `to_dict`.

        Raises:
            ValueError: see the class; unknown keys, or a value of another type.
        """
        return validated(cls, json.dumps({k: v for k, v in data.items() if k not in _DERIVED}))


# of each field that is numbers, if there are any: what holds for them, and that in words
_CHECKS = {
    "spacing_mm": (lambda *size: len(size) == 3 and min(size) > 0, "three positive numbers (D H W)"),
    "window_hu": (lambda *ends: len(ends) == 2 and ends[0] < ends[1], "two numbers LO < HI"),
    "intensity_offset": (lambda _: True, "a finite number"),
    "intensity_scale": (lambda scale: scale > 0, "a positive number"),
}
