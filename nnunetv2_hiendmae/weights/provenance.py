"""What is known about an encoder that another program wrote, as metadata."""

from collections.abc import Sequence
from dataclasses import replace

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.volume_format import CT_SCHEME, VolumeFormat
from nnunetv2_hiendmae.weights.finding import Found
from nnunetv2_hiendmae.weights.formats import DEFAULT_METHOD, UNKNOWN, WeightFormat
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata

TEACHER_NOTE = "weights of the momentum teacher"


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
    return EncoderMetadata(
        spec,
        entry.method or method or DEFAULT_METHOD,
        _volume(seen, spec.in_channels),
        citations=RECIPES[entry.method].citations if entry.method else (),
        licence=entry.licence,
        notes=tuple(all_notes),
    )


def _volume(seen: VolumeFormat, channels: int) -> VolumeFormat:
    if seen.window_hu is None:
        return seen
    low, high = seen.window_hu
    return replace(
        seen,
        intensity_offset=low,
        intensity_scale=high - low,
        normalization_schemes=(CT_SCHEME,) * channels,
        # names decide which dataset fits: those of several channels nobody knows
        channel_names=("CT",) if channels == 1 else (),
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
