"""Settings of `hiendmae preprocess`, and the plans that carry them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.planning.plans import (
    CONFIGURATION,
    PLANS_KEY,
    check_plans_name,
    is_ours,
    write_plans,
)
from nnunetv2_hiendmae.preprocessing.cases import RawDataset
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, RECIPES, MethodRecipe
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import read_metadata

DEFAULT_PRESET = "vit_base_p16"


@dataclass(frozen=True)
class Settings:
    """How volumes become arrays, the encoder that the plans name, and the recipe for what else plans must hold."""

    volume: VolumeFormat
    spec: EncoderSpec
    recipe: MethodRecipe


def choose_settings(
    like: str | Path | None, spacing_mm: Sequence[float] | None, window_hu: Sequence[float] | None
) -> Settings:
    """Settings of a method or of an encoder file, with what was given explicitly put over them.

    Args:
        like: name of a method, or path of an encoder file; None: the default method.
        spacing_mm: target spacing (D, H, W).
        window_hu: CT window (lo, hi).

    Raises:
        UserError: no such method or file, or numbers that make no sense.
    """
    like = DEFAULT_METHOD if like is None else str(like)
    if like in RECIPES:
        recipe, spec = RECIPES[like], PRESETS[DEFAULT_PRESET]
        volume = recipe.volume
    elif Path(like).is_file():
        metadata = read_metadata(Path(like))
        recipe, spec = RECIPES.get(metadata.method, RECIPES[DEFAULT_METHOD]), metadata.spec
        volume = metadata.volume
    else:
        raise UserError(f"--like '{like}' is neither a method ({', '.join(RECIPES)}) nor an existing encoder file")
    try:
        volume = volume.overridden(spacing_mm, window_hu)
    except (ValueError, TypeError) as e:
        raise UserError(f"{e}; check --spacing and --window") from e
    return Settings(volume, spec, recipe)


def plans_path(dataset: str, plans_name: str) -> Path:
    """Where the plans are or will be.

    Raises:
        UserError: the name cannot be used, or belongs to plans that are not for pretraining.
    """
    path = nnunet_folder("nnUNet_preprocessed") / dataset / f"{plans_name}.json"
    if path.is_file() and (not is_ours(path) or PLANS_KEY in json.loads(path.read_text(encoding="utf-8"))):
        raise UserError(f"{path} belongs to fine-tuning or to nnU-Net itself; choose another name with -p")
    return check_plans_name(dataset, plans_name)


def ensure_plans(raw: RawDataset, plans_name: str, settings: Settings) -> Path:
    """Plans file of a dataset with these settings; needs its fingerprint.

    Existing plans that make the same arrays stay as they are; others are replaced, but never while preprocessed
    cases depend on them.

    Raises:
        UserError: the name belongs to plans that are not for pretraining, or existing cases were made otherwise.
    """
    path = plans_path(raw.name, plans_name)
    if not path.is_file():
        return _write_plans(raw, plans_name, settings)
    draft = _write_plans(raw, f"{plans_name}.draft", settings)
    try:
        old, new = _array_settings(path), _array_settings(draft)
    finally:
        draft.unlink()
    changed = [key for key in new if old[key] != new[key]]
    if not changed:
        return path
    folder = data_folder(path)
    if any(folder.glob("*.b2nd")):
        told = ", ".join(f"{key} {old[key]}, now {new[key]}" for key in changed)
        raise UserError(f"{folder} was made with other settings: {told}; choose another name with -p or delete it")
    return _write_plans(raw, plans_name, settings)


def _write_plans(raw: RawDataset, plans_name: str, settings: Settings) -> Path:
    # named even where nnU-Net would choose: it would look at the first image only, which may be broken
    reader = settings.volume.image_reader_writer or raw.reader().__name__
    path = write_plans(
        raw.name,
        plans_name,
        settings.spec,
        replace(settings.volume, image_reader_writer=reader),
        decoder_width=settings.recipe.decoder_width,
        batch_size=settings.recipe.batch_size,
        section=None,
    )
    write_text(path.with_name("dataset.json"), json.dumps(raw.dataset_json, indent=4) + "\n")
    return path


def _array_settings(path: Path) -> dict[str, Any]:
    """What in the plans decides how a volume becomes an array."""
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    schemes = configuration["normalization_schemes"]
    properties = plans["foreground_intensity_properties_per_channel"]
    used = ("percentile_00_5", "percentile_99_5", "mean", "std")
    return {
        "spacing": configuration["spacing"],
        "normalisation": schemes,
        "use_mask_for_norm": configuration["use_mask_for_norm"],
        # nnU-Net's other schemes look at the image alone
        "CT window": [[properties[str(i)][k] for k in used] for i, s in enumerate(schemes) if s == "CTNormalization"],
        "reader": plans["image_reader_writer"],
        "axes": plans["transpose_forward"],
    }


def data_folder(path: Path) -> Path:
    """Where nnU-Net keeps the cases that were preprocessed with these plans."""
    plans = PlansManager(str(path))
    return path.parent / plans.get_configuration(CONFIGURATION).data_identifier
