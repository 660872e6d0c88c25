"""Volumes as nnU-Net reads and preprocesses them."""

import gzip
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio import reader_writer_registry as readers
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy.ndimage import affine_transform

from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable
from nnunetv2_hiendmae.files import write_with
from nnunetv2_hiendmae.preprocessing.cases import BrokenCaseError, check_volume, checked_files, naming_reason
from nnunetv2_hiendmae.training.grids import REVERSED, Grid, preprocessed_grid, reader_grid, steps_between
from nnunetv2_hiendmae.volume_format import DEFAULT_INTERPOLATION, VolumeFormat, resampling, twins
from nnunetv2_hiendmae.weights import EncoderMetadata

logger = logging.getLogger(__name__)

# what nnU-Net's SimpleITKIOWithReorient turns images to, first file axis first
SITK_READER_AXES = "RAS"
# nnU-Net's for everything that is not CT
USUAL_NORMALIZATION = "ZScoreNormalization"


def resample(values: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Values (d, h, w) of one grid on another whose axes are parallel to it, linear between voxel centres.

    Up to the edge of the source's box its outermost values hold, outside it is zero. (SimpleITK takes one of two
    opposite edges as outside, which decides about voxels whose centre lies there.)
    """
    made, part = np.zeros(target.shape, np.float32), target.covered(source)
    lower, shape = [s.start for s in part], [s.stop - s.start for s in part]
    steps, start = steps_between(source, target.cropped(lower, shape))
    made[part] = affine_transform(values.astype(np.float32), steps, start, tuple(shape), order=1, mode="nearest")
    return made


def write_nifti(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Writes an array (D, H, W) as float32 `.nii.gz` at its place in the world, in one step.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    affine = grid.affine[:, REVERSED]
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.T, dtype=np.float32), affine)
    for put in (image.set_sform, image.set_qform):
        put(affine, code="scanner")
    # without a time stamp: the same picture is the same file
    write_with(path, lambda temporary: temporary.write_bytes(gzip.compress(image.to_bytes(), 5, mtime=0)))


@dataclass(frozen=True, eq=False)
class RawImage:
    """An image as nnU-Net's reader hands it out.

    Args:
        data: (C, D, H, W), intensities as in the file.
        properties: what the reader recorded.
        grid: of `data`; a reorienting reader turns the file's axes.
        to_stored: the turn (nibabel's orientation transform) that undoes that.
    """

    data: np.ndarray
    properties: dict[str, Any]
    grid: Grid
    to_stored: np.ndarray


def read_image(files: Sequence[Path], volumes: VolumeFormat) -> RawImage:
    """Reads an image, one file per channel, with the reader that the encoder's images were read with. `volumes`: with a
    name for every channel, see `known_format`.

    Raises:
        UserError: a file is missing or cannot be read, or the number of channels is not the encoder's.
    """
    names, channels = [str(f) for f in files], volumes.channel_names
    if len(names) > len(channels):
        raise _wrong_channels(len(names), channels)
    try:
        with checked_files(names) as checked:
            with naming_reason():
                reader = _reader(names[0], volumes)
            with naming_reason() as said:
                data, properties = reader.read_images(checked)
        if told := " ".join(said.getvalue().split()):
            logger.warning("the reader of %s says: %s", ", ".join(names), printable(told, LONGEST_ERROR))
        if len(data) != len(channels):
            raise _wrong_channels(len(data), channels)
        with naming_reason():
            check_volume(data, properties["spacing"], channels)
    except BrokenCaseError as e:
        raise UserError(f"cannot use {', '.join(names)}: {e}; check --image") from e
    return RawImage(data, properties, reader_grid(properties, data.shape[1:]), _turn_to_stored(properties))


def preprocess(image: RawImage, volumes: VolumeFormat) -> tuple[np.ndarray, Grid]:
    """The image (C, D, H, W) as plans of this format would have it: nnU-Net's preprocessor cuts off the empty border,
    normalises and resamples."""
    spacing = volumes.spacing_mm or image.properties["spacing"]
    schemes = volumes.normalization_schemes
    configuration = ConfigurationManager(
        {
            "architecture": {},
            "spacing": [float(s) for s in spacing],
            "normalization_schemes": list(schemes),
            "use_mask_for_norm": volumes.masks(schemes, [False] * len(image.data)),
            **resampling(volumes.interpolation or DEFAULT_INTERPOLATION),
        }
    )
    intensities = {str(c): volumes.ct_statistics for c in range(len(image.data))}
    plans = PlansManager({"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": intensities})
    # the preprocessor adds to what it is given
    case = image.data, None, dict(image.properties)
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(*case, plans, configuration, {})
    return data, preprocessed_grid(properties, data.shape[1:])


def known_format(metadata: EncoderMetadata) -> VolumeFormat:
    """What an encoder's images are, with a name and a normalisation for every channel: a converted encoder may know
    neither."""
    channels, volumes = metadata.spec.in_channels, metadata.volume
    if len(volumes.normalization_schemes) != channels:
        volumes = replace(volumes, normalization_schemes=(USUAL_NORMALIZATION,) * channels)
        logger.warning("the encoder file does not say how images were normalised: nnU-Net's z-score is used")
    if len(volumes.channel_names) != channels:
        volumes = replace(volumes, channel_names=tuple(f"channel {c}" for c in range(channels)))
    return volumes


def _turn_to_stored(properties: Mapping[str, Any]) -> np.ndarray:
    reoriented = properties.get("sitk_stuff", {}).get("original_orientation")
    if reoriented is not None:
        # by name, not by the direction: ITK and nibabel disagree about directions between two axes
        now, before = (axcodes2ornt(tuple(reversed(axes))) for axes in (SITK_READER_AXES, reoriented))
    else:
        stuff = properties.get("nibabel_stuff", {"original_affine": np.eye(4)})
        affines = stuff.get("reoriented_affine", stuff["original_affine"]), stuff["original_affine"]
        now, before = (io_orientation(affine[:, REVERSED]) for affine in affines)
    return ornt_transform(now, before)


def _reader(file: str, volumes: VolumeFormat) -> Any:
    ending = ".nii.gz" if file.lower().endswith(".nii.gz") else Path(file).suffix.lower()
    if volumes.image_reader_writer is not None:
        known = [readers.recursive_find_reader_writer_by_name(name) for name in twins(volumes.image_reader_writer)]
        return next((reader for reader in known if ending in reader.supported_file_endings), known[0])()
    return readers.determine_reader_writer_from_file_ending(ending, file, True, verbose=False)()


def _wrong_channels(found: int, channels: Sequence[str]) -> UserError:
    return UserError(
        f"--image has {found} channels, the encoder takes {len(channels)} ({', '.join(channels)}); "
        "give one file per channel, in this order"
    )
