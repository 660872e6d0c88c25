"""Our own files at the border: encoder files, and the checkpoint of a pretraining run beside its settings."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.weights.encoder_file import METADATA_KEY, read_metadata
from nnunetv2_hiendmae.weights.export import EXPORT_KEY
from nnunetv2_hiendmae.weights.finding import is_weight
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.provenance import TEACHER_NOTE
from nnunetv2_hiendmae.weights.report import LONGEST_ERROR, printable

# files of a run folder, and the keys of its checkpoint
SETTINGS = "run.json"
ENCODER = "encoder.safetensors"
STATE, STEP = "method", "step"
# a method's encoder is under the first, with the names of encoder files; its momentum teacher under the second
STUDENT_PREFIX, TEACHER_PREFIX = "encoder.", "teacher_encoder."
_DROPPED = {
    STUDENT_PREFIX: "the student; the teacher was asked for",
    TEACHER_PREFIX: "the momentum teacher; --use-teacher takes it",
}


def is_run_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file is `checkpoint_latest.pth` of `hiendmae pretrain`, whatever its name."""
    state = content.get(STATE)
    return (
        isinstance(content.get(STEP), int)
        and isinstance(state, Mapping)
        and any(is_weight(k, v) for k, v in state.items())
    )


def run_prefix(state: Mapping[str, Any], use_teacher: bool) -> str:
    """Prefix of the encoder in a method's state.

    Raises:
        UserError: the teacher is asked for and there is none.
    """
    prefix = TEACHER_PREFIX if use_teacher else STUDENT_PREFIX
    if use_teacher and not any(k.startswith(prefix) for k in state if isinstance(k, str)):
        raise UserError(
            "--use-teacher: the method of this run has no momentum teacher (glmae has); run the same command without it"
        )
    return prefix


def reason_to_drop(name: str) -> str:
    """Why a tensor of a method's state is not read."""
    reasons = (reason for prefix, reason in _DROPPED.items() if name.startswith(prefix))
    return next(reasons, "a part of pretraining that fine-tuning does not use")


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
        plain = EncoderMetadata(spec, method)
    except OSError as e:
        raise UserError(
            f"{path} is a checkpoint of hiendmae pretrain, but there is no {settings_file} beside it; "
            "keep the two in one folder"
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(
            f"{settings_file} is damaged ({printable(e, LONGEST_ERROR)}); restore it or use the run's {ENCODER}"
        ) from e
    exported = path.parent / ENCODER
    if exported.is_file():
        seen = read_metadata(exported)
        if seen.method == method and seen.spec == spec:
            return seen
    return replace(plain, citations=RECIPES[method].citations if method in RECIPES else ())


def at_step(metadata: EncoderMetadata, step: int, teacher: bool) -> EncoderMetadata:
    """Metadata of the student or the teacher in a checkpoint of `step`, from those that `run_metadata` found."""
    notes = tuple(n for n in metadata.notes if n != TEACHER_NOTE) + (TEACHER_NOTE,) * teacher
    training = metadata.training and {**metadata.training, "step": step}
    return replace(metadata, notes=notes, training=training)


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
        told = printable(e, LONGEST_ERROR)
        raise UserError(f"{path} is not a readable encoder file ({told}); download or write it again") from e
