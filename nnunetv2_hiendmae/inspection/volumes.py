"""Volumes as nnU-Net reads and preprocesses them, and where their voxels lie in the world."""

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_file_ending,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.inspection.geometry import Grid
from nnunetv2_hiendmae.preprocessing.cases import BrokenCaseError, check_files, check_volume, naming_reason
from nnunetv2_hiendmae.training.volumes import Case
from nnunetv2_hiendmae.weights import EncoderMetadata

logger = logging.getLogger(__name__)

# LPS, as ITK counts, to NIfTI's RAS
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# what nnU-Net's SimpleITKIOWithReorient turns images to, first file axis first
SITK_READER_AXES = "RAS"
UNTURNED = np.array([[0, 1], [1, 1], [2, 1]])
# nnU-Net's for everything that is not CT
USUAL_NORMALIZATION = "ZScoreNormalization"
# as in every plans file of nnU-Net's planner
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True, eq=False)
class RawImage:
    """An image as nnU-Net's reader hands it out.

    Args:
        data: (C, D, H, W), intensities as in the file.
        grid: of `data`; a reorienting reader turns the file's axes.
        stored_grid: of the file itself, axes as `SimpleITK.GetArrayFromImage` orders them.
    """

    data: np.ndarray
    properties: dict[str, Any]
    grid: Grid
    stored_grid: Grid


def reader_grid(properties: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    """Grid of an array (D, H, W) that one of nnU-Net's readers made, from what it recorded.

    A format without a place in the world (TIFF) starts at its origin.
    """
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        axes = len(stuff["spacing"])
        affine = np.eye(4)
        # of a 4D file, whose last axis holds the channels, the first three
        affine[:3, :3] = np.reshape(stuff["direction"], (axes, axes))[:3, :3] * np.array(stuff["spacing"])[:3]
        affine[:3, 3] = stuff["origin"][:3]
        affine = LPS_TO_RAS @ affine
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.array(stuff.get("reoriented_affine", stuff["original_affine"]), float)
    else:
        affine = np.diag([*reversed(properties["spacing"]), 1.0])
    return Grid(tuple(int(s) for s in shape), affine[:, [2, 1, 0, 3]])


def turn_to_stored(properties: Mapping[str, Any]) -> np.ndarray:
    """The turn (nibabel's orientation transform) that undoes what a reorienting reader did to the axes D, H, W."""
    reoriented = properties.get("sitk_stuff", {}).get("original_orientation")
    if reoriented is not None:
        # by name, not by the direction: ITK and nibabel disagree about directions between two axes
        return ornt_transform(
            axcodes2ornt(tuple(reversed(SITK_READER_AXES))), axcodes2ornt(tuple(reversed(reoriented)))
        )
    stuff = properties.get("nibabel_stuff", {})
    if "reoriented_affine" not in stuff:
        return UNTURNED
    now, before = (io_orientation(stuff[k][:, [2, 1, 0, 3]]) for k in ("reoriented_affine", "original_affine"))
    return ornt_transform(now, before)


def preprocessed_grid(properties: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    """Grid of a preprocessed array (D, H, W): nnU-Net cuts off the empty border, then resamples.

    Plans that transpose the axes are not for us (`find_data` refuses them). The spacing differs a little from the
    plans': the box is divided into a whole number of voxels.
    """
    before = reader_grid(properties, properties["shape_before_cropping"])
    lower = [int(a) for a, _ in properties["bbox_used_for_cropping"]]
    return before.cropped(lower, properties["shape_after_cropping_and_before_resampling"]).resized(shape)


def case_grid(case: Case) -> Grid:
    """Grid of a preprocessed case.

    Raises:
        UserError: what nnU-Net recorded beside the case is missing, damaged or incomplete.
    """
    record = case.path.with_suffix(".pkl")
    try:
        *_, properties = nnUNetDatasetBlosc2(str(case.path.parent), [case.path.stem]).load_case(case.path.stem)
        return preprocessed_grid(properties, case.shape)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(
            f"{record} does not say where case {case.name} lies ({type(e).__name__}: {e}); delete the case's files and "
            "preprocess again"
        ) from e


def with_channels(metadata: EncoderMetadata) -> EncoderMetadata:
    """The metadata with a name and a normalisation for every channel: converted encoders may know neither."""
    channels = metadata.spec.in_channels
    schemes, names = metadata.volume.normalization_schemes, metadata.volume.channel_names
    if len(schemes) != channels:
        schemes = (USUAL_NORMALIZATION,) * channels
        logger.warning("the encoder file does not say how images were normalised: nnU-Net's z-score is used")
    if len(names) != channels:
        names = tuple(f"channel {c}" for c in range(channels))
    return replace(metadata, volume=replace(metadata.volume, normalization_schemes=schemes, channel_names=names))


def read_image(files: Sequence[Path], metadata: EncoderMetadata) -> RawImage:
    """Reads an image, one file per channel, with the reader that the encoder's images were read with.

    Raises:
        UserError: a file is missing or cannot be read, or the number of channels is not the encoder's.
    """
    names, channels = [str(f) for f in files], metadata.spec.in_channels
    if len(names) > channels:
        raise _wrong_channels(len(names), metadata)
    with _telling(names):
        check_files(names)
        data, properties = _reader(names[0], metadata).read_images(names)
    if len(data) != channels:
        raise _wrong_channels(len(data), metadata)
    with _telling(names):
        check_volume(data, properties["spacing"], metadata.volume.channel_names)
    grid = reader_grid(properties, data.shape[1:])
    return RawImage(data, properties, grid, grid.turned(turn_to_stored(properties)))


def preprocess(image: RawImage, metadata: EncoderMetadata) -> tuple[np.ndarray, Grid]:
    """The image (C, D, H, W) as plans of this encoder would have it: nnU-Net's preprocessor cuts off the empty border,
    normalises and resamples; without the mask that nnU-Net's z-score uses where images have large empty borders.
    """
    spacing = metadata.volume.spacing_mm or image.properties["spacing"]
    configuration = ConfigurationManager(
        {
            "architecture": {},
            "spacing": [float(s) for s in spacing],
            "normalization_schemes": list(metadata.volume.normalization_schemes),
            "use_mask_for_norm": [False] * len(image.data),
            "resampling_fn_data": resample_data_or_seg_to_shape.__name__,
            "resampling_fn_data_kwargs": RESAMPLING,
            "resampling_fn_seg": resample_data_or_seg_to_shape.__name__,
            "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
        }
    )
    intensities = {str(c): metadata.volume.ct_statistics for c in range(len(image.data))}
    plans = PlansManager({"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": intensities})
    # the preprocessor adds to what it is given
    properties = dict(image.properties)
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image.data, None, properties, plans, configuration, {}
    )
    return data, preprocessed_grid(properties, data.shape[1:])


def _reader(file: str, metadata: EncoderMetadata) -> Any:
    if metadata.volume.image_reader_writer is not None:
        return recursive_find_reader_writer_by_name(metadata.volume.image_reader_writer)()
    ending = ".nii.gz" if file.endswith(".nii.gz") else Path(file).suffix
    return determine_reader_writer_from_file_ending(ending, file, allow_nonmatching_filename=True, verbose=False)()


def _wrong_channels(found: int, metadata: EncoderMetadata) -> UserError:
    return UserError(
        f"--image has {found} channels, the encoder takes {metadata.spec.in_channels} "
        f"({', '.join(metadata.volume.channel_names)}); give one file per channel, in this order"
    )


@contextmanager
def _telling(names: Sequence[str]) -> Iterator[None]:
    try:
        with naming_reason():
            yield
    except BrokenCaseError as e:
        raise UserError(f"cannot use {', '.join(names)}: {e}; check --image") from e
