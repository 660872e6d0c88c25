"""nnU-Net plans for our networks: nnU-Net's own planner with the architecture, patch and window put in."""

import json
import logging
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_hiendmae.architectures import ENCODERS, EncoderSpec
from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.planning.dataset import (
    channel_names,
    is_ct,
    prints_to_log,
    raw_dataset_json,
    read_fingerprint,
)
from nnunetv2_hiendmae.plans_section import PLANS_KEY, PlansSection
from nnunetv2_hiendmae.volume_format import VolumeFormat

CONFIGURATION = "3d_fullres"

logger = logging.getLogger(__name__)


def write_plans(
    dataset_name: str,
    plans_name: str,
    spec: EncoderSpec,
    volume: VolumeFormat,
    *,
    decoder_width: int,
    batch_size: int,
    section: PlansSection | None,
) -> Path:
    """Writes `$nnUNet_preprocessed/<dataset>/<plans_name>.json` with the one configuration `3d_fullres`.

    Also copies dataset.json and splits_final.json from raw, as nnU-Net does. Needs the dataset's fingerprint and
    images, no labels. Plans of ours with the same name are replaced; when data preprocessed with them no longer
    fit, a warning is logged.

    Args:
        dataset_name: full name, e.g. "Dataset001_X".
        spec: of the encoder; `img_size` becomes the patch size, `in_channels` is the dataset's.
        section: settings of the trainers, None for plans that only pretraining uses.

    Raises:
        UserError: no dataset or fingerprint, a 2D dataset, an unknown reader, splits that contradict each other,
            or a plans file of this name that is not ours.
    """
    path = check_plans_name(dataset_name, plans_name)
    planner = _planner(dataset_name, plans_name)
    planner.configure(spec, volume, decoder_width, batch_size, section)
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    with prints_to_log():
        planner.plan_experiment()
    if old is not None:
        _warn_if_stale(path, old, planner.plans)
    return path


def check_plans_name(dataset_name: str, plans_name: str) -> Path:
    """Path that plans of this name would have.

    Raises:
        UserError: the name cannot be used, or a file that is not ours stands there.
    """
    # nnU-Net takes folder names apart at "__"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plans_name) or "__" in plans_name:
        told = f"plans name '{plans_name}' needs letters, digits and single '_', '-', '.'"
        raise UserError(f"{told}; choose another one (plan: --name, preprocess: -p)")
    path = nnunet_folder("nnUNet_preprocessed") / dataset_name / f"{plans_name}.json"
    if path.is_file() and not is_ours(path):
        told = f"{path} was not made by hiendmae and is never overwritten"
        raise UserError(f"{told}; choose another name (plan: --name, preprocess: -p)")
    return path


def is_ours(path: Path) -> bool:
    """Whether a plans file was written by `write_plans`."""
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
        network = plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"]
    except (ValueError, KeyError, TypeError):
        return False
    return PLANS_KEY in plans or network in {encoder.network for encoder in ENCODERS.values()}


class _ViTPlanner(ExperimentPlanner):
    """nnU-Net's planner; only what differs for a fixed network is overridden."""

    def __init__(self, dataset_name: str, plans_name: str):
        # the encoder's axes are the array's: no transposing
        super().__init__(dataset_name, plans_name=plans_name, suppress_transpose=True)
        # what the planner reads and a dataset for pretraining may lack
        self.dataset_json = {"labels": {"background": 0}, "numTraining": len(self.dataset), **self.dataset_json}
        # 0: never a 3d_lowres configuration
        self.lowres_creation_threshold = 0

    def configure(
        self,
        spec: EncoderSpec,
        volume: VolumeFormat,
        decoder_width: int,
        batch_size: int,
        section: PlansSection | None,
    ) -> None:
        """Raises UserError for a 2D dataset or an unknown reader."""
        self._refuse_2d()
        self.reader_writer = _reader(volume.image_reader_writer)
        if volume.spacing_mm is not None:
            self.overwrite_target_spacing = list(volume.spacing_mm)
        self.section = section
        arch_kwargs = {k: v for k, v in spec.to_dict().items() if k != "in_channels"}
        self.fixed = {
            "patch_size": list(spec.img_size),
            "batch_size": batch_size,
            "architecture": {
                "network_class_name": ENCODERS[spec.kind].network,
                "arch_kwargs": {**arch_kwargs, "decoder_width": decoder_width},
                "_kw_requires_import": [],
            },
        }
        if volume.window_hu is not None:
            self._put_window(volume)

    def _refuse_2d(self) -> None:
        median_shape = np.median(self.dataset_fingerprint["shapes_after_crop"], axis=0)
        if min(median_shape) <= 1:
            raise UserError(
                f"{self.dataset_name} is 2D (median shape {[int(s) for s in median_shape]}), needed 3D volumes: "
                f"the encoder is a 3D ViT; use nnU-Net itself: nnUNetv2_train {self.dataset_name} 2d 0"
            )

    def _put_window(self, volume: VolumeFormat) -> None:
        properties = deepcopy(self.dataset_fingerprint["foreground_intensity_properties_per_channel"])
        for i, name in enumerate(channel_names(self.dataset_json)):
            if is_ct(name):
                properties[str(i)] = {**properties.get(str(i), {}), **volume.ct_statistics}
        self.dataset_fingerprint["foreground_intensity_properties_per_channel"] = properties

    def determine_reader_writer(self):
        return self.reader_writer or super().determine_reader_writer()

    @staticmethod
    def static_estimate_VRAM_usage(*args, **kwargs):
        # nnU-Net's U-Net is not the network that will be trained: do not build it only to weigh it
        return 1

    def get_plans_for_configuration(self, *args, **kwargs):
        return {**super().get_plans_for_configuration(*args, **kwargs), **self.fixed}

    def save_plans(self, plans):
        plans["configurations"] = {CONFIGURATION: plans["configurations"][CONFIGURATION]}
        # nnU-Net looks this class up by name inside nnunetv2
        plans["experiment_planner_used"] = ExperimentPlanner.__name__
        recursive_fix_for_json_export(plans)
        if self.section is not None:
            plans[PLANS_KEY] = self.section.to_dict()
        path = nnunet_folder("nnUNet_preprocessed") / self.dataset_name / f"{self.plans_identifier}.json"
        write_text(path, json.dumps(plans, indent=4) + "\n")


def _planner(dataset_name: str, plans_name: str) -> _ViTPlanner:
    raw_dataset_json(dataset_name)
    raw, preprocessed = nnunet_folder("nnUNet_raw"), nnunet_folder("nnUNet_preprocessed")
    if read_fingerprint(dataset_name) is None:
        raise UserError(
            f"{dataset_name} has no fingerprint in {preprocessed}; "
            f"run: nnUNetv2_extract_fingerprint -d {dataset_name[7:10]}"
        )
    try:
        with prints_to_log():
            planner = _ViTPlanner(dataset_name, plans_name)
    except (AssertionError, IndexError) as e:
        splits = "splits_final.json"
        raise UserError(
            f"{raw / dataset_name / splits} and {preprocessed / dataset_name / splits} contradict each other; "
            f"remove the one you do not want"
        ) from e
    except FileNotFoundError as e:
        raise UserError(f"{dataset_name} is incomplete: {e}; see: ls {raw / dataset_name}") from e
    if not planner.dataset:
        raise UserError(f"{raw / dataset_name} holds no training images, needed imagesTr; see: ls {raw / dataset_name}")
    return planner


def _reader(name: str | None) -> type | None:
    try:
        return None if name is None else recursive_find_reader_writer_by_name(name)
    except RuntimeError as e:
        raise UserError(f"nnU-Net has no image reader '{name}'; leave it out to let nnU-Net choose") from e


def _warn_if_stale(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    keys = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
    configuration_keys = ("spacing", "normalization_schemes", "use_mask_for_norm")

    def data_settings(plans: dict[str, Any]) -> list[Any]:
        configuration = plans["configurations"][CONFIGURATION]
        settings = [*(plans.get(k) for k in keys), *(configuration.get(k) for k in configuration_keys)]
        # through JSON, so that what was read and what was computed compare as the file holds them
        return json.loads(json.dumps(settings))

    folder = path.parent / new["configurations"][CONFIGURATION]["data_identifier"]
    if folder.is_dir() and data_settings(old) != data_settings(new):
        logger.warning(
            "%s was preprocessed with other settings than %s now has; "
            "run: nnUNetv2_preprocess -d %s -plans_name %s -c %s",
            folder,
            path.name,
            new["dataset_name"][7:10],
            new["plans_name"],
            CONFIGURATION,
        )
