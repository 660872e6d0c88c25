"""`encoder.safetensors`: the only weights that fine-tuning reads."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnunetv2_hiendmae.architectures import ConvViTEncoder, ViTEncoder, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.adapt import adapt_state
from nnunetv2_hiendmae.weights.matching import expected_tensors, mismatch
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LONGEST_ERROR, LoadReport, TensorRecord, printable
from nnunetv2_hiendmae.weights.stream import write_safetensors

METADATA_KEY = "hiendmae"
Encoder = ViTEncoder | ConvViTEncoder


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
    # before the encoder is built: what a header says may be of any size
    _check(state, expected_tensors(metadata.spec), path)
    encoder = build_encoder(metadata.spec)
    encoder.load_state_dict(state)
    return encoder.eval(), metadata


def load_report(path: Path) -> LoadReport:
    """What loading the file would do to each of its tensors; builds no encoder.

    Raises:
        UserError: as `load_encoder`.
    """
    metadata, state = _open(path, tensors=True)
    _check(state, expected_tensors(metadata.spec), path)
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
    _check(state, encoder.state_dict(), path)
    encoder.load_state_dict(dict(state))


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    if wrong := mismatch(state, expected):
        raise UserError(f"{path} does not hold the encoder its header describes: {wrong}")


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
    except (SafetensorError, ValueError, OSError) as e:
        told = printable(e, LONGEST_ERROR)
        raise UserError(
            f"{path} is not a readable encoder file ({told}); see: hiendmae inspect {quote(str(path))}"
        ) from e
