"""What in nnU-Net's plans decides arrays, network and training, and where two plans of one name differ in it: nnU-Net
tells models by the name of their plans, and uses what stands under that name now."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.plans_section import PLANS_KEY
from nnunetv2_hiendmae.schemas import CT_SCHEME
from nnunetv2_hiendmae.volume_format import interpolation_of

CONFIGURATION = "3d_fullres"
# nnU-Net's name of the statistics, per channel, that its CT normalisation takes the window from
INTENSITIES = "foreground_intensity_properties_per_channel"
# in the folder of a model: those that its last training started with
MODEL_PLANS = "plans.json"
# stands among the arguments of the network, and changes neither its weights nor what it predicts
_DROP_PATH = "drop_path_rate"
# of a sha256, as people compare them
_DIGITS = 8


def array_settings(plans: Mapping[str, Any], configuration_name: str = CONFIGURATION) -> dict[str, Any]:
    """What in plans decides how a volume becomes an array."""
    configuration = plans["configurations"][configuration_name]
    schemes = configuration["normalization_schemes"]
    used = ("percentile_00_5", "percentile_99_5", "mean", "std")
    return {
        "spacing": configuration["spacing"],
        "normalisation": schemes,
        "use_mask_for_norm": configuration["use_mask_for_norm"],
        # nnU-Net's other schemes look at the image alone
        "CT window": [[plans[INTENSITIES][str(i)][k] for k in used] for i, s in enumerate(schemes) if s == CT_SCHEME],
        "interpolation": interpolation_of(configuration),
        "reader": plans["image_reader_writer"],
        "axes": plans["transpose_forward"],
    }


@dataclass(frozen=True)
class Changes:
    """Where plans differ from former ones of the same name, 'spacing was …, is …' each.

    Args:
        model: what a trained network and prediction with it depend on: arrays and network.
        encoder: the encoder file that training starts from.
        recipe: what else the training depends on.
    """

    model: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join((*self.model, *self.encoder, *self.recipe))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], configuration_name: str = CONFIGURATION) -> Changes:
    """What differs in a configuration of plans, stock or ours; nothing where these are no whole plans."""
    told = []
    for part in (_model, _encoder, _recipe):
        with suppress(LookupError, TypeError, AttributeError):
            old, new = part(before, configuration_name), part(now, configuration_name)
            # what only one of them names came with another version, whose default it is
            keys = [key for key in old if key in new and old[key] != new[key]]
            told.append(tuple(f"{key} was {old[key]}, is {new[key]}" for key in keys))
    return Changes(*told) if len(told) == len(fields(Changes)) else Changes()


def changes_in_model(model: Path, now: Mapping[str, Any], configuration_name: str = CONFIGURATION) -> Changes:
    """What differs from the plans in the folder of a model; nothing where they cannot be read."""
    with suppress(OSError, ValueError):
        return changes(json.loads((model / MODEL_PLANS).read_bytes()), now, configuration_name)
    return Changes()


def trained_folds(model: Path) -> list[str]:
    """Folds with weights in the folder of a model, sorted: "0" or "all"."""
    return sorted({file.parent.name.removeprefix("fold_") for file in model.glob("fold_*/checkpoint_*.pth")})


def _model(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    network, arguments = _network(plans, name)
    kept = {f"network's {key}": value for key, value in arguments.items() if key != _DROP_PATH}
    return {**array_settings(plans, name), "network": network, **kept}


def _encoder(plans: Mapping[str, Any], _: str) -> dict[str, Any]:
    section = plans.get(PLANS_KEY) or {}
    # where it lies does not matter
    return {"sha256 of the encoder file": (section.get("encoder_sha256") or "none")[:_DIGITS]}


def _recipe(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    recipe = (plans.get(PLANS_KEY) or {}).get("recipe", {})
    batch_size = plans["configurations"][name].get("batch_size")
    return {"batch size": batch_size, "drop path": _network(plans, name)[1].get(_DROP_PATH), **recipe}


def _network(plans: Mapping[str, Any], name: str) -> tuple[str | None, dict[str, Any]]:
    """Class and arguments."""
    architecture = plans["configurations"][name].get("architecture", {})
    return architecture.get("network_class_name"), architecture.get("arch_kwargs", {})
