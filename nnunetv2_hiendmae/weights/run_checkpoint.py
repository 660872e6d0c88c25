"""The checkpoint of a pretraining run of ours, which lies beside the run's settings."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.weights.checkpoint_io import is_weight
from nnunetv2_hiendmae.weights.encoder_file import read_metadata
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LONGEST_ERROR, printable

# files of a run folder, and the keys of its checkpoint
SETTINGS = "run.json"
ENCODER = "encoder.safetensors"
STATE, STEP = "method", "step"
# a method's encoder is under the first, with the names of encoder files; its momentum teacher under the second
STUDENT_PREFIX, TEACHER_PREFIX = "encoder.", "teacher_encoder."
TEACHER_NOTE = "weights of the momentum teacher"


def is_run_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file is `checkpoint_latest.pth` of `hiendmae pretrain`, whatever its name."""
    state = content.get(STATE)
    return (
        isinstance(content.get(STEP), int)
        and isinstance(state, Mapping)
        and any(is_weight(k, v) for k, v in state.items())
    )


def run_metadata(path: Path, step: int, teacher: bool) -> EncoderMetadata:
    """What the run of a checkpoint knows about its student or teacher at `step`: from the encoder file beside it, which
    says what images it saw, or from its settings alone.

    Raises:
        UserError: there are no settings beside it, or they are damaged.
    """
    settings_file = path.parent / SETTINGS
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        method, spec = settings["method"], EncoderSpec.from_dict(settings["spec"])
        metadata = EncoderMetadata(spec, method, citations=RECIPES[method].citations if method in RECIPES else ())
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
        if (seen.method, seen.spec) == (method, spec):
            metadata = seen
    notes = tuple(n for n in metadata.notes if n != TEACHER_NOTE) + (TEACHER_NOTE,) * teacher
    return replace(metadata, notes=notes, training=metadata.training and {**metadata.training, "step": step})
