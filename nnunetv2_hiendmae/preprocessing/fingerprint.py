"""nnU-Net's dataset fingerprint for datasets without labels, in nnU-Net's own format."""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.planning.dataset import (
    LABEL_FREE_KEY,
    fingerprint_file,
    is_ct,
    prints_to_log,
    read_fingerprint,
)
from nnunetv2_hiendmae.preprocessing.cases import (
    BrokenCase,
    RawDataset,
    check_files,
    check_volume,
    map_cases,
    naming_reason,
    refuse_if_nothing_left,
)

# between air with most of the lung and everything else, in HU
CT_BODY_HU = -500.0
# over all cases together: enough for half-percent percentiles, and small enough for any machine
STATISTIC_VOXELS = 1_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Analysis:
    shape_after_crop: tuple[int, int, int]
    spacing: tuple[float, float, float]
    # one array of sampled foreground values per channel
    intensities: list[np.ndarray]
    relative_size: float


@dataclass(frozen=True)
class _AnalysisJob:
    images: tuple[str, ...]
    reader: type[BaseReaderWriter]
    channels: tuple[str, ...]
    samples: int


def ensure_fingerprint(raw: RawDataset, num_processes: int) -> tuple[dict[str, Any], list[BrokenCase]]:
    """The dataset's fingerprint, made and written to `$nnUNet_preprocessed/<dataset>/` if there is none yet.

    It is nnU-Net's own when every case has a label file and none is broken. Otherwise it comes from the images
    alone and carries `"hiendmae_label_free": true`: its intensity statistics are those of body voxels, which are
    the voxels above -500 HU in CT channels and above the image's mean in others.

    Returns:
        The fingerprint and the broken cases; none are named when an existing fingerprint is reused.

    Raises:
        UserError: every case is broken, or the disk is full.
    """
    existing = read_fingerprint(raw.name)
    # one made without labels is made anew once there are labels: stock commands would reuse it
    if existing is not None and not (raw.labelled and existing.get(LABEL_FREE_KEY)):
        return existing, []
    reader, samples = raw.reader(), max(1, STATISTIC_VOXELS // len(raw.cases))
    jobs = {(raw.name, case): _AnalysisJob(images, reader, raw.channels, samples) for case, images in raw.cases.items()}
    analyses, broken = map_cases(_analyse, jobs, num_processes, f"{raw.name} fingerprint")
    if not analyses:
        refuse_if_nothing_left(raw.name, broken)
    if raw.labelled and not broken:
        fingerprint = _from_labels(raw.name, num_processes)
        if fingerprint is not None:
            return fingerprint, []
    fingerprint = _label_free(list(analyses.values()))
    write_text(fingerprint_file(raw.name), json.dumps(fingerprint, indent=4) + "\n")
    return fingerprint, broken


def body_mask(channel: np.ndarray, name: str) -> np.ndarray:
    """Voxels (D, H, W) whose intensities stand for the channel when there are no labels; all if there are none."""
    mask = channel > (CT_BODY_HU if is_ct(name) else channel.mean(dtype=np.float64))
    return mask if mask.any() else np.ones_like(mask)


def _analyse(job: _AnalysisJob) -> _Analysis:
    with naming_reason():
        check_files(job.images)
        data, properties = job.reader().read_images(list(job.images))
        check_volume(data, properties["spacing"], job.channels)
        whole = data[0].size
        data, _, _ = crop_to_nonzero(data)
        intensities = []
        for channel, name in zip(data, job.channels, strict=True):
            # a mask of its own for each channel: the body of a CT says little about a PET
            (values,), _ = DatasetFingerprintExtractor.collect_foreground_intensities(
                body_mask(channel, name)[None], channel[None], num_samples=job.samples
            )
            intensities.append(values)
        return _Analysis(
            tuple(data.shape[1:]), tuple(float(s) for s in properties["spacing"]), intensities, data[0].size / whole
        )


def _label_free(analyses: list[_Analysis]) -> dict[str, Any]:
    channels = zip(*(a.intensities for a in analyses), strict=True)
    return {
        "spacings": [list(a.spacing) for a in analyses],
        "shapes_after_crop": [list(a.shape_after_crop) for a in analyses],
        "foreground_intensity_properties_per_channel": {
            str(i): _statistics(np.concatenate(values)) for i, values in enumerate(channels)
        },
        "median_relative_size_after_cropping": float(np.median([a.relative_size for a in analyses])),
        LABEL_FREE_KEY: True,
    }


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "median": float(median),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


def _from_labels(name: str, num_processes: int) -> dict[str, Any] | None:
    """nnU-Net's own fingerprint, written by nnU-Net; None when a label is broken."""
    try:
        with prints_to_log():
            extractor = DatasetFingerprintExtractor(name, num_processes)
            extractor.show_progress_bar = sys.stderr.isatty()
            extractor.run(overwrite_existing=True)
    except Exception as e:
        logger.warning(
            "nnU-Net's own fingerprint of %s failed (%s: %s), so it is made without labels; "
            "look for a broken label with: nnUNetv2_extract_fingerprint -d %s --verify_dataset_integrity",
            name,
            type(e).__name__,
            e,
            name[7:10],
        )
        return None
    return read_fingerprint(name)
