"""What an encoder file says about its encoder."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.volume_format import VolumeFormat

# what each field is, besides the spec and the volume
_KINDS = {
    **dict.fromkeys(("method", "licence", "version"), (str, "text")),
    **dict.fromkeys(("source", "source_sha256"), (str | None, "text or None")),
    **dict.fromkeys(("citations", "notes"), (tuple, "a list of texts")),
    "training": (dict | None, "a dictionary or None"),
}
# of the JSON form, in the order in which files of 0.1 have them; those of the volume stand among the others
_VOLUME_KEYS = (
    *("spacing_mm", "window_hu", "normalization_schemes", "channel_names", "image_reader_writer", "orientation"),
    *("intensity_offset", "intensity_scale"),
)
_KEYS = (
    *("spec", "method", *_VOLUME_KEYS[:6], "citations", *_VOLUME_KEYS[6:]),
    *("licence", "source", "source_sha256", "training", "notes", "version"),
)


@dataclass(frozen=True)
class EncoderMetadata:
    """What an encoder is, how it was trained, and what it saw.

    Args:
        method: that it was pretrained with.
        volume: how the images that it saw had become arrays.
        citations: BibTeX entries.
        source, source_sha256: name and digest of the foreign file it was converted from.
        training: steps, number of cases and settings of the run, for the record.
        notes: what else a reader should know, e.g. about the order of axes; a sentence each.

    Raises:
        ValueError: a field is not of its kind; the message names it.
    """

    spec: EncoderSpec
    method: str
    volume: VolumeFormat = VolumeFormat()
    citations: tuple[str, ...] = ()
    licence: str = "not stated"
    source: str | None = None
    source_sha256: str | None = None
    training: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    version: str = ""

    def __post_init__(self):
        if not isinstance(self.spec, EncoderSpec):
            raise ValueError("spec is no description of an encoder")
        for name, (kind, needed) in _KINDS.items():
            value = getattr(self, name)
            texts = value if isinstance(value, tuple) else ()
            if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} is {value!r}, needed {needed}")

    def to_json(self) -> str:
        """As stored in the file's header."""
        data = {**asdict(self), **asdict(self.volume), "spec": self.spec.to_dict()}
        return json.dumps({key: data[key] for key in _KEYS})

    @classmethod
    def from_json(cls, text: str) -> "EncoderMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError: not the JSON of encoder metadata.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("spec"), dict):
            raise ValueError("no description of an encoder")
        if unknown := set(data) - set(_KEYS):
            raise ValueError(f"unknown metadata fields {sorted(unknown)}")
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            volume = VolumeFormat(**{k: data.pop(k) for k in _VOLUME_KEYS if k in data})
            return cls(**{**data, "spec": EncoderSpec.from_dict(data["spec"]), "volume": volume})
        except (TypeError, OverflowError) as e:
            raise ValueError(f"incomplete or impossible metadata: {e}") from e
