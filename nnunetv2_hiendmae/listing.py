"""What `hiendmae methods`, `presets` and `inspect` print."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hiendmae.architectures import PRESETS, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.run_files import CHECKPOINT, ENCODER, SETTINGS, read_settings
from nnunetv2_hiendmae.weights import ConvertOptions, is_encoder_file, own, translate_checkpoint
from nnunetv2_hiendmae.weights.finding import find
from nnunetv2_hiendmae.weights.foreign import read_checkpoint
from nnunetv2_hiendmae.weights.report import LoadReport, printable


def list_methods(as_json: bool = False) -> str:
    """Every pretraining method with its options, recipe and source."""
    methods = {name: _method(name) for name in METHODS}
    if as_json:
        return json.dumps(methods, indent=2)
    blocks = []
    for name, about in methods.items():
        lines = [f"{name}: {about['title']} ({about['source']})"]
        for part in _PARTS:
            noted = (f" ({about['notes'][k]})" if k in about["notes"] else "" for k in about[part])
            pairs = zip(about[part].items(), noted, strict=True)
            lines.append(f"  {part}: " + ", ".join(f"{k}={v}{note}" for (k, v), note in pairs))
        blocks.append("\n".join(lines))
    notes = (
        "options are changed with --set key=value; None means derived from the encoder. batch_size counts samples per "
        "optimizer step (crops, unless noted), lr is AdamW's peak, spacing_mm is D H W, window_hu becomes [0, 1]."
    )
    return "\n\n".join([*blocks, notes])


_PARTS = ("options", "recipe", "volumes")


def _method(name: str) -> dict[str, Any]:
    method, volumes = METHODS[name], RECIPES[name]
    return {
        "title": method.title,
        "source": method.source,
        "options": method.options(),
        "recipe": vars(method.recipe),
        "volumes": {"spacing_mm": volumes.volume.spacing_mm, "window_hu": volumes.volume.window_hu},
        "notes": dict(method.notes),
        "citations": list(method.citations),
    }


def list_presets(as_json: bool = False) -> str:
    """Every encoder preset with its size."""
    rows = {name: {**spec.to_dict(), "parameters": _parameters(spec)} for name, spec in PRESETS.items()}
    if as_json:
        return json.dumps(rows, indent=2)
    sizes = f"{'width':>6} {'depth':>6} {'heads':>6} {'parameters':>12}"
    lines = [f"{'preset':15} {'crop':>13} {'patch':>9} {'tokens':>7} {sizes}"]
    for name, row in rows.items():
        crop, patch = ("x".join(map(str, row[k])) for k in ("img_size", "patch_size"))
        sizes = f"{row['embed_dim']:>6} {row['depth']:>6} {row['num_heads']:>6} {row['parameters']:>12,}"
        lines.append(f"{name:15} {crop:>13} {patch:>9} {PRESETS[name].num_tokens:>7} {sizes}")
    return "\n".join(lines)


def _parameters(spec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_encoder(spec).parameters())


def describe_file(path: Path, options: ConvertOptions | None = None, *, as_json: bool = False) -> str:
    """What an encoder file, a run's checkpoint, a run folder or a checkpoint of another program is, and whether it
    would load; its content decides, not its name. Nothing in a file is executed.

    Args:
        options: what the user says about the file, as for `hiendmae convert`.

    Raises:
        UserError: no such file, damaged or refused, or of no known kind.
    """
    about = _describe(Path(path), options or ConvertOptions())
    if as_json:
        return json.dumps({k: v.to_dict() if isinstance(v, LoadReport) else v for k, v in about.items()}, indent=2)
    return "\n".join(f"{k}: {_text(v)}" for k, v in about.items())


def _text(value: Any) -> str:
    if isinstance(value, LoadReport):
        return value.text()
    return json.dumps(value) if isinstance(value, dict | list) else printable(value, None)


def _describe(path: Path, options: ConvertOptions) -> dict[str, Any]:
    if path.is_dir():
        return _describe_folder(path, options)
    if is_encoder_file(path):
        translated = translate_checkpoint(path, options)
        about = {"kind": "encoder file", "loads": translated.report.summary(), "sha256": sha256(path)}
        return {**about, **json.loads(translated.metadata.to_json())}
    content, _ = read_checkpoint(path)
    if own.is_run_checkpoint(content):
        return _describe_run(path, content, options)
    return _describe_foreign(path, content, options)


def _describe_folder(path: Path, options: ConvertOptions) -> dict[str, Any]:
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


def _describe_run(path: Path, content: dict[str, Any], options: ConvertOptions) -> dict[str, Any]:
    tensors = [t for t in content[own.STATE].values() if isinstance(t, torch.Tensor)]
    about = {
        "kind": "pretraining checkpoint",
        "step": content[own.STEP],
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors),
    }
    try:
        translated = translate_checkpoint(path, options)
    except UserError as e:
        return {**about, "loads": "no", "needed": str(e)}
    return {
        **about,
        "loads": translated.report.summary(),
        **json.loads(translated.metadata.to_json()),
        "next": f"continue the run with --c; its encoder is {path.parent / ENCODER}",
    }


def _describe_foreign(path: Path, content: dict[str, Any], options: ConvertOptions) -> dict[str, Any]:
    try:
        found = find(content, options.format, options.use_teacher)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    about = {
        "kind": "foreign checkpoint",
        "format": found.format.name,
        "title": found.format.title,
        "container": found.container or "none",
        "tensors": len(found.state),
        "axes": options.axes or found.format.axes,
    }
    try:
        translated = translate_checkpoint(path, options)
    except UserError as e:
        return {**about, "loads": "no", "needed": str(e)}
    return {
        **about,
        "loads": translated.report.summary(),
        "report": translated.report,
        **json.loads(translated.metadata.to_json()),
        "next": shlex.join(["hiendmae", "convert", str(path), *options.arguments(), "-o", ENCODER]),
    }
