"""`hiendmae inspect`."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.commands.arguments import add_json, add_options, from_arguments
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import ConvertOptions

FOREIGN = "foreign checkpoint"
HELP = "say what a file is and whether it would load: encoder file, checkpoint of ours or of other programs, run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("file", type=Path, metavar="FILE")
    add_options(parser, ConvertOptions)


def run(args: argparse.Namespace) -> None:
    print(describe_file(args.file, from_arguments(ConvertOptions, args), as_json=args.json))


def describe_file(path: Path, options: ConvertOptions, *, as_json: bool = False) -> str:
    """What an encoder file, a run's checkpoint, a run folder or a checkpoint of another program is, and whether it
    would load; its content decides, not its name. Nothing in a file is executed.

    Args:
        options: what the user says about the file, as for `hiendmae convert`.

    Raises:
        UserError: no such file, damaged or refused, or of no known kind.
    """
    from nnunetv2_hiendmae.weights.report import LoadReport

    about = _describe_folder(path, options) if path.is_dir() else _describe(path, options)
    if as_json:
        return json.dumps({k: v.to_dict() if isinstance(v, LoadReport) else v for k, v in about.items()}, indent=2)
    return "\n".join(f"{k}: {_text(v)}" for k, v in about.items())


def _text(value: Any) -> str:
    from nnunetv2_hiendmae.weights.report import LoadReport, printable

    if isinstance(value, LoadReport):
        return value.text()
    return json.dumps(value) if isinstance(value, dict | list) else printable(value, None)


def _describe_folder(path: Path, options: ConvertOptions) -> dict[str, Any]:
    from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, SETTINGS, read_settings

    if not (path / SETTINGS).is_file():
        raise UserError(
            f"{path} is not a run folder (no {SETTINGS}); give an encoder file, a checkpoint or a run folder"
        )
    about = {"kind": "run folder", "settings": read_settings(path)}
    if (path / CHECKPOINT).exists():
        about["checkpoint"] = _describe(path / CHECKPOINT, options)
    if (path / ENCODER).exists():
        about["encoder"] = _describe(path / ENCODER, ConvertOptions())
    return about


def _describe(path: Path, options: ConvertOptions) -> dict[str, Any]:
    from nnunetv2_hiendmae.files import sha256
    from nnunetv2_hiendmae.weights import is_encoder_file, run_checkpoint, translate_checkpoint
    from nnunetv2_hiendmae.weights.checkpoint_io import read_checkpoint

    if is_encoder_file(path):
        translated = translate_checkpoint(path, options)
        about = {"kind": "encoder file", "loads": translated.report.summary(), "sha256": sha256(path)}
        return {**about, **json.loads(translated.metadata.to_json())}
    content, _ = read_checkpoint(path)
    about, next_step = (_run if run_checkpoint.is_run_checkpoint(content) else _foreign)(path, content, options)
    try:
        translated = translate_checkpoint(path, options)
    except UserError as e:
        return {**about, "loads": "no", "needed": str(e)}
    about["loads"] = translated.report.summary()
    if about["kind"] == FOREIGN:
        about["report"] = translated.report
    return {**about, **json.loads(translated.metadata.to_json()), "next": next_step}


def _run(path: Path, content: dict[str, Any], _: ConvertOptions) -> tuple[dict[str, Any], str]:
    """What a run's checkpoint is, and what to do with it."""
    import torch

    from nnunetv2_hiendmae.weights import run_checkpoint

    tensors = [t for t in content[run_checkpoint.STATE].values() if isinstance(t, torch.Tensor)]
    about = {
        "kind": "pretraining checkpoint",
        "step": content[run_checkpoint.STEP],
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors),
    }
    return about, f"continue the run with --c; its encoder is {path.parent / run_checkpoint.ENCODER}"


def _foreign(path: Path, content: dict[str, Any], options: ConvertOptions) -> tuple[dict[str, Any], str]:
    """What a checkpoint of another program is, and what to do with it.

    Raises:
        UserError: it is of no known kind.
    """
    from nnunetv2_hiendmae.weights import run_checkpoint
    from nnunetv2_hiendmae.weights.formats import find_encoder

    try:
        found = find_encoder(content, options)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    about = {
        "kind": FOREIGN,
        "format": found.format.name,
        "title": found.format.title,
        "container": ".".join(found.path) or "none",
        "tensors": len(found.state),
        "axes": options.axes or found.format.axes,
    }
    return about, shlex.join(["hiendmae", "convert", str(path), *options.arguments(), "-o", run_checkpoint.ENCODER])
