"""Cases: what makes one unusable, how one becomes an array, and work on all of them at once."""

import gzip
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable, some
from nnunetv2_hiendmae.files import is_disk_full
from nnunetv2_hiendmae.planning.plans import CASE_FILES, CONFIGURATION
from nnunetv2_hiendmae.planning.readers import BrokenCaseError, naming_reason
from nnunetv2_hiendmae.processes import in_processes
from nnunetv2_hiendmae.volume_format import CT_SCHEME, TORCH_FUNCTION

# even a crop of one organ uses more of a window than CT that was scaled to [0, 1]
SMALLEST_SHARE_OF_WINDOW = 0.01
# range of nearly all voxels, as a share of the largest value
SMALLEST_CONTRAST = 1e-4
# of which percentiles are taken
MOST_VOXELS = 1_000_000

# of a file that is inflated
_BLOCK = 1 << 20
# not even a header can be read: the reader tells what it is
_NO_NIFTI = (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error)

logger = logging.getLogger(__name__)

# dataset, case
Key = tuple[str, str]
# dataset, case, reason
BrokenCase = tuple[str, str, str]
Result = TypeVar("Result")


@contextmanager
def checked_files(images: Sequence[str], scratch: Path | None = None) -> Iterator[list[str]]:
    """Checks files, and hands out what to read instead of them: of a compressed NIfTI file the inflated one, in a
    folder of its own in `scratch`, because both the check and the reader would have to inflate it.

    Raises:
        BrokenCaseError: a channel file is missing, or a NIfTI file ends early or holds NaN or infinite values.
        OSError: the disk is full.
    """
    if not images:
        raise BrokenCaseError("no channel file such as CASE_0000")
    with TemporaryDirectory(dir=scratch) as inflated:
        readable = []
        for image in images:
            path = Path(image)
            if not path.is_file():
                raise BrokenCaseError(f"{path.name} is {'a pipe or folder, no file' if path.exists() else 'missing'}")
            plain = _inflate(path, Path(inflated)) if path.name.endswith(".nii.gz") else path
            if plain.suffix == ".nii":
                _check_nifti(plain, path.name)
            readable.append(str(plain))
        try:
            yield readable
        except BrokenCaseError as e:
            # a reader names the file that it was given
            raise BrokenCaseError(str(e).replace(f"{inflated}{os.sep}", "")) from e


def _inflate(path: Path, folder: Path) -> Path:
    """A compressed NIfTI file, inflated; itself where it is none. No more is written than its header announces."""
    plain = folder / path.name.removesuffix(".gz")
    try:
        stored = nibabel.load(path).dataobj
        left = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    except _NO_NIFTI:
        return path
    try:
        with gzip.open(path) as source, plain.open("wb") as f:
            while left > 0 and (block := source.read(min(left, _BLOCK))):
                f.write(block)
                left -= len(block)
            # what follows is not the image's; at the end of the file its checksum is checked
            source.read(_BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        if not (left == 0 and "Not a gzipped file" in str(e)):
            raise BrokenCaseError(f"{path.name} is truncated or damaged: {str(e).splitlines()[0]}") from e
    except OSError as e:
        if is_disk_full(e):
            raise
        raise BrokenCaseError(f"{path.name} cannot be read: {e.strerror or e}") from e
    return plain


def _check_nifti(path: Path, name: str) -> None:
    # nnU-Net reads NIfTI through ITK, which puts zeros for NaN and for the missing end of a truncated file
    # and says nothing
    try:
        image = nibabel.load(path)
        # as it stands there: nibabel, as ITK, takes 1 mm for 0
        with path.open("rb") as file:
            header = image.header_class.from_fileobj(file, check=False)
        stored = image.dataobj
    except _NO_NIFTI:
        return
    voxel_mm = header["pixdim"][1 : 1 + min(3, int(header["dim"][0]))]
    if not np.all(np.abs(voxel_mm) > 0):
        raise BrokenCaseError(f"{name} has voxels of {' × '.join(f'{s:g}' for s in voxel_mm)} mm in its header")
    try:
        # mapped: numbers that cannot be NaN are not read
        values = stored.get_unscaled()
    except (OSError, ValueError) as e:
        raise BrokenCaseError(f"{name} is truncated or damaged: {str(e).splitlines()[0]}") from e
    if values.dtype.kind == "f":
        check_finite(values)


def check_volume(data: np.ndarray, spacing: Sequence[float], channels: Sequence[str]) -> None:
    """Checks what a reader returned, (C, D, H, W) and mm per voxel.

    Raises:
        BrokenCaseError: wrong number of channels or axes, values that are not finite, an image of one value,
            or a spacing that is not three positive numbers.
    """
    if data.ndim != 4 or len(data) != len(channels):
        raise BrokenCaseError(
            f"array of shape {tuple(data.shape)}, needed {len(channels)} channel(s) ({', '.join(channels)}) × D × H × W"
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise BrokenCaseError(f"spacing {tuple(float(s) for s in spacing)} mm, needed three positive numbers")
    check_finite(data)
    if data.min() == data.max():
        raise BrokenCaseError(f"every voxel is {data.min():g}")


def check_finite(data: np.ndarray) -> None:
    """Raises BrokenCaseError: NaN or infinite voxels; one of them makes a whole pretraining run NaN."""
    # both are NaN where one voxel is
    if np.isfinite(data.min()) and np.isfinite(data.max()):
        return
    raise BrokenCaseError(f"{data.size - int(np.isfinite(data).sum())} voxels are NaN or infinite")


def check_window(channel: np.ndarray, low: float, high: float) -> None:
    """Raises BrokenCaseError: a CT channel (D, H, W) uses next to nothing of its window in HU."""
    least, most = float(channel.min()), float(channel.max())
    used = np.clip(most, low, high) - np.clip(least, low, high)
    if used < SMALLEST_SHARE_OF_WINDOW * (high - low):
        told = f"its values, {least:g} to {most:g}, use {used / (high - low):.2%} of the window {low:g} to {high:g} HU"
        raise BrokenCaseError(f"{told}; needed CT in HU, or a channel that is not called CT")


def check_contrast(data: np.ndarray, channels: Sequence[str]) -> None:
    """Raises BrokenCaseError: a channel of a normalised image (C, D, H, W) is constant but for single voxels."""
    for channel, name in zip(data, channels, strict=True):
        some_voxels = channel.ravel()[:: max(1, channel.size // MOST_VOXELS)]
        low, high = np.percentile(some_voxels, (0.05, 99.95))
        least, most = float(channel.min()), float(channel.max())
        if high - low <= SMALLEST_CONTRAST * max(abs(least), abs(most)):
            told = f"{name} is constant after normalisation ({low:.3g} to {high:.3g} but for single voxels"
            raise BrokenCaseError(f"{told}, which reach {least:.3g} and {most:.3g}); look for wrong voxels")


class _Configuration(ConfigurationManager):
    """nnU-Net's, for images without labels, whose segmentation is -1 outside of the image and 0 in it: where it is
    constant, nothing is resampled, and otherwise one image instead of two labels, with the same result."""

    @property
    def resampling_fn_seg(self):
        resample = super().resampling_fn_seg

        def resample_mask(seg, new_shape, *spacings):
            if seg.min() == seg.max():
                return np.full((len(seg), *new_shape), seg.flat[0])
            # nnU-Net's default does not decide as its interpolation of images
            if self.configuration["resampling_fn_seg"] != TORCH_FUNCTION:
                return resample(seg, new_shape, *spacings)
            outside = self.resampling_fn_probabilities(seg.astype(np.float32), new_shape, *spacings) <= -0.5
            return np.where(outside, np.int8(-1), np.int8(0))

        return resample_mask


class _CheckedPreprocessor(DefaultPreprocessor):
    """nnU-Net's preprocessor; whatever is wrong with the images is a BrokenCaseError. `scratch`: for inflated files."""

    def __init__(self, channels: tuple[str, ...], scratch: Path):
        super().__init__(verbose=False)
        self.channels, self.scratch = channels, scratch
        # what the reader said of a case that it could read
        self.said = ""

    def run_case(self, image_files, seg_file, plans_manager, *args, **kwargs):
        reader = plans_manager.image_reader_writer_class
        with checked_files(image_files, self.scratch) as files, naming_reason(reader, image_files) as self._printed:
            data, seg, properties = super().run_case(files, seg_file, plans_manager, *args, **kwargs)
            check_finite(data)
            check_contrast(data, self.channels)
            return data, seg, properties

    def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
        self.said = printable(" ".join(self._printed.getvalue().split()), LONGEST_ERROR)
        check_volume(data, properties["spacing"], self.channels)
        statistics = plans_manager.foreground_intensity_properties_per_channel
        for i, scheme in enumerate(configuration_manager.normalization_schemes):
            if scheme == CT_SCHEME:
                check_window(data[i], *(statistics[str(i)][f"percentile_{end}"] for end in ("00_5", "99_5")))
        # our plans never transpose, so both spacings are in array order
        left = compute_new_shape(data.shape[1:], properties["spacing"], configuration_manager.spacing)
        if not all(left):
            raise BrokenCaseError(
                f"its {tuple(data.shape[1:])} voxels become {tuple(int(s) for s in left)} at the target spacing"
            )
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)


def preprocess_case(
    case: str, images: Sequence[str], channels: tuple[str, ...], plans_file: Path, folder: Path, unfinished: Path
) -> str:
    """Writes a case to `folder`, whole or not at all, by way of a folder in `unfinished`. Returns what the reader
    said of it, in a line.

    Raises:
        BrokenCaseError: its images cannot be used.
        UserError: the disk is full or not writable.
    """
    plans = PlansManager(str(plans_file))
    configuration = _Configuration(plans.get_configuration(CONFIGURATION).configuration)
    try:
        with TemporaryDirectory(dir=unfinished) as temporary:
            written = Path(temporary) / case
            preprocessor = _CheckedPreprocessor(channels, unfinished)
            # the segmentation is None, always: no label may reach pretraining
            preprocessor.run_case_save(str(written), list(images), None, plans, configuration, {})
            for end in CASE_FILES:
                source = written.with_name(f"{case}{end}")
                with source.open("rb") as f:
                    os.fsync(f.fileno())
                source.replace(folder / source.name)
        return preprocessor.said
    # blosc2 says RuntimeError for every failure to write
    except (OSError, RuntimeError) as e:
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"cannot write {case} to {folder} ({e}; {free:.1f} GB free): no space left on the disk or not "
            f"writable; free some and run the same command again"
        ) from e


def map_cases(
    jobs: Mapping[Key, Callable[[], Result]], num_processes: int, title: str
) -> tuple[dict[Key, Result], list[BrokenCase]]:
    """Does every job, in spawned processes (in this one if `num_processes` is 1).

    Returns:
        Results in the order of `jobs`, and the cases whose job raised BrokenCaseError.

    Raises:
        UserError: a job raised it, or a process was killed.
    """
    results: dict[Key, Result] = {}
    broken: list[BrokenCase] = []
    outcomes = in_processes([partial(_outcome, job) for job in jobs.values()], num_processes, title)
    for key, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, BrokenCaseError):
            broken.append((*key, str(outcome)))
            logger.warning("%s %s is broken and left out: %s", *broken[-1])
        else:
            results[key] = outcome
    return results, broken


def refuse_if_nothing_left(dataset: str, broken: Sequence[BrokenCase]) -> None:
    """Raises UserError: always; names the first broken cases of a dataset of which nothing could be used."""
    told = some((f"{case} ({reason})" for _, case, reason in broken), separator="; ")
    raise UserError(f"all {len(broken)} training images of {dataset} are broken: {told}; replace them")


def _outcome(job: Callable[[], Result]) -> Result | BrokenCaseError:
    try:
        return job()
    except BrokenCaseError as e:
        return e
