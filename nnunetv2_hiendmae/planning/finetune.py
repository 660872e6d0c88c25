"""From an encoder file and a dataset to plans for fine-tuning, and the stock commands that follow."""

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.planning.dataset import (
    channel_names,
    check_labels,
    ensure_labelled_fingerprint,
    is_ct,
    raw_dataset_json,
)
from nnunetv2_hiendmae.planning.plans import CONFIGURATION, VolumeSettings, check_plans_name, write_plans
from nnunetv2_hiendmae.planning.recipes import RECIPES
from nnunetv2_hiendmae.plans_section import TRAINERS, FinetuneRecipe, PlansSection
from nnunetv2_hiendmae.weights import EncoderMetadata, read_metadata

WARMUP_FRACTION = 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFinetuning:
    """What `plan_finetuning` wrote.

    Args:
        path: of the plans.
        messages: what was decided and why, a line each.
        next_commands: stock nnU-Net commands that preprocess, train fold 0 and predict.
    """

    path: Path
    plans_name: str
    dataset_id: int
    dataset_name: str
    trainer: str
    messages: tuple[str, ...]
    next_commands: tuple[str, ...]


def plan_finetuning(
    dataset: str,
    encoder_file: Path,
    *,
    plans_name: str | None = None,
    from_scratch: bool = False,
    epochs: int | None = None,
    warmup_epochs: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    patch_size: tuple[int, int, int] | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
    window_hu: tuple[float, float] | None = None,
    iterations_per_epoch: int | None = None,
    val_iterations_per_epoch: int | None = None,
    decoder_width: int | None = None,
    num_processes: int = default_num_processes,
) -> PlannedFinetuning:
    """Writes plans for fine-tuning an encoder, or for training its architecture from scratch.

    What is None comes from the encoder file (architecture, spacing, window, reader) or from its method's recipe;
    warm-up is a tenth of `epochs` when only those are given. Runs nnU-Net's own fingerprint extraction where
    there is no fingerprint, or one made without labels.

    Args:
        dataset: id or full name; needs labels.
        encoder_file: its architecture is used; its weights unless `from_scratch`.
        patch_size, spacing_mm: (D, H, W) in voxels and mm.
        window_hu: (lo, hi); ignored, with a warning, where no channel is CT.
        num_processes: for the fingerprint, and in the printed preprocessing command.

    Raises:
        UserError: the dataset, the file or a value does not fit; nothing was written then.
    """
    name = dataset_name(dataset)
    dataset_json = raw_dataset_json(name)
    metadata = _known_metadata(encoder_file)
    method = None if from_scratch else metadata.method
    recipe = RECIPES[metadata.method]
    plans_name = plans_name or TRAINERS[method].replace("nnUNetTrainer", "nnUNetPlans")
    check_plans_name(name, plans_name)
    check_labels(name, dataset_json)

    batch_size = recipe.batch_size if batch_size is None else batch_size
    decoder_width = recipe.decoder_width if decoder_width is None else decoder_width
    if min(batch_size, decoder_width, num_processes) < 1:
        raise UserError(
            f"batch size {batch_size}, decoder width {decoder_width} and {num_processes} processes must be at least 1"
        )
    channels = channel_names(dataset_json)
    try:
        spec = _finetuning_spec(metadata.spec, len(channels), patch_size)
        _check_channels(metadata, channels)
        volume = _volume(metadata, dataset_json, spacing_mm, window_hu)
        finetune = _recipe(
            recipe.finetune,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            lr=lr,
            weight_decay=weight_decay,
            iterations_per_epoch=iterations_per_epoch,
            val_iterations_per_epoch=val_iterations_per_epoch,
        )
    except ValueError as e:
        raise UserError(f"{e}; change it and run hiendmae plan again") from e
    section = PlansSection(recipe=finetune)
    if method is not None:
        file = Path(encoder_file).resolve()
        section = PlansSection(method, str(file), sha256(file), finetune, metadata.citations)

    ensure_labelled_fingerprint(name, num_processes)
    path = write_plans(
        name, plans_name, spec, volume, decoder_width=decoder_width, batch_size=batch_size, section=section
    )
    messages = _messages(section, spec, volume, batch_size, channels)
    number = int(name[7:10])
    commands = _next_commands(number, name, plans_name, TRAINERS[method], num_processes)
    return PlannedFinetuning(path, plans_name, number, name, TRAINERS[method], messages, commands)


def _known_metadata(encoder_file: Path) -> EncoderMetadata:
    metadata = read_metadata(encoder_file)
    if metadata.method not in RECIPES:
        raise UserError(
            f"{encoder_file} was trained with '{metadata.method}', known methods are {', '.join(RECIPES)}; "
            f"see: hiendmae inspect {encoder_file}"
        )
    return metadata


def _finetuning_spec(source: EncoderSpec, channels: int, patch_size: tuple[int, int, int] | None) -> EncoderSpec:
    if source.in_channels not in (1, channels):
        raise ValueError(
            f"the encoder has {source.in_channels} input channels, the dataset {channels}: only 1 can be spread"
        )
    size = tuple(patch_size or source.img_size)
    if len(size) != 3:
        raise ValueError(f"patch size {size} needs three axes D, H, W: 2D is not supported")
    fitting = tuple(max(1, round(s / p)) * p for s, p in zip(size, source.patch_size, strict=True))
    if size != fitting:
        raise ValueError(
            f"patch size {size}: each axis must be a multiple of the encoder's tokens of {source.patch_size} voxels, "
            f"e.g. {fitting}"
        )
    spec = source.with_(cls_token=False, pos_embed="learned", in_channels=channels, img_size=size)
    if spec.num_tokens == 1:
        raise ValueError(f"patch size {size} is a single token of the encoder, needed at least two; make it larger")
    return spec


def _check_channels(metadata: EncoderMetadata, names: tuple[str, ...]) -> None:
    """Several channels must be those of pretraining; one may be spread over others, with a warning."""
    seen = metadata.channel_names
    if len(seen) > 1 and [n.casefold() for n in seen] != [n.casefold() for n in names]:
        raise ValueError(
            f"the encoder was trained on the channels {', '.join(seen)}, the dataset has {', '.join(names)}: needed "
            "the same, in the same order"
        )
    others = [n for n in names if get_normalization_scheme(n).__name__ not in metadata.normalization_schemes]
    if others and metadata.normalization_schemes:
        logger.warning(
            "%s: normalised otherwise than what the encoder was trained on (%s)", ", ".join(others), ", ".join(seen)
        )


def _volume(
    metadata: EncoderMetadata,
    dataset_json: dict[str, Any],
    spacing_mm: tuple[float, float, float] | None,
    window_hu: tuple[float, float] | None,
) -> VolumeSettings:
    volume = VolumeSettings.of(metadata).overridden(spacing_mm, window_hu)
    volume = replace(volume, image_reader_writer=_reader(metadata, dataset_json))
    names = channel_names(dataset_json)
    if any(is_ct(n) for n in names):
        return volume
    if volume.window_hu is not None:
        logger.warning("no channel of %s is CT: the window is ignored, nnU-Net's normalisation is used", names)
    return replace(volume, window_hu=None)


def _reader(metadata: EncoderMetadata, dataset_json: dict[str, Any]) -> str | None:
    """Reader of the pretraining images where it can read the dataset's; None: nnU-Net's choice."""
    name = metadata.image_reader_writer
    if name is None or dataset_json.get("overwrite_image_reader_writer", "None") != "None":
        return None
    try:
        reader = recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        reader = None
    if reader is None or dataset_json["file_ending"].lower() not in reader.supported_file_endings:
        logger.warning(
            "%s cannot read %s: nnU-Net's own reader is used, check that the orientation is the same as in pretraining",
            name,
            dataset_json["file_ending"],
        )
        return None
    return name


def _recipe(base: FinetuneRecipe, **given: Any) -> FinetuneRecipe:
    if given["epochs"] is not None and given["warmup_epochs"] is None:
        given["warmup_epochs"] = int(WARMUP_FRACTION * given["epochs"])
    return replace(base, **{k: v for k, v in given.items() if v is not None})


def _messages(
    section: PlansSection, spec: EncoderSpec, volume: VolumeSettings, batch_size: int, channels: tuple[str, ...]
) -> tuple[str, ...]:
    recipe = section.recipe
    weights = f"{section.method} weights from {section.encoder_file}" if section.encoder_file else "no weights"
    return (
        f"encoder: {spec.depth} blocks of width {spec.embed_dim}, {weights}",
        f"input: {', '.join(channels)}, patch {spec.img_size} voxels, batch {batch_size}",
        f"spacing: {f'{volume.spacing_mm} mm (D, H, W)' if volume.spacing_mm else 'nnU-Net rule'}, "
        f"window: {f'{volume.window_hu} HU' if volume.window_hu else 'none, nnU-Net normalisation'}",
        f"training: {recipe.epochs} epochs of {recipe.iterations_per_epoch} iterations, {recipe.warmup_epochs} of "
        f"warm-up, lr {recipe.lr:g}, weight decay {recipe.weight_decay:g}",
    )


def _next_commands(number: int, name: str, plans_name: str, trainer: str, num_processes: int) -> tuple[str, ...]:
    images = nnunet_folder("nnUNet_raw") / name / "imagesTs"
    source = shlex.quote(str(images)) if images.is_dir() else "INPUT_FOLDER"
    return (
        f"nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c {CONFIGURATION} -np {num_processes}",
        f"nnUNetv2_train {number} {CONFIGURATION} 0 -p {plans_name} -tr {trainer}",
        f"nnUNetv2_predict -d {number} -c {CONFIGURATION} -p {plans_name} -tr {trainer} -f 0 "
        f"-i {source} -o OUTPUT_FOLDER",
    )
