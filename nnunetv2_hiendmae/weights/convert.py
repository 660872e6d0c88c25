"""A checkpoint of anyone's → an encoder file, once, at the border: what `hiendmae convert` does."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.weights import own
from nnunetv2_hiendmae.weights.axes import AXES
from nnunetv2_hiendmae.weights.citations import CITATIONS
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata, save_encoder
from nnunetv2_hiendmae.weights.export import export_names, write_exported
from nnunetv2_hiendmae.weights.foreign import check_plain, read_checkpoint
from nnunetv2_hiendmae.weights.formats import DEFAULT_METHOD, METHOD_NAMES, Found, WeightFormat, find, is_weight
from nnunetv2_hiendmae.weights.layouts import Hints, run_name
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord
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
    """What `convert_checkpoint` wrote."""

    path: Path
    format: str
    metadata: EncoderMetadata
    report: LoadReport


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
    if to is not None:
        tensors, records = export_names(to, translated.state, metadata)
        report = _exported_report(report, records)
        write_exported(output, tensors, metadata)
    elif translated.format == ENCODER_FILE:
        raise UserError(f"{source} is an encoder file already; use it as it is, or give --to timm or --to monai")
    else:
        save_encoder(output, translated.state, metadata)
    return Conversion(output, translated.format, metadata, report)


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
            return _translate_own(content, "", stored, ENCODER_FILE, source, options)
        if own.is_run_checkpoint(content):
            return _translate_own(content, own.STATE, own.run_metadata(source), RUN_CHECKPOINT, source, options)
        return _translate_foreign(content, own.export_metadata(header, source), source, options)
    except UserError as e:
        raise UserError(str(e) if str(source) in str(e) else f"{source}: {e}") from e
    except ValueError as e:
        raise UserError(f"{source}: its tensors make no encoder: {e}; see --num-heads and --img-size") from e


def _translate_own(
    content: Mapping[str, Any],
    container: str,
    stored: EncoderMetadata,
    kind: str,
    source: Path,
    options: ConvertOptions,
) -> Translated:
    if options.format or options.num_heads or options.img_size or options.use_teacher or options.method:
        raise UserError(
            "it is a file of ours, which says itself what it is; leave out --format, --num-heads, --img-size, "
            "--use-teacher and --method"
        )
    draft, dropped = Draft(), []
    for name, tensor in (content[container] if container else content).items():
        if not is_weight(name, tensor):
            continue
        ours = run_name(name) if container else name
        if ours is None:
            dropped.append(TensorRecord(name, None, "dropped", "a part of pretraining that fine-tuning does not use"))
            continue
        check_plain(name, tensor)
        draft.tensors[ours], draft.sources[ours] = tensor, name
    check_state(draft, stored.spec)
    state, spec = finish(draft, stored.spec, options.axes == "xyz")
    metadata = replace(stored, spec=spec)
    if kind == RUN_CHECKPOINT:
        metadata = replace(metadata, source=source.name, source_sha256=sha256(source))
    report = LoadReport((*draft.records(), *dropped))
    return Translated(kind, state, metadata, report.then(account_for_rest(content, container)))


def _translate_foreign(
    content: Mapping[str, Any], exported: EncoderMetadata | None, source: Path, options: ConvertOptions
) -> Translated:
    found = find(content, options.format, options.use_teacher)
    axes = options.axes or found.format.axes
    img_size, heads = options.img_size, options.num_heads
    if exported is not None:
        # our own export says what its names cannot
        img_size, heads = img_size or exported.spec.img_size, heads or exported.spec.num_heads
    if img_size is not None and axes == "xyz":
        img_size = img_size[::-1]
    hints = Hints(heads, img_size, found.format.known_heads)
    state, spec, records = translate_found(found, hints, axes == "xyz")
    report = LoadReport(tuple(records)).then(account_for_rest(content, found.container))
    metadata = _metadata(found, spec, axes, options.method)
    if exported is not None:
        spec = spec.with_(norm_eps=exported.spec.norm_eps, taps=exported.spec.taps)
        metadata = replace(exported, spec=spec, method=options.method or exported.method)
    digest = sha256(source)
    return Translated(found.format.name, state, replace(metadata, source=source.name, source_sha256=digest), report)


def _metadata(found: Found, spec: EncoderSpec, axes: str, method: str | None) -> EncoderMetadata:
    entry, seen, notes = found.format, found.format.seen, [_axes_note(found.format, axes)]
    if entry.method is None and method is None:
        notes.append(
            f"{entry.name} weights do not say how they were pretrained: they are fine-tuned as {DEFAULT_METHOD}, "
            "another --method chooses another recipe"
        )
    if method and entry.method and method != entry.method:
        raise UserError(f"--method {method}: a {entry.name} file is of method {entry.method}; leave it out")
    if found.container == "teacher":
        notes.append("weights of the momentum teacher")
    window = seen.window_hu
    return EncoderMetadata(
        spec,
        entry.method or method or DEFAULT_METHOD,
        seen.spacing_mm,
        window,
        ("CTNormalization",) * spec.in_channels if window else (),
        ("CT",) * spec.in_channels if window else (),
        image_reader_writer=seen.image_reader_writer,
        orientation=seen.orientation,
        citations=CITATIONS[entry.method] if entry.method else (),
        intensity_offset=window[0] if window else None,
        intensity_scale=window[1] - window[0] if window else None,
        licence=entry.licence,
        notes=tuple(notes),
    )


def _axes_note(entry: WeightFormat, axes: str) -> str:
    if axes == "xyz":
        return "arrays were (x, y, z) in the source, weights are permuted to (z, y, x) = D, H, W"
    theirs = ", although those of its authors are (x, y, z)" if entry.axes == "xyz" else ""
    return f"the order of axes is that of the source{theirs}"


def _exported_report(report: LoadReport, records: list[TensorRecord]) -> LoadReport:
    """What became of the source's tensors under the exported names."""
    by_ours = {r.source: r for r in records if r.source}
    joined = []
    for record in report.records:
        later = by_ours.get(record.target)
        if later is None:
            joined.append(record)
            continue
        detail = "; ".join(d for d in (record.detail, later.detail) if d)
        status = record.status if later.status == "loaded" else later.status
        joined.append(TensorRecord(record.source, later.target, status, detail))
    return replace(report, records=(*joined, *(r for r in records if r.source is None)))


def _check_output(source: Path, output: Path, force: bool) -> None:
    if not source.is_file():
        raise UserError(f"no file {source}; give a checkpoint (.pth, .pt, .ckpt) or a .safetensors file")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give a file, e.g. -o {output / 'encoder.safetensors'}")
    if output.exists() and source.samefile(output):
        raise UserError(f"the output {output} is the input; give another -o")
    if output.exists() and not force:
        raise UserError(f"{output} exists already; give another -o, or --force to replace it")
