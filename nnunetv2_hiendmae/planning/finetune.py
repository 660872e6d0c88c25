"""From an encoder file and a dataset to plans for fine-tuning, and the stock commands that follow."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnunetv2_hiendmae.architectures import KINDS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_id, dataset_name
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.options.commands import UNETR, PlanOptions
from nnunetv2_hiendmae.planning.dataset import (
    RawDataset,
    is_ct,
    read_fingerprint,
    read_raw_dataset,
)
from nnunetv2_hiendmae.planning.labels import check_label_files, check_labels, extract_fingerprint
from nnunetv2_hiendmae.planning.messages import decisions, next_commands
from nnunetv2_hiendmae.planning.plans import (
    CONFIGURATION,
    changed_since,
    check_plans_name,
    data_folder,
    is_preprocessed,
    make_plans,
    save_plans,
)
from nnunetv2_hiendmae.planning.readers import choose_reader, find_reader, told_directions, told_places
from nnunetv2_hiendmae.planning.splits import first_fold
from nnunetv2_hiendmae.plans_section import FinetuneRecipe, PlansSection
from nnunetv2_hiendmae.recipes import SCRATCH_LR, recipe_of, trainer_of
from nnunetv2_hiendmae.volume_format import DEFAULT_INTERPOLATION, REORIENTING, VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata, check_encoder_file
from nnunetv2_hiendmae.weights.hub import hub_name, lasting_path, local_file

WARMUP_FRACTION = 0.1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFinetuning:
    """What `plan_finetuning` wrote.

    Args:
        path: of the plans.
        messages: what was decided and why, a line each.
        next_commands: stock nnU-Net commands that preprocess (where the arrays are not there yet), train fold 0 and
            predict.
    """

    path: Path
    plans_name: str
    dataset_id: int
    dataset_name: str
    trainer: str
    messages: tuple[str, ...]
    next_commands: tuple[str, ...]


def plan_finetuning(
    dataset: str | int, encoder_file: str | Path, options: PlanOptions | None = None, **changes: Any
) -> PlannedFinetuning:
    """Writes plans for fine-tuning an encoder, or for training its architecture from scratch.

    What the options leave open comes from the encoder file (architecture, spacing, window, reader) or from its
    method's recipe; warm-up is a tenth of `epochs` when only those are given, and `lr` is that from scratch too where
    this is what is planned. A window is ignored, with a warning, where no channel is CT. Plans with a frozen encoder,
    or with the encoder's own network, get names of their own. Runs nnU-Net's own fingerprint extraction where there is
    no fingerprint, or one made without labels.

    Args:
        dataset: id or full name; needs labels.
        encoder_file: its architecture is used; its weights unless `from_scratch`.
        changes: fields of `PlanOptions` that differ from `options`.

    Raises:
        UserError: the dataset, the file or a value does not fit; nothing was written then.
    """
    options = replace(options or PlanOptions(), **changes)
    if options.epochs is not None and options.warmup_epochs is None:
        options = replace(options, warmup_epochs=int(WARMUP_FRACTION * options.epochs))
    if options.from_scratch and options.scratch_lr is None:
        options = replace(options, scratch_lr=options.lr)
    raw = read_raw_dataset(dataset_name(dataset))
    encoder_file = local_file(encoder_file)
    metadata = _known_metadata(encoder_file)
    method = None if options.from_scratch else metadata.method
    trainer, recipe = trainer_of(method), recipe_of(metadata.method)
    frozen = "_frozen" if options.freeze_encoder else ""
    own = f"_{options.network}" if options.network not in (None, UNETR) else ""
    plans_name = options.plans_name or trainer.replace("nnUNetTrainer", "nnUNetPlans") + own + frozen
    check_plans_name(raw.name, plans_name)
    check_labels(raw)
    given = {k: v for k, v in asdict(options).items() if v is not None and v is not False}
    frozen_lr = {"lr": recipe.frozen_lr} if options.freeze_encoder and recipe.frozen_lr is not None else {}
    values = {**asdict(recipe), **asdict(recipe.finetune), "scratch_lr": SCRATCH_LR, **frozen_lr, **given}
    try:
        spec = _finetuning_spec(metadata.spec, raw.channels, values)
        network = _network(spec, options)
        volume = _fit_volume(metadata.volume, raw, options)
        _check_channels(metadata, volume, raw.channels)
        finetune = FinetuneRecipe(**{f.name: values[f.name] for f in fields(FinetuneRecipe)})
    except ValueError as e:
        raise UserError(f"{e}; change it and run hiendmae plan again") from e
    section = PlansSection(recipe=finetune)
    if method is not None:
        file = str(lasting_path(encoder_file))
        section = PlansSection(method, file, sha256(encoder_file), finetune, metadata.citations)

    reader = find_reader(volume.image_reader_writer)
    if read_fingerprint(raw.name, with_labels=True) is None:
        logger.info("extracting the fingerprint of %s", raw.name)
        extract_fingerprint(raw, reader, options.num_processes)
    else:
        # nnU-Net looks at label values only where it is asked to
        check_label_files(raw, reader, options.num_processes)
    if told := told_places(raw):
        logger.warning(told)
    if options.network in KINDS[spec.kind].own_networks:
        values["decoder_width"] = None
    plans = make_plans(
        raw,
        plans_name,
        spec,
        volume,
        decoder_width=values["decoder_width"],
        batch_size=values["batch_size"],
        section=section,
        network=network,
    )
    path = save_plans(plans)
    _warn_of_padding(plans["configurations"][CONFIGURATION]["median_image_size_in_voxels"], spec)
    messages = decisions(section, spec, volume, metadata, raw.channels, values, given)
    number = dataset_id(raw.name)
    preprocess, *commands = next_commands(
        raw, number, plans_name, trainer, options.num_processes, first_fold(raw, path.parent)
    )
    folder = data_folder(path)
    changed = changed_since(folder, {case: (*images, raw.labels[case]) for case, images in raw.cases.items()})
    if changed or not all(is_preprocessed(folder, case) for case in raw.cases):
        commands = [preprocess, *commands]
    else:
        told = f"arrays: those in {folder.name} are complete and fit; where images or labels changed since, run"
        messages = (*messages, f"{told}: {preprocess}")
    if changed:
        told = f"images or labels of {some(changed)} are newer than their arrays in {folder.name}"
        logger.warning(f"{told}: where voxels changed, preprocess them again")
    return PlannedFinetuning(path, plans_name, number, raw.name, trainer, messages, tuple(commands))


def _known_metadata(encoder_file: Path) -> EncoderMetadata:
    try:
        metadata = check_encoder_file(encoder_file)
    except UserError as e:
        if encoder_file.suffix not in (".pth", ".pt", ".ckpt", ".bin"):
            raise
        again = f"hiendmae convert {shlex.quote(hub_name(encoder_file) or str(encoder_file))} -o encoder.safetensors"
        raise UserError(f"{encoder_file} is a checkpoint, needed an encoder file; run: {again}") from e
    return metadata


def _network(spec: EncoderSpec, options: PlanOptions) -> str:
    """Dotted name of the segmentation network that was asked for; ValueError where it does not read the encoder."""
    encoder = KINDS[spec.kind]
    if options.network in (None, UNETR):
        return encoder.network
    if options.network not in encoder.own_networks:
        told = f"--network {options.network} reads no encoder of kind '{spec.kind}'"
        raise ValueError(f"{told}, needed {' or '.join((UNETR, *encoder.own_networks))}")
    if options.decoder_width is not None:
        raise ValueError(f"--decoder-width {options.decoder_width}: the network '{options.network}' has none")
    name = encoder.own_networks[options.network]
    resolve_name(name).check_spec(spec)
    return name


def _step(spec: EncoderSpec) -> tuple[int, ...]:
    """What each axis of the crop is a multiple of, in voxels."""
    return tuple(p * KINDS[spec.kind].tokens_per_step for p in spec.patch_size)


def _multiple(size: Sequence[float], step: Sequence[int]) -> tuple[int, ...]:
    """The nearest size that has whole steps, at least one."""
    return tuple(max(1, round(s / p)) * p for s, p in zip(size, step, strict=True))


def _warn_of_padding(median: Sequence[float], spec: EncoderSpec) -> None:
    """Says by which crop more of what the encoder sees would be image, where that is half a step or more."""
    fitting = tuple(map(min, spec.img_size, _multiple(median, _step(spec))))
    if fitting == spec.img_size:
        return
    shape, crop = (" x ".join(f"{n:g}" for n in numbers) for numbers in (median, spec.img_size))
    mend = f": --patch-size {' '.join(map(str, fitting))} would see less of it" if fitting != _step(spec) else ""
    told = f"images have a median of {shape} voxels, the crop {crop}: beyond an image the encoder sees padding"
    logger.warning(f"{told}, which is rare in pretraining on larger ones{mend}")


def _finetuning_spec(source: EncoderSpec, channels: tuple[str, ...], values: dict[str, Any]) -> EncoderSpec:
    """The encoder of the segmentation network: no CLS, trainable positions, the dataset's channels and crop; that of
    the file within the recipe's limit, where none is given."""
    if source.in_channels not in (1, len(channels)):
        raise ValueError(
            f"the encoder has {source.in_channels} input channels, the dataset {len(channels)}: only 1 can be spread"
        )
    limits = zip(source.img_size, values["crop_limit"] or source.img_size, source.patch_size, strict=True)
    own = tuple(min(size, max(p, most // p * p)) for size, most, p in limits)
    size = tuple(values.get("patch_size", own))
    if len(size) != 3:
        raise ValueError(f"patch size {size} needs three axes D, H, W: 2D is not supported")
    step = _step(source)
    fitting = _multiple(size, step)
    if size != fitting:
        raise ValueError(f"patch size {size}: each axis must be a multiple of {step} for this encoder, e.g. {fitting}")
    if size == step:
        raise ValueError(f"patch size {size} is the smallest step of this encoder, needed at least two; make it larger")
    return source.with_(
        cls_token=False,
        pos_embed="learned",
        in_channels=len(channels),
        img_size=size,
        drop_path_rate=values["drop_path_rate"],
        **KINDS[source.kind].finetuning,
    )


def _check_channels(metadata: EncoderMetadata, volume: VolumeFormat, names: tuple[str, ...]) -> None:
    """Several channels must be those of pretraining; one may be spread over others, with a warning."""
    seen = metadata.volume.channel_names
    if len(seen) > 1 and [n.casefold() for n in seen] != [n.casefold() for n in names]:
        raise ValueError(
            f"the encoder was trained on the channels {', '.join(seen)}, the dataset has {', '.join(names)}: needed "
            "the same, in the same order"
        )
    if metadata.spec.in_channels == 1 and len(names) > 1:
        told = f"the encoder saw one channel, the dataset has {len(names)}"
        logger.warning(f"{told}: its kernel is spread over them, each gets 1/{len(names)} of it")
    schemes = metadata.volume.normalization_schemes
    others = [n for n in names if get_normalization_scheme(n).__name__ not in schemes]
    if others and schemes and volume.scheme_of_all is None:
        known = ", ".join(seen or sorted(set(schemes)))
        logger.warning("%s: normalised otherwise than what the encoder was trained on (%s)", ", ".join(others), known)


def _fit_volume(seen: VolumeFormat, raw: RawDataset, options: PlanOptions) -> VolumeFormat:
    """How the dataset's volumes become arrays: as in pretraining where the dataset allows it."""
    reader = choose_reader(raw, seen.image_reader_writer, options.reader)
    if reader.__name__ not in REORIENTING and (told := told_directions([raw])):
        logger.warning(f"{told}, and {reader.__name__} leaves them so; --reader {REORIENTING[0]} turns them all to RAS")
    volume = seen.overridden(options.spacing_mm, options.window_hu, options.interpolation)
    interpolation = volume.interpolation or DEFAULT_INTERPOLATION
    volume = replace(volume, image_reader_writer=reader.__name__, interpolation=interpolation)
    if any(map(is_ct, raw.channels)):
        return volume
    if volume.window_hu is not None:
        logger.warning("no channel of %s is CT: the window is ignored, nnU-Net's normalisation is used", raw.channels)
    return replace(volume, window_hu=None)
