"""Checkpoints of nnU-Net's trainers: what the plans in them say about the encoder of a network of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from nnunetv2_hiendmae.architectures import KINDS, EncoderSpec
from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.plans_section import PLANS_KEY, PlansSection
from nnunetv2_hiendmae.schemas import Plans, validated
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata
from nnunetv2_hiendmae.weights.hub import source_name

NETWORK, TRAINER = "network_weights", "trainer_name"


class _Arguments(TypedDict):
    """What is needed of a trainer's arguments."""

    __pydantic_config__ = ConfigDict(extra="ignore")
    plans: Plans
    configuration: str
    dataset_json: dict[str, Any]


def is_nnunet_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file is a checkpoint of an nnU-Net trainer."""
    return isinstance(content.get(NETWORK), Mapping) and {TRAINER, "init_args"} <= content.keys()


def plans_of(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], VolumeFormat]:
    """A trainer's plans, its configuration with what that inherits, and how images became arrays, in the axes of the
    network. UserError: they are damaged."""
    try:
        plans, configuration = _planned(arguments)
        if len(configuration["patch_size"]) != 3:
            raise ValueError(f"their patch {configuration['patch_size']} has not three axes")
        return plans, configuration, VolumeFormat.of_plans(plans, configuration, arguments["dataset_json"])
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        told = printable(f"{type(e).__name__}: {e}", LONGEST_ERROR)
        raise UserError(f"the plans in this checkpoint of nnU-Net are damaged ({told})") from e


def nnunet_metadata(content: Mapping[str, Any], source: Path, default_method: str) -> EncoderMetadata:
    """What the encoder of a checkpoint's network is and saw. `default_method`: of one that was trained from scratch.

    Raises:
        UserError: the network has no encoder of ours, or the plans are damaged.
    """
    trainer = printable(content[TRAINER])
    try:
        arguments = content["init_args"]
        plans, configuration = _planned(arguments)
        network = configuration.get("architecture", {"network_class_name": "a network of old plans"})
        name = network["network_class_name"]
        if not name.startswith("nnunetv2_hiendmae."):
            raise UserError(
                f"{source} is a checkpoint of nnU-Net's {trainer} with {printable(name)}, which has no encoder that "
                "could be taken: only networks that hiendmae plan planned have one"
            )
        if list(plans["transpose_forward"]) != [0, 1, 2]:
            raise ValueError(f"they transpose the axes to {plans['transpose_forward']}")
        volume = VolumeFormat.of_plans(plans, configuration, arguments["dataset_json"])
        spec = _spec(network["arch_kwargs"], len(volume.normalization_schemes))
        section = PlansSection.from_dict(plans.get(PLANS_KEY, {}))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        told = printable(f"{type(e).__name__}: {e}", LONGEST_ERROR)
        raise UserError(f"{source}: the plans in this checkpoint of nnU-Net's {trainer} are damaged ({told})") from e
    return EncoderMetadata(
        spec,
        section.method or default_method,
        volume,
        section.citations,
        source=source_name(source),
        source_sha256=sha256(source),
        notes=(f"the encoder of a network that {trainer} trained on {printable(plans['dataset_name'])}",),
    )


def _planned(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trainer's plans, and its configuration with what that inherits."""
    validated(_Arguments, json.dumps(arguments, default=str))
    plans, name = arguments["plans"], arguments["configuration"]
    left, whole = dict(plans["configurations"]), {}
    while name is not None:
        found = left.pop(name)
        whole, name = {**found, **whole}, found.get("inherits_from")
    return plans, whole


def _spec(values: dict[str, Any], channels: int) -> EncoderSpec:
    fields = {k: v for k, v in values.items() if k != "decoder_width"}
    finetuning = KINDS[fields.get("kind", EncoderSpec.kind)].finetuning
    return EncoderSpec.from_dict({"in_channels": channels, **fields, **finetuning})
