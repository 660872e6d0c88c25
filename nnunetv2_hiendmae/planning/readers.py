"""Which of nnU-Net's readers turns the images of a dataset into arrays: one choice, which fingerprint, plans, checks
and preprocessing share. It decides the orientation of the arrays."""

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.planning.dataset import RawDataset
from nnunetv2_hiendmae.volume_format import REORIENTING, twins

NNUNETS_CHOICE = "auto"
READER_KEY = "overwrite_image_reader_writer"

Reader = type[BaseReaderWriter]

logger = logging.getLogger(__name__)


class BrokenCaseError(Exception):
    """One case cannot be used; the message is the reason, in one line. The others go on."""


def choose_reader(raw: RawDataset, wanted: str | None = None, given: str | None = None) -> Reader:
    """The reader of all images of a dataset.

    Args:
        wanted: name of the one that the encoder was trained with; it or its twin is taken where that reads the first
            readable image, unless dataset.json asks for another one. One that nnU-Net does not have is warned about.
        given: what the user asks for, `NNUNETS_CHOICE` or a name.

    Raises:
        UserError: nnU-Net has no such reader, or none for the file ending.
    """
    ending, own = raw.dataset_json["file_ending"].lower(), raw.dataset_json.get(READER_KEY, "None")
    if given not in (None, NNUNETS_CHOICE):
        reader = find_reader(given)
        if ending not in reader.supported_file_endings:
            raise UserError(f"reader {given} cannot read {ending}; leave --reader out to let nnU-Net choose")
        return reader
    if given is None and wanted is not None:
        # the text of a file that nobody vouches for
        wanted = printable(wanted)
        if own not in ("None", *twins(wanted)):
            told = f"dataset.json asks for the reader {own}, the encoder was trained with {wanted}"
            mend = f"check that it gives the same orientation, or let {READER_KEY} in dataset.json be {wanted}"
            logger.warning(f"{told}: the dataset's is used, {mend}")
        elif own == "None":
            known = [reader for name in twins(wanted) if (reader := _reader_of(name))]
            if reader := _first_that_reads(raw, known):
                return reader
            told = f"{wanted} cannot read {ending}" if known else f"nnU-Net has no reader {wanted}"
            mend = "check that the orientation is the same as in pretraining"
            logger.warning(f"{told}: nnU-Net's own reader is used, {mend}")
    if own != "None":
        return find_reader(own)
    reader = _first_that_reads(raw, LIST_OF_IO_CLASSES)
    if reader is None:
        raise UserError(f"nnU-Net has no reader for '{ending}' files ({raw.name}); check file_ending in dataset.json")
    return reader


def choose_readers(raws: Sequence[RawDataset], wanted: str | None = None) -> list[Reader]:
    """The reader of every dataset of a run: where their images lie in different directions, one that turns them.

    Args:
        wanted: as `choose_reader`.

    Raises:
        UserError: as `choose_reader`.
    """
    readers, told = [choose_reader(raw, wanted) for raw in raws], told_directions(raws)
    if told is None:
        return readers
    twins = [_reorienting_twin(raw, reader) for raw, reader in zip(raws, readers, strict=True)]
    if twins == readers:
        return readers
    if None in twins:
        logger.warning(f"{told}, and stay so: none of nnU-Net's readers that turn images is to read all of them")
        return readers
    logger.warning(f"{told}: {' and '.join(dict.fromkeys(t.__name__ for t in twins))} turns them all to RAS")
    return twins


def told_directions(raws: Iterable[RawDataset]) -> str | None:
    """In which directions images lie, in words; None where all lie in the same one. Only reads headers."""
    found: dict[str, list[str]] = {}
    for raw in raws:
        for case, images in raw.cases.items():
            if (axes := _direction(images[:1])) is not None:
                found.setdefault(axes, []).append(f"{raw.name}/{case}")
    if len(found) < 2:
        return None
    listed = (f"{len(cases)} {axes} ({some(cases, 2)})" for axes, cases in found.items())
    return f"images lie in different directions: {', '.join(listed)}"


def told_places(raw: RawDataset) -> str | None:
    """Whose labels lie elsewhere than their images, by half a voxel or more, in words; None where none does. Only reads
    headers, as far as ITK knows them."""
    found = []
    for case, images in raw.cases.items():
        image, label = (_header(file) for file in (images[0], raw.labels[case]))
        if image is None or label is None or image.GetSize() != label.GetSize():
            continue
        away = np.linalg.norm(_corners(image) - _corners(label), axis=1).max()
        if away >= min(image.GetSpacing()) / 2:
            found.append(f"{case} (up to {away:.3g} mm away)")
    if not found:
        return None
    told = f"by their headers, {len(found)} labels of {raw.name} lie elsewhere than their images: {some(found)}"
    return f"{told}; nnU-Net pairs voxels and not places: look at both in one viewer, and mend what is wrong"


def _corners(header: sitk.ImageFileReader) -> np.ndarray:
    """Places of the first voxel and of the last one along each axis, in mm, (1 + axes, axes)."""
    axes, origin = header.GetDimension(), np.array(header.GetOrigin())
    steps = np.reshape(header.GetDirection(), (axes, axes)) * header.GetSpacing()
    return np.vstack([origin, origin + (steps * (np.array(header.GetSize()) - 1)).T])


def _header(file: str) -> sitk.ImageFileReader | None:
    """What ITK reads of a file but its voxels; None: nothing."""
    # a pipe would be waited for
    if not Path(file).is_file():
        return None
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    try:
        # what ITK says of it is told when the case is read
        with naming_reason():
            header.ReadImageInformation()
    # of no format of ITK's, or sheared
    except BrokenCaseError:
        return None
    return header


def _direction(images: Sequence[str]) -> str | None:
    """How an image lies: "LPS" for instance, first file axis first, the nearest one where it is oblique; None: its
    header does not say."""
    header = _header(images[0]) if images else None
    if header is None or header.GetDimension() < 3:
        return None
    axes, cosines = header.GetDimension(), header.GetDirection()
    spatial = [cosines[row * axes + column] for row in range(3) for column in range(3)]
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(spatial)


def _reorienting_twin(raw: RawDataset, reader: Reader) -> Reader | None:
    """The reader that turns every image to one orientation, in place of `reader`; `reader` if it does so; None: there
    is none for these files, or dataset.json asks for another one."""
    if reader.__name__ in REORIENTING:
        return reader
    if raw.dataset_json.get(READER_KEY, "None") != "None":
        return None
    return _first_that_reads(raw, map(find_reader, REORIENTING))


def find_reader(name: str) -> Reader:
    """nnU-Net's reader of that name.

    Raises:
        UserError: there is none.
    """
    if reader := _reader_of(name):
        return reader
    known = ", ".join((*twins("NibabelIO"), *REORIENTING))
    told = f"nnU-Net has no image reader '{printable(name)}', needed one such as {known}"
    raise UserError(f"{told}; check --reader, and {READER_KEY} in dataset.json")


def _reader_of(name: str) -> Reader | None:
    """nnU-Net's reader of that name; None: there is none."""
    try:
        return recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        return None


@contextmanager
def naming_reason(reader: Reader | None = None, images: Sequence[str] = ()) -> Iterator[io.StringIO]:
    """Whatever goes wrong inside becomes a BrokenCaseError with a one-line reason, and with the reader that reads
    `images` where `reader` cannot; nothing is printed. Hands out what would have been."""
    printed = io.StringIO()
    try:
        with _itk_to(printed), redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
            # of every case, not only of the first
            warnings.simplefilter("always")
            # of libraries that tried to open a file: nothing about the image
            for kind in (ResourceWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield printed
    except BrokenCaseError:
        raise
    except MemoryError as e:
        raise BrokenCaseError("not enough memory; run again with fewer processes: -np 1") from e
    except Exception as e:
        # nnU-Net's readers print what is wrong and raise without a message; SimpleITK's last line is the telling one
        said = str(e).strip().splitlines() or [line for line in printed.getvalue().splitlines() if "ERROR" in line]
        reason = said[-1].strip() if said else type(e).__name__
        raise BrokenCaseError(f"{reason}{_told_who_reads(reader, images) if reader else ''}") from e


class _ITKText(sitk.LoggerBase):
    """Takes what ITK, in C++, would write to the terminal, without places in its source and without repetitions."""

    def __init__(self, printed: io.StringIO):
        super().__init__()
        self.printed = printed

    def DisplayText(self, text: str) -> None:
        told = re.sub(r"(WARNING: )?In \S+, line \d+\s+\w+ \(0x[0-9a-f]+\): ", r"\1", text.strip())
        if told not in self.printed.getvalue():
            self.printed.write(f"{told}\n")

    DisplayErrorText = DisplayWarningText = DisplayGenericOutputText = DisplayDebugText = DisplayText


@contextmanager
def _itk_to(printed: io.StringIO) -> Iterator[None]:
    ours = _ITKText(printed)
    before = ours.SetAsGlobalITKLogger()
    try:
        yield
    finally:
        before.SetAsGlobalITKLogger()


def _told_who_reads(reader: Reader, images: Sequence[str]) -> str:
    """What to add to the reason why `reader` cannot read a case: the reader that can, if there is one."""
    others = (*map(find_reader, twins(reader.__name__)), *LIST_OF_IO_CLASSES)
    for other in others:
        fits = images and images[0].lower().endswith(tuple(other.supported_file_endings))
        if fits and other is not reader and _reads(other, images):
            return f'; {other.__name__} reads it: let "{READER_KEY}" in dataset.json be "{other.__name__}"'
    return ""


def _first_that_reads(raw: RawDataset, readers: Iterable[Reader]) -> Reader | None:
    """The first reader for the first image that one of them reads. Where nothing is readable the file ending decides:
    every case is then named with its own reason."""
    ending = raw.dataset_json["file_ending"].lower()
    fitting = [reader for reader in readers if ending in reader.supported_file_endings]
    for images in raw.cases.values():
        for reader in fitting:
            if _reads(reader, images[:1]):
                return reader
    return fitting[0] if fitting else None


def _reads(reader: Reader, images: Sequence[str]) -> bool:
    # a pipe would be waited for
    if not images or not all(Path(image).is_file() for image in images):
        return False
    try:
        said = io.StringIO()
        with _itk_to(said), redirect_stdout(said), redirect_stderr(said):
            reader().read_images(list(images))
    # whatever a reader raises
    except Exception:
        return False
    return True
