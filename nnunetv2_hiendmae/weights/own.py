"""Our own files at the border: encoder files, and the checkpoint of a pretraining run beside its settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.citations import CITATIONS
from nnunetv2_hiendmae.weights.encoder_file import METADATA_KEY, EncoderMetadata, read_metadata
from nnunetv2_hiendmae.weights.export import EXPORT_KEY

# files of a run folder, and the keys of its checkpoint
SETTINGS = "run.json"
ENCODER = "encoder.safetensors"
STATE = "method"


def is_run_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file is `checkpoint_latest.pth` of `hiendmae pretrain`."""
    return "step" in content and isinstance(content.get(STATE), Mapping)


def run_metadata(path: Path) -> EncoderMetadata:
    """What the run of a checkpoint knows about its encoder: from the encoder file beside it, which says what images
    it saw, or from its settings alone.

    Raises:
        UserError: there are no settings beside it, or they are damaged.
    """
    settings_file = path.parent / SETTINGS
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        method, spec = settings["method"], EncoderSpec.from_dict(settings["spec"])
    except OSError as e:
        raise UserError(
            f"{path} is a checkpoint of hiendmae pretrain, but there is no {settings_file} beside it; "
            "keep the two in one folder"
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{settings_file} is damaged ({e}); restore it or use the run's {ENCODER}") from e
    exported = path.parent / ENCODER
    if exported.is_file():
        seen = read_metadata(exported)
        if seen.method == method and seen.spec == spec:
            return seen
    return EncoderMetadata(spec, method, None, None, (), (), citations=CITATIONS.get(method, ()))


def header_metadata(header: Mapping[str, str], path: Path) -> EncoderMetadata | None:
    """Metadata of an encoder file of ours, from the text in its header; None: it is none.

    Raises:
        UserError: the text is damaged.
    """
    return _parsed(header, METADATA_KEY, path)


def export_metadata(header: Mapping[str, str], path: Path) -> EncoderMetadata | None:
    """What `hiendmae convert --to` left in the header of a file with foreign names; None: nothing.

    Raises:
        UserError: the text is damaged.
    """
    return _parsed(header, EXPORT_KEY, path)


def _parsed(header: Mapping[str, str], key: str, path: Path) -> EncoderMetadata | None:
    if key not in header:
        return None
    try:
        return EncoderMetadata.from_json(header[key])
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not a readable encoder file ({e}); download or write it again") from e
