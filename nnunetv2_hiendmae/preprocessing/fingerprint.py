"""nnU-Net's dataset fingerprint for datasets without labels, in nnU-Net's own format."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import telling_disk_errors, write_text
from nnunetv2_hiendmae.planning import dataset
from nnunetv2_hiendmae.planning.dataset import LABEL_FREE_KEY, RawDataset, is_ct, read_fingerprint
from nnunetv2_hiendmae.planning.labels import extract_fingerprint
from nnunetv2_hiendmae.planning.readers import Reader, choose_reader, naming_reason
from nnunetv2_hiendmae.preprocessing import cases
from nnunetv2_hiendmae.preprocessing.cases import BrokenCase

# between air with most of the lung and everything else, in HU
CT_BODY_HU = -500.0
# of nnU-Net's draw of voxels for statistics
_NNUNET_SEED = 1234
# over all cases together: enough for half-percent percentiles, and small enough for any machine
STATISTIC_VOXELS = 1_000_000

# shape (D, H, W) after cropping, spacing in mm, sampled foreground values per channel, size relative to the whole
Analysis = tuple[list[int], list[float], list[np.ndarray], float]

logger = logging.getLogger(__name__)


def ensure_fingerprint(
    raw: RawDataset, num_processes: int, reader: Reader | None = None, scratch: Path | None = None
) -> tuple[dict[str, Any], list[BrokenCase]]:
    """The dataset's fingerprint, made and written to `$nnUNet_preprocessed/<dataset>/` if there is none yet.

    It is nnU-Net's own when every case has a label file and none is broken. Otherwise it comes from the images
    alone and carries `"hiendmae_label_free": true`: its intensity statistics are those of body voxels, which are
    the voxels above -500 HU in CT channels and above the image's mean in others.

    Args:
        reader: of the images; None: nnU-Net's choice.
        scratch: folder for inflated files; None: the system's.

    Returns:
        The fingerprint and the broken cases; none are named when an existing fingerprint is reused.

    Raises:
        UserError: every case is broken, or the disk is full.
    """
    labelled = not raw.missing_labels
    # one made without labels is made anew once there are labels: stock commands would reuse it
    existing = read_fingerprint(raw.name, with_labels=labelled)
    if existing is not None:
        return existing, []
    reader = reader or choose_reader(raw)
    analyse = partial(_analyse, reader, scratch, raw.channels, max(1, STATISTIC_VOXELS // len(raw.cases)))
    jobs = {(raw.name, case): partial(analyse, images) for case, images in raw.cases.items()}
    analyses, broken = cases.map_cases(jobs, num_processes, f"{raw.name} fingerprint")
    if not analyses:
        cases.refuse_if_nothing_left(raw.name, broken)
    if labelled and not broken:
        try:
            extract_fingerprint(raw, reader, num_processes)
            return read_fingerprint(raw.name), []
        except UserError as e:
            logger.warning("the fingerprint of %s is made without labels, look for a broken one: %s", raw.name, e)
    shapes, spacings, intensities, sizes = zip(*analyses.values(), strict=True)
    statistics = [_statistics(np.concatenate(values)) for values in zip(*intensities, strict=True)]
    fingerprint = {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": {str(i): values for i, values in enumerate(statistics)},
        "median_relative_size_after_cropping": float(np.median(sizes)),
        LABEL_FREE_KEY: True,
    }
    file = nnunet_folder("nnUNet_preprocessed") / raw.name / dataset.FINGERPRINT
    write_text(file, json.dumps(fingerprint, indent=4) + "\n")
    return fingerprint, broken


def body_mask(channel: np.ndarray, name: str) -> np.ndarray:
    """Voxels (D, H, W) whose intensities stand for the channel when there are no labels; all if there are none."""
    mask = channel > (CT_BODY_HU if is_ct(name) else channel.mean(dtype=np.float64))
    return mask if mask.any() else np.ones_like(mask)


def _analyse(
    reader: Reader, scratch: Path | None, channels: tuple[str, ...], samples: int, images: Sequence[str]
) -> Analysis:
    space = telling_disk_errors(scratch / "inflated" if scratch else Path(gettempdir()) / "inflated")
    with space, cases.checked_files(images, scratch) as files, naming_reason(reader, images):
        data, properties = reader().read_images(files)
        cases.check_volume(data, properties["spacing"], channels)
        whole = data[0].size
        # the box of nnU-Net's crop_to_nonzero, which fills holes, too: that changes no box
        box = bounding_box_to_slice(get_bbox_from_mask((data != 0).any(axis=0)))
        data = data[(slice(None), *box)]
        intensities = []
        for channel, name in zip(data, channels, strict=True):
            # a mask of its own for each channel: the body of a CT says little about a PET; drawn as nnU-Net draws them
            values = np.random.RandomState(_NNUNET_SEED).choice(channel[body_mask(channel, name)], samples)
            intensities.append(values)
        return list(data.shape[1:]), [float(s) for s in properties["spacing"]], intensities, data[0].size / whole


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    found = {"mean": mean, "median": median, "std": std, "min": values.min(), "max": values.max()}
    found |= {"percentile_99_5": high, "percentile_00_5": low}
    return {name: float(value) for name, value in found.items()}
