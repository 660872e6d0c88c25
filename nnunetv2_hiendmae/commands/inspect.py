"""`hiendmae inspect`."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_hiendmae.commands.arguments import add_json, add_options, from_arguments
from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.files import (
    CHECKPOINT,
    ENCODER,
    PROBE_ENCODER,
    SETTINGS,
    STATE,
    STEP,
    read_settings,
    refuse_folder,
    sha256,
)
from nnunetv2_hiendmae.options.commands import ConvertOptions

if TYPE_CHECKING:
    from nnunetv2_hiendmae.weights import EncoderMetadata, LoadReport

HELP = "say what a file is and whether it would load: encoder file, checkpoint of ours or of other programs, run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="file or run folder, or hf://ORG/REPO[/FILE]")
    parser.add_argument("--check", action="store_true", help="exit with 2 if the file would not load")
    add_options(parser, ConvertOptions)


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.weights.hub import local_file

    options, file = from_arguments(ConvertOptions, args), local_file(args.file)
    about = (_describe_folder if file.is_dir() else _describe)(file, options)
    if args.json:
        print(json.dumps(about, default=lambda report: report.to_dict(), indent=2))
    else:
        print("\n".join(f"{k}: {_text(v)}" for k, v in about.items()))
    if args.check and any(part.get("loads") == "no" for part in (about, *about.values()) if isinstance(part, dict)):
        raise UserError(f"{args.file} would not load: it says above what is needed")


def _text(value: Any) -> str:
    from nnunetv2_hiendmae.weights.report import LoadReport

    if isinstance(value, LoadReport):
        return value.text()
    return json.dumps(value) if isinstance(value, dict | list) else printable(value, None)


def _describe_folder(path: Path, options: ConvertOptions) -> dict[str, Any]:
    if not (path / SETTINGS).is_file():
        refuse_folder(path)
    about = {"kind": "run folder", "settings": read_settings(path)}
    if (path / CHECKPOINT).exists():
        about["checkpoint"] = _describe(path / CHECKPOINT, options)
    for name, file in (("encoder", ENCODER), ("encoder_probe", PROBE_ENCODER)):
        if (path / file).exists():
            about[name] = _describe(path / file, ConvertOptions())
    return about


def _describe(path: Path, options: ConvertOptions) -> dict[str, Any]:
    """What a file is, by its content and not its name, and whether it would load; nothing in it is executed."""
    from nnunetv2_hiendmae.weights.header import look_into

    # imports no torch
    if path.is_file() and options == ConvertOptions() and (found := look_into(path)):
        return _encoder_file(*found)
    from nnunetv2_hiendmae.weights.adaptation_plan import PLAN
    from nnunetv2_hiendmae.weights.checkpoint_io import read_checkpoint
    from nnunetv2_hiendmae.weights.convert import is_run_checkpoint, translate_checkpoint
    from nnunetv2_hiendmae.weights.metadata import METADATA_KEY
    from nnunetv2_hiendmae.weights.nnunet import TRAINER, is_nnunet_checkpoint

    content, header = read_checkpoint(path)
    if METADATA_KEY in header:
        translated = translate_checkpoint(path, options)
        return _encoder_file(translated.metadata, translated.report, sha256(path))
    if is_run_checkpoint(content):
        about, next_step = _own(path, content)
    elif is_nnunet_checkpoint(content) and PLAN not in content:
        about = {"kind": "nnU-Net checkpoint", "trainer": str(content[TRAINER])}
        next_step = _convert(path)
    else:
        about, next_step = _foreign(path, content, options)
    try:
        translated = translate_checkpoint(path, options)
    except UserError as e:
        return {**about, "loads": "no", "needed": str(e)}
    about |= {
        "loads": translated.report.summary(),
        **({} if is_run_checkpoint(content) else {"report": translated.report}),
    }
    return {**about, **json.loads(translated.metadata.to_json()), "next": next_step}


def _encoder_file(metadata: "EncoderMetadata", report: "LoadReport", digest: str) -> dict[str, Any]:
    about = {"kind": "encoder file", "loads": report.summary(), "sha256": digest}
    return {**about, **json.loads(metadata.to_json())}


def _own(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a run's checkpoint is, and what to do with it."""
    import torch

    tensors = [t for t in content[STATE].values() if isinstance(t, torch.Tensor)]
    about = {"kind": "pretraining checkpoint", "step": content[STEP], "tensors": len(tensors)}
    about["parameters"] = sum(t.numel() for t in tensors)
    return about, f"continue the run with --c; its encoder is {path.parent / ENCODER}"


def _foreign(path: Path, content: dict[str, Any], options: ConvertOptions) -> tuple[dict[str, Any], str]:
    """What a checkpoint of another program is, and what to do with it."""
    from nnunetv2_hiendmae.weights.nnssl import find_foreign

    try:
        found, _ = find_foreign(content, options)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    about = {
        "kind": "foreign checkpoint",
        "format": found.format.name,
        "title": found.format.title,
        "container": ".".join(found.path) or "none",
        "tensors": len(found.state),
        "axes": options.axes or found.format.axes,
    }
    return about, _convert(path, *options.arguments())


def _convert(path: Path, *said: str) -> str:
    """The command that makes an encoder file of it."""
    from nnunetv2_hiendmae.weights.hub import hub_name

    return shlex.join(["hiendmae", "convert", hub_name(path) or str(path), *said, "-o", ENCODER])
