"""A folder for the Hugging Face Hub: encoder file, model card, and what the file says as JSON; without names of cases
and without paths."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from torch import Tensor

from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.files import ENCODER, LOG, scratch_folder, sha256, telling_disk_errors, write_text
from nnunetv2_hiendmae.recipes import MAIN_METHODS
from nnunetv2_hiendmae.schemas import validated
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata, save_encoder
from nnunetv2_hiendmae.weights.report import LoadReport

HUB_TARGET = "hub-folder"
# the Hub shows the card, and counts downloads by the configuration
CARD, CONFIG = "README.md", "config.json"
FILES = (ENCODER, CONFIG, CARD)
_OF_GIT = (".git", ".gitattributes", ".gitignore")
# the Hub's names of licences
_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
# of log.jsonl
_Line = dict[str, FiniteFloat]
_MEASURES = ("loss", "probe_dice", "probe_rank")
_ABSOLUTE = r"(?:file:/*|~|[A-Za-z]:)?[/\\]"
# in a sentence: no part of a URL, of a date or of "and/or"
_PATH = re.compile(rf"(?<![\w:/\\.~-]){_ABSOLUTE}(?:[^/\\\s]+[/\\])+")


def check_hub_folder(folder: Path, force: bool) -> None:
    """Refuses what a folder for the Hub must not replace, or would take along (UserError)."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --to {HUB_TARGET} writes a folder, give another -o")
    others = {p.name for p in folder.iterdir()} - {*FILES, *_OF_GIT} if folder.is_dir() else set()
    if force and others:
        told = f"{folder} holds {printable(some(sorted(others)))}, which would be uploaded too"
        raise UserError(f"{told}; give the name of a new folder to -o")


def write_hub_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    metadata: EncoderMetadata,
    report: LoadReport,
    *,
    run_dir: Path,
    new: bool = False,
) -> tuple[LoadReport, tuple[str, ...]]:
    """Writes what `export.export_encoder` writes for other programs, as a folder that is ready to upload; a new one
    appears whole, of an existing one each file is replaced.

    Args:
        run_dir: where the source lies; its losses come from the log that lies there too.

    Raises:
        UserError: the folder cannot be written.
    """
    public = published(metadata)
    with scratch_folder(folder.absolute().parent) as scratch:
        save_encoder(scratch / ENCODER, state, public)
        about = {"library_name": "nnunetv2_hiendmae", **json.loads(public.to_json())}
        write_text(scratch / CONFIG, json.dumps(about, indent=2) + "\n")
        card = model_card(public, sum(t.numel() for t in state.values()), sha256(scratch / ENCODER), run_dir)
        write_text(scratch / CARD, card)
        with telling_disk_errors(folder):
            if new:
                scratch.rename(folder)
            else:
                folder.mkdir(exist_ok=True)
                for name in FILES:
                    (scratch / name).replace(folder / name)
    return report, (f"read {folder / CARD} before you upload it: licence and data are yours to state",)


def published(metadata: EncoderMetadata) -> EncoderMetadata:
    """Metadata without names of cases, and with the last part alone of every path."""
    about = json.loads(metadata.to_json())
    probe = (about["training"] or {}).get("probe")
    if isinstance(probe, dict):
        about["training"]["probe"] = {k: len(v) if isinstance(v, list) else v for k, v in probe.items()}
    kept = {"citations": about.pop("citations")}
    return EncoderMetadata.from_json(json.dumps(_without_paths(about) | kept))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if re.match(_ABSOLUTE, value):
        return re.split(r"[/\\]", value)[-1]
    return _PATH.sub("", value)


def model_card(metadata: EncoderMetadata, parameters: int, digest: str, run_dir: Path) -> str:
    """README.md of a repository on the Hub: YAML that the Hub reads, then Markdown.

    Args:
        digest: sha256 of the encoder file.
    """
    from huggingface_hub import ModelCardData

    about = json.loads(metadata.to_json())
    training = about["training"] or {}
    measured = {k: f"{v:.6g}" for k, v in _measures(run_dir, training.get("step")).items()}
    losses = {k: v for k, v in measured.items() if k.startswith("loss")}
    start, probe = training.pop("start", None), training.pop("probe", None)
    if isinstance(start, dict):
        training["started from"] = f"{start.get('source')}, sha256 {start.get('sha256')}"
    known = metadata.licence.lower() in _LICENCES
    ours = ["masked-autoencoder"] if metadata.method in MAIN_METHODS else []
    origin = re.fullmatch(r"hf://([^@]+)@.*", metadata.source or "")
    data = ModelCardData(
        license=metadata.licence.lower() if known else "other",
        license_name=None if known else "see-model-card",
        library_name="nnunetv2_hiendmae",
        tags=["nnunet", "medical", "3d", metadata.spec.kind, metadata.method, *ours],
        pipeline_tag="image-feature-extraction",
        base_model=origin and origin[1],
    )
    volume = {
        "spacing (D H W)": _sized(about["spacing_mm"], "mm") or "of each image or dataset",
        "window": _sized(about["window_hu"], "HU", " to ") or "none",
        **{key: about[key] for key in ("intensity_offset", "intensity_scale", "normalization_schemes")},
        **{key: about[key] for key in ("interpolation", "channel_names", "image_reader_writer", "orientation")},
    }
    source = {"source": metadata.source, "sha256 of the source": metadata.source_sha256}
    parts = {
        "Use": "In nnU-Net v2 with its plugin nnunetv2_hiendmae, and ORG/REPO for the name of this repository:\n\n"
        "```bash\nhiendmae plan -d DATASET -w hf://ORG/REPO    # prints what to run next\n```",
        "Encoder": _table({"method": metadata.method, "parameters": parameters, **about["spec"]}),
        "Images": _table(volume),
        "Training": _table({**training, **source}),
        "Losses": _table(losses, "mean of the last epoch"),
        "Probe": _table(probe or {k: v for k, v in measured.items() if k not in losses}),
        "Notes": "\n".join(f"- {_cell(note, None)}" for note in metadata.notes),
        "Licence": _cell(metadata.licence, None),
        "Citation": "\n\n".join(f"````bibtex\n{_lines(entry)}\n````" for entry in metadata.citations),
        "Checksum": f"sha256 of `{ENCODER}`: `{digest}`",
    }
    text = "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items() if part)
    title = f"{_cell(metadata.method)}: a {metadata.spec.kind} encoder for 3D medical images"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n"


def _measures(run_dir: Path, steps: object) -> dict[str, float]:
    """Means of losses and of what a probe found, over the last epoch of the first `steps` steps in a run's log."""
    lines: list[_Line] = []
    path = run_dir / LOG
    for text in reversed(path.read_bytes().splitlines()) if path.is_file() and isinstance(steps, int) else ():
        # a kill may cut the last line
        with suppress(ValueError):
            line = validated(_Line, text)
            if lines and line.get("epoch") != lines[0].get("epoch"):
                break
            if 0 <= line.get("step", -1) < steps:
                lines.append(line)
    values = {key: [line[key] for line in lines if key in line] for line in lines for key in line}
    return {k: sum(found) / len(found) for k, found in values.items() if k.startswith(_MEASURES)}


def _sized(numbers: list[float] | None, unit: str, separator: str = " × ") -> str:
    return f"{separator.join(f'{n:g}' for n in numbers)} {unit}" if numbers else ""


def _table(rows: Mapping[str, Any], title: str = "") -> str:
    """Two columns; nothing that is not known. A text of a file that nobody vouches for makes no Markdown."""
    told = {key: _cell(value) for key, value in rows.items() if value not in (None, "", [], {})}
    lines = [f"| {_cell(key)} | {value} |" for key, value in told.items()]
    return "\n".join([f"| | {title} |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any, most: int | None = 400) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    elif isinstance(value, dict):
        value = ", ".join(f"{key} {inner}" for key, inner in value.items())
    return re.sub(r"([|<>`\[\]*_\\])", r"\\\1", printable(value, most))


def _lines(text: str) -> str:
    return "\n".join(printable(line, None) for line in text.splitlines()).replace("````", "")
