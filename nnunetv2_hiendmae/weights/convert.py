"""A checkpoint of anyone's → an encoder file, once, at the border: what `hiendmae convert` does."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import ConfigDict
from torch import Tensor
from typing_extensions import TypedDict

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable
from nnunetv2_hiendmae.files import ENCODER, SETTINGS, STATE, STEP, check_replaceable, sha256
from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.recipes import FOREIGN, RECIPES
from nnunetv2_hiendmae.schemas import read_as
from nnunetv2_hiendmae.volume_format import CT_SCHEME
from nnunetv2_hiendmae.weights import encoder_file
from nnunetv2_hiendmae.weights.checkpoint_io import check_source, is_weight, read_checkpoint
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata, header_metadata
from nnunetv2_hiendmae.weights.export import EXPORT_KEY, export_encoder
from nnunetv2_hiendmae.weights.export_nnssl import NNSSL_TARGET, export_nnssl
from nnunetv2_hiendmae.weights.find import ForeignEncoder
from nnunetv2_hiendmae.weights.formats import UNKNOWN, UNKNOWN_NOTE
from nnunetv2_hiendmae.weights.hub import local_file, source_name
from nnunetv2_hiendmae.weights.hub_folder import HUB_TARGET, check_hub_folder, write_hub_folder
from nnunetv2_hiendmae.weights.nnssl import find_foreign, has_primus
from nnunetv2_hiendmae.weights.nnunet import NETWORK, is_nnunet_checkpoint, nnunet_metadata
from nnunetv2_hiendmae.weights.report import LoadReport
from nnunetv2_hiendmae.weights.translate import translate_foreign, translate_own

ENCODER_FILE = "encoder"
RUN_CHECKPOINT = "run"
NNUNET_CHECKPOINT = "nnunet"
# of a network that was trained from scratch: none of pretraining
SUPERVISED = "supervised"


class _RunSettings(TypedDict):
    """What is needed of a run's settings."""

    __pydantic_config__ = ConfigDict(extra="allow")
    method: str
    spec: EncoderSpec


_TEACHER_NOTE = "weights of the momentum teacher"


@dataclass(frozen=True)
class Conversion:
    """An encoder out of any file.

    Args:
        format: name of the file's format, "encoder" or "run" for ours, "nnunet" for a fine-tuned network's.
        state: its tensors by our names; unchanged ones are views of the file.
        report: of every tensor of the file, and of the encoder or the exported names.
        path: what was written, None for nothing.
        export_notes: what a program that reads exported names must know.
    """

    format: str
    state: dict[str, Tensor]
    metadata: EncoderMetadata
    report: LoadReport
    path: Path | None = None
    export_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should look at, in sentences."""
        return self.metadata.notes + self.export_notes


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    options: ConvertOptions | None = None,
    *,
    to: str | None = None,
    force: bool = False,
) -> Conversion:
    """Writes the encoder of a checkpoint as an encoder file, under the names of timm, MONAI or nnssl, or as a folder
    for the Hugging Face Hub.

    Takes as much memory as the file's encoder once, through the system's page cache; tensors that change are copied
    one at a time.

    Args:
        to: "timm", "monai", "nnssl" or "hub-folder"; None: an encoder file.
        force: replace an existing output.

    Raises:
        UserError: the file cannot be read or is refused, something is missing, wrong or unknown, or the output exists
            or cannot be written. Nothing is written then.
    """
    output = Path(output)
    source = _checked_source(source, output, to, force)
    done = replace(translate_checkpoint(source, options), path=output)
    if to is not None:
        exports = {NNSSL_TARGET: export_nnssl, HUB_TARGET: partial(write_hub_folder, run_dir=source.parent)}
        export = exports.get(to, partial(export_encoder, to))
        report, notes = export(output, done.state, done.metadata, done.report, new=not force)
        return replace(done, report=report, export_notes=notes)
    if done.format == ENCODER_FILE:
        raise UserError(
            f"{source} is an encoder file already; use it as it is, or give --to timm, monai, nnssl or {HUB_TARGET}"
        )
    encoder_file.save_encoder(output, done.state, done.metadata, new=not force)
    return done


def translate_checkpoint(source: str | Path, options: ConvertOptions | None = None) -> Conversion:
    """The encoder in a file, without writing anything.

    Raises:
        UserError: as `convert_checkpoint`.
    """
    source, options = local_file(source), options or ConvertOptions()
    content, header = read_checkpoint(source)
    try:
        if stored := header_metadata(header, encoder_file.METADATA_KEY, source, content):
            _refuse(options)
            translation = translate_own(content, "", stored.spec)
            return Conversion(ENCODER_FILE, translation.state, stored, translation.report(content, ()))
        if is_run_checkpoint(content):
            return _translate_run(content, source, options)
        if is_nnunet_checkpoint(content) and not has_primus(content):
            return _translate_nnunet(content, source, options)
        return _translate_foreign(content, _exported(content, header, source), source, options)
    except UserError as e:
        raise UserError(str(e) if str(source) in str(e) else f"{source}: {e}") from e
    except ValueError as e:
        told = printable(e, LONGEST_ERROR)
        raise UserError(f"{source}: its tensors make no encoder: {told}; see --num-heads and --img-size") from e


def is_run_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file is the checkpoint of `hiendmae pretrain`, whatever its name."""
    step, state = content.get(STEP), content.get(STATE)
    return isinstance(step, int) and isinstance(state, Mapping) and any(is_weight(k, v) for k, v in state.items())


def _translate_run(content: Mapping[str, Any], source: Path, options: ConvertOptions) -> Conversion:
    teacher = options.use_teacher
    _refuse(replace(options, use_teacher=False))
    metadata = _run_metadata(source)
    # the names of encoder files stand behind it
    prefix = "teacher_encoder." if teacher else "encoder."
    if teacher and not any(name.startswith(prefix) for name in content[STATE] if isinstance(name, str)):
        raise UserError(
            "--use-teacher: the method of this run has no momentum teacher (glmae has); run the same command without it"
        )
    translation = translate_own(content[STATE], prefix, metadata.spec)
    metadata = replace(
        metadata,
        notes=tuple(n for n in metadata.notes if n != _TEACHER_NOTE) + (_TEACHER_NOTE,) * teacher,
        training=metadata.training and {**metadata.training, "step": content[STEP]},
        source=source_name(source),
        source_sha256=sha256(source),
    )
    return Conversion(RUN_CHECKPOINT, translation.state, metadata, translation.report(content, (STATE,)))


def _translate_nnunet(content: Mapping[str, Any], source: Path, options: ConvertOptions) -> Conversion:
    _refuse(options)
    metadata = nnunet_metadata(content, source, SUPERVISED)
    translation = translate_own(content[NETWORK], "encoder.", metadata.spec)
    return Conversion(NNUNET_CHECKPOINT, translation.state, metadata, translation.report(content, (NETWORK,)))


def _run_metadata(source: Path) -> EncoderMetadata:
    """What the run of a checkpoint knows about its encoder: from the encoder file beside it, which says what images it
    saw, or from its settings alone."""
    settings_file, exported = source.with_name(SETTINGS), source.with_name(ENCODER)
    mend = f"keep it beside {source}, a checkpoint of hiendmae pretrain, or use the run's {ENCODER}"
    settings = read_as(settings_file, _RunSettings, mend)
    method, spec = settings["method"], settings["spec"]
    metadata = EncoderMetadata(spec, method, citations=RECIPES[method].citations if method in RECIPES else ())
    seen = encoder_file.read_metadata(exported) if exported.is_file() else metadata
    return seen if (seen.method, seen.spec) == (method, spec) else metadata


def _translate_foreign(
    content: Mapping[str, Any], exported: EncoderMetadata | None, source: Path, options: ConvertOptions
) -> Conversion:
    if exported:
        # our own export says what its names cannot
        _refuse(options)
        options = replace(options, num_heads=exported.spec.num_heads, img_size=exported.spec.img_size)
    found, primus = find_foreign(content, options)
    said, options = options, replace(options, axes=options.axes or found.format.axes)
    translation, spec, formula = translate_foreign(found, primus.options(said) if primus else options)
    if primus and primus.order:
        spec = translation.permute_axes(spec, primus.order, "axes that its program transposed put back")
    if exported:
        told = {k: getattr(exported.spec, k) for k in ("norm_eps", "taps", "pos_embed", "layer_scale")}
        metadata = replace(exported, spec=spec.with_(**told))
    elif primus:
        metadata = primus.metadata(spec, said)
    else:
        metadata = _foreign_metadata(found, spec, options, formula)
    if metadata.source is None:
        # an export of ours goes on naming the file that its encoder was converted from
        metadata = replace(metadata, source=source_name(source), source_sha256=sha256(source))
    return Conversion(found.format.name, translation.state, metadata, translation.report(content, found.path))


def _exported(content: Mapping[str, Any], header: Mapping[str, str], source: Path) -> EncoderMetadata | None:
    """What an export of ours says of itself, in the header of its file or beside its tensors."""
    inside = content.get(EXPORT_KEY)
    if isinstance(inside, str):
        weights = content.get(NETWORK)
        state = {k: v for k, v in weights.items() if is_weight(k, v)} if isinstance(weights, Mapping) else {}
        return header_metadata({EXPORT_KEY: inside}, EXPORT_KEY, source, state)
    return header_metadata(header, EXPORT_KEY, source, content)


def _refuse(options: ConvertOptions) -> None:
    """Refuses what is said about a file that says it itself (UserError)."""
    if said := options.said():
        raise UserError(f"{', '.join(said)}: it is a file of ours, which says itself what it is; leave that out")


def _foreign_metadata(
    found: ForeignEncoder, spec: EncoderSpec, options: ConvertOptions, formula: bool
) -> EncoderMetadata:
    """What is known about an encoder that another program wrote, without its file; `formula`: its positions were the
    sin-cos table of their grid. Refuses another method than the format's (UserError)."""
    entry, method, volume = found.format, options.method, found.format.seen
    if method and entry.method and method != entry.method:
        raise UserError(f"--method {method}: a {entry.name} file is of method {entry.method}; leave it out")
    if volume.window_hu is not None:
        # names decide which dataset fits: those of several channels nobody knows
        names = ("CT",) if spec.in_channels == 1 else ()
        volume = replace(volume, normalization_schemes=(CT_SCHEME,) * spec.in_channels, channel_names=names)
    cited = RECIPES[entry.method].citations if entry.method else ()
    notes = _foreign_notes(found, spec, options, formula)
    method = entry.method or method or entry.name
    return EncoderMetadata(spec, method, volume, citations=cited, licence=entry.licence, notes=notes)


def _foreign_notes(found: ForeignEncoder, spec: EncoderSpec, options: ConvertOptions, formula: bool) -> tuple[str, ...]:
    """What a user should look at, in sentences."""
    entry, size, width = found.format, " ".join(map(str, spec.img_size)), spec.embed_dim
    xyz, guessed = options.axes == "xyz", options.img_size is None
    released = f"{entry.name} encoders of width {width} that were released have"
    heads, depth = entry.sizes.get(width, (spec.num_heads, spec.depth))
    # what the format's program, data-parallel training and compilation put before names
    own_prefix = re.sub(r"module\.|_orig_mod\.", "", found.prefix).removesuffix(entry.prefix)
    theirs = ", although those of its authors are (x, y, z)" if entry.axes == "xyz" else ""
    # sentence → whether it is true
    notes = {
        "arrays were (x, y, z) in the source, weights are permuted to (z, y, x) = D, H, W": xyz,
        f"the order of axes is that of the source{theirs}": not xyz,
        f"{entry.name} weights do not say how they were pretrained: {FOREIGN.trainer} fine-tunes them, by our recipe "
        "for weights of other programs; --method chooses that of a method of ours": {entry.method, options.method}
        == {None},
        f"the crop {size} was read off the sin-cos positions, which are those of its grid {spec.grid}": (
            guessed and formula and len(set(spec.grid)) > 1
        ),
        f"the grid was taken as a cube, the crop as {size}; --img-size says otherwise": guessed and not formula,
        "positions are not the sin-cos table that this method has: they are kept as they are": (
            not entry.library and not formula
        ),
        f"{spec.depth} blocks: {released} {depth}; was one lost?": spec.depth != depth,
        f"{spec.num_heads} heads: {released} {heads}": spec.num_heads != heads,
        UNKNOWN_NOTE: entry.seen.orientation == UNKNOWN,
        f"what its {spec.in_channels} input channels were is not known: a dataset must have as many, in that order": (
            spec.in_channels > 1
        ),
        f"the encoder's names had the prefix {printable(found.prefix)}": bool(own_prefix),
        entry.lookalikes: bool(entry.lookalikes) and options.format is None,
        _TEACHER_NOTE: found.path[-1:] == ("teacher",),
    }
    return tuple(note for note, applies in notes.items() if applies)


def _checked_source(source: str | Path, output: Path, to: str | None, force: bool) -> Path:
    """The file to read, after it is known that the output may be written."""
    is_source = output.exists() and Path(source).exists() and Path(source).samefile(output)
    if to == HUB_TARGET:
        check_hub_folder(output, force)
    elif output.is_dir():
        raise UserError(f"{output} is a folder; give a file, e.g. -o {quote(str(output / 'encoder.safetensors'))}")
    check_replaceable(output)
    if output.exists() and not (force or is_source):
        raise UserError(f"{output} exists already; give another -o, or --force to replace it")
    source = local_file(source)
    check_source(source)
    if is_source or (output.exists() and source.samefile(output)):
        raise UserError(f"the output {output} is the input; give another -o")
    return source
