"""What an encoder file says about its encoder."""

import json
import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from nnunetv2_hiendmae.architectures.spec import EncoderSpec

_TEXTS = ("method", "orientation", "licence", "version")
_OPTIONAL_TEXTS = ("image_reader_writer", "source", "source_sha256")
_LISTS = ("normalization_schemes", "channel_names", "citations", "notes")


@dataclass(frozen=True)
class EncoderMetadata:
    """What an encoder is, how it was trained, and what it saw.

    Args:
        spacing_mm: voxel spacing (D, H, W) of the volumes it saw, None when it varied.
        window_hu: CT window that intensities were clipped to, None where the images were not CT.
        intensity_offset, intensity_scale: what CT normalisation then subtracted and divided by, in HU; with those
            of `hiendmae preprocess` the window becomes [0, 1], stock nnU-Net plans have the dataset's own.
        normalization_schemes: nnU-Net's scheme of every input channel.
        image_reader_writer: nnU-Net reader of the training images (it decides the orientation).
        orientation: in words, e.g. "as SimpleITKIO reads it" or "RAS".
        citations: BibTeX entries.
        source, source_sha256: name and digest of the foreign file it was converted from.
        training: steps, number of cases and settings of the run, for the record.
        notes: what else a reader should know, e.g. about the order of axes; a sentence each.

    Raises:
        ValueError: a field is not of its kind; the message names it.
    """

    spec: EncoderSpec
    method: str
    spacing_mm: tuple[float, float, float] | None
    window_hu: tuple[float, float] | None
    normalization_schemes: tuple[str, ...]
    channel_names: tuple[str, ...]
    image_reader_writer: str | None = None
    orientation: str = "as stored"
    citations: tuple[str, ...] = ()
    intensity_offset: float | None = None
    intensity_scale: float | None = None
    licence: str = "not stated"
    source: str | None = None
    source_sha256: str | None = None
    training: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    version: str = ""

    def __post_init__(self):
        if not isinstance(self.spec, EncoderSpec):
            raise ValueError("spec is no description of an encoder")
        for name in _TEXTS:
            _require(isinstance(getattr(self, name), str), name, "text", self)
        for name in _OPTIONAL_TEXTS:
            _require(isinstance(getattr(self, name), str | None), name, "text or None", self)
        for name in _LISTS:
            value = getattr(self, name)
            _require(isinstance(value, tuple) and all(isinstance(v, str) for v in value), name, "a list of texts", self)
        for name in ("intensity_offset", "intensity_scale"):
            value = getattr(self, name)
            _require(value is None or _are_numbers((value,), 1), name, "a finite number or None", self)
        spacing, window = self.spacing_mm, self.window_hu
        fine = spacing is None or (_are_numbers(spacing, 3) and min(spacing) > 0)
        _require(fine, "spacing_mm", "three positive numbers or None", self)
        fine = window is None or (_are_numbers(window, 2) and window[0] < window[1])
        _require(fine, "window_hu", "two numbers, low and high, or None", self)
        _require(isinstance(self.training, dict | None), "training", "a dictionary or None", self)

    def to_json(self) -> str:
        """As stored in the file's header."""
        return json.dumps({**asdict(self), "spec": self.spec.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "EncoderMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError: not the JSON of encoder metadata.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("spec"), dict):
            raise ValueError("no description of an encoder")
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown metadata fields {sorted(unknown)}")
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**{**data, "spec": EncoderSpec.from_dict(data["spec"])})
        except (TypeError, OverflowError) as e:
            raise ValueError(f"incomplete or impossible metadata: {e}") from e


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _require(fine: bool, name: str, needed: str, metadata: EncoderMetadata) -> None:
    if not fine:
        raise ValueError(f"{name} is {getattr(metadata, name)!r}, needed {needed}")
