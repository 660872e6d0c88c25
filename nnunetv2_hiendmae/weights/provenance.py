"""What is known about an encoder that another program wrote, as metadata."""

from collections.abc import Sequence

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.citations import CITATIONS
from nnunetv2_hiendmae.weights.finding import Found
from nnunetv2_hiendmae.weights.formats import DEFAULT_METHOD, UNKNOWN, WeightFormat
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata

TEACHER_NOTE = "weights of the momentum teacher"
_CT = "CTNormalization"


def foreign_metadata(
    found: Found, spec: EncoderSpec, axes: str, *, named: bool, method: str | None, notes: Sequence[str]
) -> EncoderMetadata:
    """Metadata of an encoder, without its file.

    Args:
        axes: what its arrays were, see `axes.AXES`.
        named: the user said which format it is.
        method: said by the user, None: that of the format.
        notes: of the translation.

    Raises:
        UserError: the format is of another method than the given one.
    """
    entry, seen = found.format, found.format.seen
    if method and entry.method and method != entry.method:
        raise UserError(f"--method {method}: a {entry.name} file is of method {entry.method}; leave it out")
    all_notes = [_axes_note(entry, axes), *_method_notes(entry, method), *notes, *_volume_notes(entry, spec)]
    if entry.lookalikes and not named:
        all_notes.append(entry.lookalikes)
    if found.path[-1:] == ("teacher",):
        all_notes.append(TEACHER_NOTE)
    window = seen.window_hu
    return EncoderMetadata(
        spec,
        entry.method or method or DEFAULT_METHOD,
        seen.spacing_mm,
        window,
        (_CT,) * spec.in_channels if window else (),
        # names decide which dataset fits: those of several channels nobody knows
        ("CT",) if window and spec.in_channels == 1 else (),
        image_reader_writer=seen.image_reader_writer,
        orientation=seen.orientation,
        citations=CITATIONS[entry.method] if entry.method else (),
        intensity_offset=window[0] if window else None,
        intensity_scale=window[1] - window[0] if window else None,
        licence=entry.licence,
        notes=tuple(all_notes),
    )


def _axes_note(entry: WeightFormat, axes: str) -> str:
    if axes == "xyz":
        return "arrays were (x, y, z) in the source, weights are permuted to (z, y, x) = D, H, W"
    theirs = ", although those of its authors are (x, y, z)" if entry.axes == "xyz" else ""
    return f"the order of axes is that of the source{theirs}"


def _method_notes(entry: WeightFormat, method: str | None) -> list[str]:
    if entry.method or method:
        return []
    return [
        f"{entry.name} weights do not say how they were pretrained: they are fine-tuned as {DEFAULT_METHOD}, "
        "another --method chooses another recipe"
    ]


def _volume_notes(entry: WeightFormat, spec: EncoderSpec) -> list[str]:
    notes = []
    if entry.seen.orientation == UNKNOWN:
        notes.append(
            "nothing is known of the volumes it saw, not even which way they lay: say it with --reader, --spacing and "
            "--window of hiendmae plan"
        )
    if spec.in_channels > 1:
        notes.append(
            f"what its {spec.in_channels} input channels were is not known: a dataset must have as many, in that order"
        )
    return notes
