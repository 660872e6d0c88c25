"""A checkpoint of anyone's → an encoder file, once, at the border: what `hiendmae convert` does."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import check_replaceable, sha256
from nnunetv2_hiendmae.weights import own
from nnunetv2_hiendmae.weights.axes import AXES
from nnunetv2_hiendmae.weights.encoder_file import save_encoder
from nnunetv2_hiendmae.weights.export import export_names, export_notes, exported_report, write_exported
from nnunetv2_hiendmae.weights.finding import find, is_weight
from nnunetv2_hiendmae.weights.foreign import check_plain, read_checkpoint
from nnunetv2_hiendmae.weights.formats import METHOD_NAMES
from nnunetv2_hiendmae.weights.layouts import Hints
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.provenance import foreign_metadata
from nnunetv2_hiendmae.weights.report import LONGEST_ERROR, LoadReport, TensorRecord, printable
from nnunetv2_hiendmae.weights.translate import Draft, account_for_rest, check_state, finish, translate_found

ENCODER_FILE = "encoder"
RUN_CHECKPOINT = "run"


@dataclass(frozen=True)
class ConvertOptions:
    """What a user may say about a file; None: found out, or as the format usually is.

    Args:
        format: one of `formats.FORMAT_NAMES`.
        num_heads: attention heads.
        img_size: crop (D, H, W) in voxels that the positions belong to.
        axes: order of the file's arrays, one of `axes.AXES`; "xyz" is permuted.
        use_teacher: take the momentum teacher.
        method: pretraining method, where the format does not tell.

    Raises:
        UserError: a value is unknown.
    """

    format: str | None = None
    num_heads: int | None = None
    img_size: tuple[int, int, int] | None = None
    axes: str | None = None
    use_teacher: bool = False
    method: str | None = None

    def __post_init__(self):
        if self.axes not in (None, *AXES):
            raise UserError(f"--axes {self.axes} is unknown, needed one of {', '.join(AXES)}")
        if self.method not in (None, *METHOD_NAMES):
            raise UserError(f"--method {self.method} is unknown, needed one of {', '.join(METHOD_NAMES)}")
        if self.num_heads is not None and self.num_heads < 1:
            raise UserError(f"--num-heads is {self.num_heads}, needed at least 1")
        if self.img_size is not None and (len(self.img_size) != 3 or min(self.img_size) < 1):
            raise UserError(f"--img-size is {self.img_size}, needed three positive numbers D H W")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ConvertOptions":
        """From what a command line said, other arguments left aside.

        Raises:
            UserError: a value is unknown.
        """
        said = {f.name: arguments[f.name] for f in fields(cls)}
        return cls(**{**said, "img_size": said["img_size"] and tuple(said["img_size"])})

    def said(self) -> dict[str, Any]:
        """What was said, by the option of the command line."""
        values = {f"--{f.name.replace('_', '-')}": getattr(self, f.name) for f in fields(self)}
        return {option: value for option, value in values.items() if value not in (None, False)}

    def arguments(self) -> list[str]:
        """`said` as on a command line."""
        words = []
        for option, value in self.said().items():
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [option, *map(str, values)]
        return words


@dataclass(frozen=True)
class Translated:
    """An encoder out of any file.

    Args:
        format: name of the file's format, "encoder" or "run" for ours.
        state: its tensors; unchanged ones are views of the file.
        report: of every tensor of the file and of the encoder.
    """

    format: str
    state: dict[str, Tensor]
    metadata: EncoderMetadata
    report: LoadReport


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` wrote.

    Args:
        notes: those of the metadata, and what a reader of an exported file must know.
    """

    path: Path
    format: str
    metadata: EncoderMetadata
    report: LoadReport
    notes: tuple[str, ...]


def convert_checkpoint(
    source: Path, output: Path, options: ConvertOptions | None = None, *, to: str | None = None, force: bool = False
) -> Conversion:
    """Writes the encoder of a checkpoint as an encoder file, or under the names of timm or MONAI.

    Takes as much memory as the file's encoder once, through the system's page cache; tensors that change are copied
    one at a time.

    Args:
        to: "timm" or "monai"; None: an encoder file.
        force: replace an existing output.

    Raises:
        UserError: the file cannot be read or is refused, something is missing, wrong or unknown, or the output exists
            or cannot be written. Nothing is written then.
    """
    source, output = Path(source), Path(output)
    _check_output(source, output, force)
    translated = translate_checkpoint(source, options)
    metadata, report = translated.metadata, translated.report
    notes = metadata.notes
    if to is not None:
        tensors, records = export_names(to, translated.state, metadata)
        report = exported_report(report, records)
        write_exported(output, tensors, metadata)
        notes += export_notes(to, metadata)
    elif translated.format == ENCODER_FILE:
        raise UserError(f"{source} is an encoder file already; use it as it is, or give --to timm or --to monai")
    else:
        save_encoder(output, translated.state, metadata)
    return Conversion(output, translated.format, metadata, report, notes)


def translate_checkpoint(source: Path, options: ConvertOptions | None = None) -> Translated:
    """The encoder in a file, without writing anything.

    Raises:
        UserError: as `convert_checkpoint`.
    """
    source, options = Path(source), options or ConvertOptions()
    content, header = read_checkpoint(source)
    try:
        stored = own.header_metadata(header, source)
        if stored is not None:
            return _translate_encoder_file(content, stored, options)
        if own.is_run_checkpoint(content):
            return _translate_run(content, source, options)
        return _translate_foreign(content, own.export_metadata(header, source), source, options)
    except UserError as e:
        raise UserError(str(e) if str(source) in str(e) else f"{source}: {e}") from e
    except ValueError as e:
        told = printable(e, LONGEST_ERROR)
        raise UserError(f"{source}: its tensors make no encoder: {told}; see --num-heads and --img-size") from e


def _translate_encoder_file(content: Mapping[str, Any], stored: EncoderMetadata, options: ConvertOptions) -> Translated:
    _refuse_hints(options)
    state, report = _translate_own(content, (), "", stored.spec)
    return Translated(ENCODER_FILE, state, stored, report)


def _translate_run(content: Mapping[str, Any], source: Path, options: ConvertOptions) -> Translated:
    _refuse_hints(replace(options, use_teacher=False))
    stored, teacher = own.run_metadata(source), options.use_teacher
    prefix = own.run_prefix(content[own.STATE], teacher)
    state, report = _translate_own(content, (own.STATE,), prefix, stored.spec)
    metadata = own.at_step(stored, content[own.STEP], teacher)
    metadata = replace(metadata, source=source.name, source_sha256=sha256(source))
    return Translated(RUN_CHECKPOINT, state, metadata, report)


def _translate_own(
    content: Mapping[str, Any], path: tuple[str, ...], prefix: str, spec: EncoderSpec
) -> tuple[dict[str, Tensor], LoadReport]:
    """Tensors with a prefix in the state_dict that the keys of `path` lead to; they have our names already."""
    draft, dropped = Draft(), []
    for name, tensor in (content[path[0]] if path else content).items():
        if not is_weight(name, tensor):
            continue
        if not name.startswith(prefix):
            dropped.append(TensorRecord(name, None, "dropped", own.reason_to_drop(name)))
            continue
        check_plain(name, tensor)
        ours = name.removeprefix(prefix)
        draft.tensors[ours], draft.sources[ours] = tensor, name
    check_state(draft, spec, "write it again with hiendmae pretrain or hiendmae convert")
    state, _ = finish(draft, spec)
    return state, LoadReport((*draft.records(), *dropped)).then(account_for_rest(content, path))


def _refuse_hints(options: ConvertOptions) -> None:
    """
    Raises:
        UserError: something is said about a file that says it itself.
    """
    if said := options.said():
        raise UserError(f"{', '.join(said)}: it is a file of ours, which says itself what it is; leave that out")


def _translate_foreign(
    content: Mapping[str, Any], exported: EncoderMetadata | None, source: Path, options: ConvertOptions
) -> Translated:
    if exported is not None:
        # our own export says what its names cannot
        _refuse_hints(options)
        options = replace(options, num_heads=exported.spec.num_heads, img_size=exported.spec.img_size)
    found = find(content, options.format, options.use_teacher)
    axes = options.axes or found.format.axes
    draft = translate_found(found, Hints(options.num_heads, options.img_size, axes == "xyz", found.format.sizes))
    report = LoadReport(tuple(draft.records)).then(account_for_rest(content, found.path))
    if exported is None:
        metadata = foreign_metadata(
            found, draft.spec, axes, named=options.format is not None, method=options.method, notes=draft.notes
        )
    else:
        told = {k: getattr(exported.spec, k) for k in ("norm_eps", "taps", "pos_embed")}
        metadata = replace(exported, spec=draft.spec.with_(**told))
    if metadata.source is None:
        # an export of ours goes on naming the file that its encoder was converted from
        metadata = replace(metadata, source=source.name, source_sha256=sha256(source))
    return Translated(found.format.name, draft.state, metadata, report)


def _check_output(source: Path, output: Path, force: bool) -> None:
    if not source.is_file():
        raise UserError(f"no file {source}; give a checkpoint (.pth, .pt, .ckpt) or a .safetensors file")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give a file, e.g. -o {quote(str(output / 'encoder.safetensors'))}")
    check_replaceable(output)
    if output.exists() and source.samefile(output):
        raise UserError(f"the output {output} is the input; give another -o")
    if output.exists() and not force:
        raise UserError(f"{output} exists already; give another -o, or --force to replace it")
