"""What a pretraining run computes: options of the user over defaults of the method and the preset."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.method import Method, parse_options
from nnunetv2_hiendmae.training.launch import choose_precision, num_processes
from nnunetv2_hiendmae.training.run_folder import RunSettings
from nnunetv2_hiendmae.training.volumes import CaseSet, find_cases


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings, PretrainOptions):
    """What a run computes, and how: its options, all decided.

    Args:
        options: of the method; `betas`: of AdamW.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    options: dict[str, Any]
    spec: EncoderSpec
    betas: tuple[float, float]

    keys: ClassVar = (
        *("datasets", "plans_name", "configuration", "method", "options", "spec", "epochs", "steps_per_epoch"),
        *("warmup_epochs", "batch_size", "accumulate", "lr", "weight_decay", "betas", "precision", "seed"),
        *("checkpoint_epochs", "picture_epochs"),
    )
    not_deciding: ClassVar = ("accumulate", "checkpoint_epochs", "picture_epochs")

    def __post_init__(self):
        super().__post_init__()
        if self.spec.drop_path_rate:
            # its draws come from the global generator: neither stateless nor in the checkpoint
            raise UserError(
                f"drop_path_rate {self.spec.drop_path_rate} is for fine-tuning only, needed 0 in pretraining"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak learning rate."""
        return self.warmup_epochs * self.steps_per_epoch

    def build_method(self) -> Method:
        """The method with freshly initialised weights; the same ones for the same seed."""
        torch.manual_seed(self.seed)
        try:
            return METHODS[self.method](self.spec, **self.options)
        except (ValueError, AssertionError, RuntimeError) as e:
            # timm and torch check sizes with assertions and runtime errors
            raise UserError(f"{self.method} cannot be built with {self.options}: {e}; change --set") from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PretrainSettings":
        """Inverse of `to_dict`; how a run is carried out is as by default.

        Raises:
            ValueError, TypeError: keys are missing or unknown, or a value is not of its kind.
            UserError: a value is out of range.
        """
        if differing := set(data) ^ set(cls.keys):
            raise ValueError(f"missing or unknown: {', '.join(sorted(differing))}")
        as_tuples = {name: tuple(data[name]) for name in ("datasets", "betas")}
        return cls(**{**data, **as_tuples, "spec": EncoderSpec.from_dict(data["spec"])})


def build_settings(datasets: Iterable[str | int], options: PretrainOptions) -> tuple[PretrainSettings, CaseSet]:
    """Settings and data of a run.

    Raises:
        UserError: unknown method, preset or option, a crop that the patch does not divide, or no such data.
    """
    if options.method not in METHODS:
        raise UserError(f"unknown method '{options.method}', needed one of {', '.join(METHODS)}; see: hiendmae methods")
    method = METHODS[options.method]
    method_options = _method_options(method, options.method_options or ())
    data = find_cases(datasets, options.plans_name, options.configuration)
    recipe = method.recipe
    epochs, batch_size = options.epochs or recipe.epochs, options.batch_size or recipe.batch_size
    values = {
        **vars(recipe),
        "warmup_epochs": min(recipe.warmup_epochs, epochs // 10),
        # fewer micro-batches where the batch of a process cannot be split into as many
        "accumulate": math.gcd(recipe.accumulate, batch_size // num_processes()),
        **{name: value for name, value in vars(options).items() if value is not None},
        "datasets": data.datasets,
        "options": method_options,
        "spec": _spec(options, options.encoder or recipe.encoder, len(data.format.channel_names)),
        "precision": choose_precision(options.precision, options.device),
    }
    settings = PretrainSettings(**values)
    with torch.device("meta"):
        # what cannot be built is told before anything is written
        settings.build_method()
    return settings, data


def run_name(settings: PretrainSettings) -> str:
    """Default name of a run: method, preset and dataset ids."""
    return "_".join([settings.method, settings.encoder, *(name[7:10] for name in settings.datasets)])


def _method_options(method: type[Method], asked: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method from texts `key=value`, or as they are."""
    if not isinstance(asked, Mapping):
        return parse_options(method, list(asked))
    unknown = [name for name in asked if name not in method.defaults()]
    if unknown:
        raise UserError(f"{unknown[0]} is no option of {method.name}, needed some of: {', '.join(method.defaults())}")
    return dict(asked)


def _spec(options: PretrainOptions, preset: str, channels: int) -> EncoderSpec:
    if preset not in PRESETS:
        raise UserError(f"unknown encoder '{preset}', needed one of {', '.join(PRESETS)}; see: hiendmae presets")
    sizes = {"patch_size": options.patch_size, "img_size": options.crop_size}
    try:
        return PRESETS[preset].with_(in_channels=channels, **{k: tuple(v) for k, v in sizes.items() if v})
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the patch, or another --patch-size") from e
