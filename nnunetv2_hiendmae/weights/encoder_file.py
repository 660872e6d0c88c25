"""`encoder.safetensors`: the only weights that fine-tuning reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnunetv2_hiendmae.architectures import ConvViTEncoder, ViTEncoder, build_encoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.adapt import adapt_state
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord
from nnunetv2_hiendmae.weights.stream import write_safetensors

METADATA_KEY = "hiendmae"
Encoder = ViTEncoder | ConvViTEncoder


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
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown or "spec" not in data:
            raise ValueError(f"unknown or missing metadata fields {sorted(unknown)}")
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**{**data, "spec": EncoderSpec.from_dict(data["spec"])})


def save_encoder(path: Path, state: Mapping[str, Tensor], metadata: EncoderMetadata) -> None:
    """Writes an encoder's state_dict with its metadata, in one step and one tensor at a time; float64 as float32.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    write_safetensors(path, state, {METADATA_KEY: header})


def is_encoder_file(path: Path) -> bool:
    """Whether a file is a safetensors file with our metadata; reads no tensor."""
    try:
        with safe_open(path, "pt") as f:
            return METADATA_KEY in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_metadata(path: Path) -> EncoderMetadata:
    """Metadata only; reads no tensor.

    Raises:
        UserError: no such file, or not an encoder file of ours.
    """
    return _open(path)[0]


def load_encoder(path: Path) -> tuple[Encoder, EncoderMetadata]:
    """Encoder of a file, with its weights, in eval mode on the CPU.

    Raises:
        UserError: no such file, not an encoder file of ours, or tensors missing.
    """
    metadata, state = _open(path, tensors=True)
    encoder = build_encoder(metadata.spec)
    load_state(encoder, state, path)
    return encoder.eval(), metadata


def load_report(path: Path) -> LoadReport:
    """What loading the file would do to each of its tensors, without building anything twice.

    Raises:
        UserError: as `load_encoder`.
    """
    metadata, state = _open(path, tensors=True)
    load_state(build_encoder(metadata.spec), state, path)
    return LoadReport(tuple(TensorRecord(k, k, "loaded") for k in state))


def load_into(encoder: Encoder, path: Path) -> LoadReport:
    """Puts a file's weights into an encoder that may differ in grid, input channels, CLS or, for a convvit, in being
    the dense one. What a dense encoder has and the file has not keeps its values and is reported as fresh.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    metadata, state = _open(path, tensors=True)
    state, report = adapt_state(state, metadata.spec, encoder)
    load_state(encoder, state, path)
    return report


def load_state(encoder: Encoder, state: Mapping[str, Tensor], path: Path) -> None:
    """Strict load, cast to the network's number type; names what is missing, left over or of another shape.

    Raises:
        UserError: anything does not match.
    """
    expected = encoder.state_dict()
    wrong = [f"missing {k}" for k in expected if k not in state]
    wrong += [f"unexpected {k}" for k in state if k not in expected]
    wrong += [
        f"{k} has shape {tuple(state[k].shape)}, needed {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    wrong += [
        f"{k} holds {str(v.dtype).removeprefix('torch.')}, needed floating-point numbers"
        for k, v in state.items()
        if not v.is_floating_point()
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not hold the encoder its header describes: {'; '.join(wrong[:3])}{more}")
    encoder.load_state_dict(dict(state))


def _open(path: Path, tensors: bool = False) -> tuple[EncoderMetadata, dict[str, Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no encoder file at {path}; make one with: hiendmae pretrain or hiendmae convert")
    try:
        with safe_open(path, "pt") as f:
            header = (f.metadata() or {}).get(METADATA_KEY)
            if header is None:
                raise UserError(
                    f"{path} is a safetensors file but not an encoder file of ours; make one with: hiendmae convert"
                )
            state = {k: f.get_tensor(k) for k in f.keys()} if tensors else {}  # noqa: SIM118
        return EncoderMetadata.from_json(header), state
    except (SafetensorError, ValueError, TypeError, OSError) as e:
        raise UserError(f"{path} is not a readable encoder file ({e}); see: hiendmae inspect {path}") from e
