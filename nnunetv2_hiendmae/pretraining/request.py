"""From what the user asked for to the settings of a run: defaults of the method and the preset, overridden."""

import math
from argparse import Namespace

import torch

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_name
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.checkpoint import PretrainSettings
from nnunetv2_hiendmae.pretraining.data import PretrainData, find_data
from nnunetv2_hiendmae.pretraining.launch import num_processes
from nnunetv2_hiendmae.pretraining.method import PretrainRecipe, parse_options


def build_settings(args: Namespace) -> tuple[PretrainSettings, PretrainData]:
    """Settings and data of `hiendmae pretrain`'s arguments.

    Raises:
        UserError: unknown method, preset or option, a crop that the patch does not divide, or no such data.
    """
    if args.method not in METHODS:
        raise UserError(f"unknown method '{args.method}', needed one of {', '.join(METHODS)}; see: hiendmae methods")
    method = METHODS[args.method]
    recipe, options = method.recipe, parse_options(method, args.options or [])
    # a dataset given twice, by id and by name, is one dataset
    datasets = tuple(dict.fromkeys(dataset_name(d) for d in args.datasets))
    data = find_data(datasets, args.plans, args.configuration)
    epochs = _given(args.epochs, recipe.epochs)
    batch_size = _given(args.batch_size, recipe.batch_size)
    settings = PretrainSettings(
        datasets=datasets,
        plans_name=args.plans,
        configuration=args.configuration,
        method=args.method,
        options=options,
        spec=_spec(args, _given(args.encoder, recipe.encoder), len(data.format.channel_names)),
        epochs=epochs,
        steps_per_epoch=_given(args.steps_per_epoch, recipe.steps_per_epoch),
        warmup_epochs=_given(args.warmup_epochs, min(recipe.warmup_epochs, epochs // 10)),
        batch_size=batch_size,
        accumulate=_given(args.accumulate, _accumulate(recipe, batch_size)),
        lr=_given(args.lr, recipe.lr),
        weight_decay=_given(args.weight_decay, recipe.weight_decay),
        betas=recipe.betas,
        precision=_precision(args),
        seed=args.seed,
        checkpoint_epochs=args.checkpoint_every,
        picture_epochs=args.pictures_every,
    )
    with torch.device("meta"):
        # what cannot be built is told before anything is written
        settings.build_method()
    return settings, data


def run_name(settings: PretrainSettings, preset: str | None) -> str:
    """Default name of a run: method, preset (None: the method's) and dataset ids."""
    preset = _given(preset, METHODS[settings.method].recipe.encoder)
    return "_".join([settings.method, preset, *(name[7:10] for name in settings.datasets)])


def _spec(args: Namespace, preset: str, channels: int) -> EncoderSpec:
    if preset not in PRESETS:
        raise UserError(f"unknown encoder '{preset}', needed one of {', '.join(PRESETS)}; see: hiendmae presets")
    changes = {"in_channels": channels}
    if args.patch_size:
        changes["patch_size"] = tuple(args.patch_size)
    if args.crop_size:
        changes["img_size"] = tuple(args.crop_size)
    try:
        return PRESETS[preset].with_(**changes)
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the patch, or another --patch-size") from e


def _accumulate(recipe: PretrainRecipe, batch_size: int) -> int:
    """The recipe's micro-batches, fewer where the batch of a process cannot be split into as many."""
    return math.gcd(recipe.accumulate, batch_size // num_processes())


def _precision(args: Namespace) -> str:
    if args.precision != "auto":
        return args.precision
    if args.device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _given(value, default):
    return default if value is None else value
