"""nnU-Net plans for our networks: nnU-Net's own planner with the architecture, patch and window put in."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_hiendmae.architectures import KINDS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_id, nnunet_folder, preprocess_command
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import scratch_folder, telling_disk_errors, write_text, write_with
from nnunetv2_hiendmae.former_plans import (
    CONFIGURATION,
    INTENSITIES,
    MODEL_PLANS,
    array_settings,
    changes_in_model,
    trained_folds,
)
from nnunetv2_hiendmae.planning.dataset import RawDataset, is_ct, prints_to_log, read_fingerprint
from nnunetv2_hiendmae.planning.readers import choose_reader, find_reader
from nnunetv2_hiendmae.plans_section import PLANS_KEY, PlansSection
from nnunetv2_hiendmae.schemas import SPLITS_FILE as SPLITS
from nnunetv2_hiendmae.schemas import Folds, Plans, read_json
from nnunetv2_hiendmae.volume_format import VolumeFormat, resampling

# mm per voxel, finer than any scanner of bodies
_SMALLEST_MM = 0.01
# of a preprocessed case; the image comes last: where it stands, the case is finished
CASE_FILES = (".pkl", "_seg.b2nd", ".b2nd")

logger = logging.getLogger(__name__)


def make_plans(
    raw: RawDataset,
    plans_name: str,
    spec: EncoderSpec,
    volume: VolumeFormat,
    *,
    decoder_width: int | None,
    batch_size: int,
    section: PlansSection | None,
    network: str | None = None,
) -> dict[str, Any]:
    """nnU-Net's plans with the one configuration `3d_fullres`, as their file holds them.

    Also copies dataset.json and splits_final.json from raw, as nnU-Net does. Needs the dataset's fingerprint and
    images, no labels.

    Args:
        spec: of the encoder; `img_size` becomes the patch size, `in_channels` is the dataset's.
        decoder_width: None: the network has no such option.
        section: settings of the trainers, None for plans that only pretraining uses.
        network: dotted name of the segmentation network; None: that of the encoder's kind.

    Raises:
        UserError: no fingerprint, a 2D dataset, an unknown reader, or splits that contradict each other.
    """
    if read_fingerprint(raw.name) is None:
        told = f"{raw.name} has no fingerprint in {nnunet_folder('nnUNet_preprocessed')}"
        raise UserError(f"{told}; run: nnUNetv2_extract_fingerprint -d {dataset_id(raw.name)}")
    arch_kwargs = {k: v for k, v in spec.to_dict().items() if k != "in_channels"}
    arch_kwargs |= {} if decoder_width is None else {"decoder_width": decoder_width}
    class_name = network or KINDS[spec.kind].network
    architecture = {"network_class_name": class_name, "arch_kwargs": arch_kwargs, "_kw_requires_import": []}
    fixed = {"patch_size": list(spec.img_size), "batch_size": batch_size, "architecture": architecture}
    # the arrays of pretraining have no labels, whether there are some or not
    fixed |= resampling(volume.interpolation, 0 if section is None else len(raw.dataset_json["labels"]))
    _copy_descriptions(raw)
    folder = nnunet_folder("nnUNet_preprocessed") / raw.name
    with prints_to_log(), telling_disk_errors(folder), scratch_folder(folder) as scratch:
        planner = _ViTPlanner(raw, plans_name, volume, fixed)
        # nnU-Net copies dataset.json in place, into the folder of this name
        planner.dataset_name = f"{raw.name}/{scratch.name}"
        plans = {**planner.plan_experiment(), "dataset_name": raw.name}
    if section is not None:
        plans[PLANS_KEY] = asdict(section)
        plans["configurations"][CONFIGURATION]["data_identifier"] = _shared_identifier(plans)
    return json.loads(json.dumps(plans))


def _shared_identifier(plans: dict[str, Any]) -> str:
    """Folder of the arrays: the same for all plans that make the same ones; plans that are made anew keep theirs."""
    settings = json.loads(json.dumps(array_settings(plans)))
    old = read_plans(check_plans_name(plans["dataset_name"], plans["plans_name"]))
    if old is not None and array_settings(old) == settings:
        return old["configurations"][CONFIGURATION]["data_identifier"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"hiendmae_{CONFIGURATION}_{digest[:8]}"


def _copy_descriptions(raw: RawDataset) -> None:
    """What nnU-Net's planner copies in place, whole or not at all: on a full disk, or killed, it leaves half a file."""
    folder = nnunet_folder("nnUNet_preprocessed") / raw.name
    if (raw.folder / SPLITS).exists():
        # nnU-Net compares them
        for file in filter(Path.exists, (raw.folder / SPLITS, folder / SPLITS)):
            read_json(file, Folds, f"mend or remove it; the one in {folder} is a copy, or made by nnUNetv2_train")
    for name in ("dataset.json", SPLITS):
        source = raw.folder / name
        if source.is_file() and not (name == SPLITS and (folder / SPLITS).exists()):
            write_with(folder / name, partial(shutil.copyfile, source))


def save_plans(plans: dict[str, Any]) -> Path:
    """Writes `$nnUNet_preprocessed/<dataset>/<plans_name>.json`. Plans of ours with the same name are replaced; when
    data preprocessed with them, or folds that they trained, no longer fit, a warning is logged.

    Raises:
        UserError: see `check_plans_name`.
    """
    path = check_plans_name(plans["dataset_name"], plans["plans_name"])
    old = read_plans(path)
    folder = None if old is None else data_folder(path)
    write_text(path, json.dumps(plans, indent=4) + "\n")
    _warn_of_trained_folds(plans)
    if folder is None or not folder.is_dir():
        return path
    # other statistics may mean other images
    before, now = ((array_settings(p), p[INTENSITIES]) for p in (old, plans))
    if before != now:
        told, now_in = f"{folder} was preprocessed with other settings than {path.name} now has", data_folder(path)
        again = preprocess_command(plans["dataset_name"], plans["plans_name"], CONFIGURATION)
        mend = f"run: {again}" if now_in == folder else "delete it if no plans name it"
        logger.warning(f"{told}; {mend}")
    return path


def _warn_of_trained_folds(plans: dict[str, Any]) -> None:
    """Says so where models of these plans were trained with others of the same name: nnU-Net goes by the name."""
    # nothing is trained yet where it is not set
    results = os.environ.get("nnUNet_results")  # noqa: SIM112 (nnU-Net spells it so)
    name = plans["plans_name"]
    for file in sorted(Path(results or "").glob(f"{plans['dataset_name']}/*__{name}__{CONFIGURATION}/{MODEL_PLANS}")):
        folds = trained_folds(file.parent)
        if results and folds and (told := str(changes_in_model(file.parent, plans))):
            logger.warning(
                f"{file.parent} has fold {', '.join(folds)} of other plans {name}: {told}; they do not go together "
                f"with what {name} trains now: plan under another --name, or move that folder away"
            )


def read_plans(path: Path) -> dict[str, Any] | None:
    """What a plans file holds; None where there is no file. Refuses what is no plans file (UserError)."""
    return read_json(path, Plans, "restore it, or plan again under another name") if path.exists() else None


def data_folder(path: Path) -> Path:
    """Where nnU-Net keeps the cases that are preprocessed with the plans at `path`."""
    return path.parent / read_plans(path)["configurations"][CONFIGURATION]["data_identifier"]


def is_preprocessed(folder: Path, case: str) -> bool:
    """Whether a folder of arrays holds a case."""
    return all((folder / f"{case}{end}").is_file() for end in CASE_FILES)


def changed_since(folder: Path, files: Mapping[str, Iterable[str]]) -> list[str]:
    """Cases of which a file was changed, or put there, after their array in a folder was written."""
    return [case for case, of_case in files.items() if _is_older(folder / f"{case}{CASE_FILES[-1]}", of_case)]


def _is_older(array: Path, files: Iterable[str]) -> bool:
    there = [Path(file) for file in files if Path(file).is_file()]
    return array.is_file() and any(file.stat().st_mtime_ns > array.stat().st_mtime_ns for file in there)


def check_plans_name(dataset_name: str, plans_name: str, for_pretraining: bool = False) -> Path:
    """Path that plans of this name have or would have. `for_pretraining`: plans that fine-tune are refused too.

    Raises:
        UserError: the name cannot be used, or a file that is not ours stands there.
    """
    # nnU-Net takes folder names apart at "__"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plans_name) or "__" in plans_name:
        told = f"plans name '{plans_name}' needs letters, digits and single '_', '-', '.'"
        raise UserError(f"{told}; choose another one (plan: --name, preprocess: -p)")
    path = nnunet_folder("nnUNet_preprocessed") / dataset_name / f"{plans_name}.json"
    if path.is_file() and not _is_ours(path, for_pretraining):
        maker = "hiendmae preprocess" if for_pretraining else "hiendmae"
        told = f"{path} was not made by {maker} and is never overwritten"
        raise UserError(f"{told}; choose another name (plan: --name, preprocess: -p)")
    return path


def _is_ours(path: Path, for_pretraining: bool) -> bool:
    try:
        plans = read_plans(path)
        network = plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"]
    except (UserError, KeyError):
        return False
    return not for_pretraining if PLANS_KEY in plans else network.startswith("nnunetv2_hiendmae.")


def _refuse_if_smaller_than_voxels(name: str, fingerprint: dict[str, Any], target: tuple[float, ...] | None) -> None:
    shapes, spacings = fingerprint["shapes_after_crop"], fingerprint["spacings"]
    left = [compute_new_shape(shape, mm, target or mm) for shape, mm in zip(shapes, spacings, strict=True)]
    if np.median(left, axis=0).min() >= 1:
        return
    shape, mm = (np.median(values, axis=0) for values in (shapes, spacings))
    size = " × ".join(f"{s:.3g}" for s in shape * mm)
    told = f"volumes of {name} have {[int(s) for s in shape]} voxels and {size} mm (D × H × W, median)"
    unit = "; the unit in the header may be µm, which nnU-Net takes for mm" if mm.max() < _SMALLEST_MM else ""
    given = " ".join(f"{s:g}" for s in mm)
    raise UserError(f"{told}, less than half a voxel of {target} mm; choose another one: --spacing {given}{unit}")


class _ViTPlanner(ExperimentPlanner):
    """nnU-Net's planner; only what differs for a fixed network is overridden. `fixed`: what the configuration must
    hold, whatever nnU-Net would choose.
    """

    def __init__(self, raw: RawDataset, plans_name: str, volume: VolumeFormat, fixed: dict[str, Any]):
        try:
            # the encoder's axes are the array's: no transposing
            spacing = volume.spacing_mm
            super().__init__(raw.name, plans_name=plans_name, overwrite_target_spacing=spacing, suppress_transpose=True)
        except (AssertionError, IndexError) as e:
            there = nnunet_folder("nnUNet_preprocessed") / raw.name
            raise UserError(
                f"{raw.folder / SPLITS} and {there / SPLITS} contradict each other; remove the one you do not want"
            ) from e
        # complete, where a dataset for pretraining lacks what the planner reads
        self.dataset_json = raw.dataset_json
        # 0: never a 3d_lowres configuration
        self.lowres_creation_threshold = 0
        self.fixed, self.volume = fixed, volume
        median_shape = np.median(self.dataset_fingerprint["shapes_after_crop"], axis=0)
        if min(median_shape) <= 1:
            raise UserError(
                f"{raw.name} is 2D (median shape {[int(s) for s in median_shape]}), needed 3D volumes: the encoder is "
                f"a 3D ViT; use nnU-Net itself: nnUNetv2_train {shlex.quote(raw.name)} 2d 0"
            )
        name = volume.image_reader_writer
        self.reader = find_reader(name) if name else choose_reader(raw)
        _refuse_if_smaller_than_voxels(raw.name, self.dataset_fingerprint, spacing)
        properties = self.dataset_fingerprint[INTENSITIES]
        for i, channel in enumerate(raw.channels):
            if is_ct(channel):
                properties[str(i)] = {**properties.get(str(i), {}), **volume.ct_statistics}

    def determine_reader_writer(self):
        return self.reader

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self):
        schemes, self.masks_by_rule = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if scheme := self.volume.scheme_of_all:
            schemes, self.masks_by_rule = [scheme] * len(schemes), [False] * len(schemes)
        return schemes, self.volume.masks(schemes, self.masks_by_rule)

    @staticmethod
    def static_estimate_VRAM_usage(*args, **kwargs):
        # nnU-Net's U-Net is not the network that will be trained: do not build it only to weigh it
        return 1

    def get_plans_for_configuration(self, *args, **kwargs):
        return {**super().get_plans_for_configuration(*args, **kwargs), **self.fixed}

    def save_plans(self, plans):
        """Completes them; writing is left to our `save_plans`."""
        plans["configurations"] = {CONFIGURATION: plans["configurations"][CONFIGURATION]}
        if plans["configurations"][CONFIGURATION]["use_mask_for_norm"] != self.masks_by_rule:
            which = "all voxels" if any(self.masks_by_rule) else "voxels that are not 0"
            logger.info("z-scores are those of %s, as in the encoder's images; nnU-Net's rule has it otherwise", which)
        # nnU-Net looks this class up by name inside nnunetv2
        plans["experiment_planner_used"] = ExperimentPlanner.__name__
        recursive_fix_for_json_export(plans)
