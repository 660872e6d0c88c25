"""From an encoder file and a dataset to plans for fine-tuning, and the stock commands that follow."""

import shlex
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.planning.dataset import (
    channel_names,
    check_labels,
    ensure_labelled_fingerprint,
    raw_dataset_json,
)
from nnunetv2_hiendmae.planning.fitting import check_channels, finetuning_spec, fit_volume
from nnunetv2_hiendmae.planning.plans import CONFIGURATION, check_plans_name, write_plans
from nnunetv2_hiendmae.plans_section import FinetuneRecipe, PlansSection
from nnunetv2_hiendmae.recipes import RECIPES, TRAINERS
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata, read_metadata

WARMUP_FRACTION = 0.1


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
    reader: str | None = None,
    iterations_per_epoch: int | None = None,
    val_iterations_per_epoch: int | None = None,
    decoder_width: int | None = None,
    drop_path_rate: float | None = None,
    freeze_encoder: bool = False,
    layer_decay: float | None = None,
    grad_clip: float | None = None,
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
        reader: nnU-Net reader, "auto": nnU-Net's choice.
        freeze_encoder: train the decoder alone; the plans get a name of their own.
        layer_decay: factor of the learning rate per encoder layer below the top.
        num_processes: for the fingerprint, and in the printed preprocessing command.

    Raises:
        UserError: the dataset, the file or a value does not fit; nothing was written then.
    """
    given = {name for name, value in locals().items() if value is not None and value is not False}
    name = dataset_name(dataset)
    dataset_json = raw_dataset_json(name)
    metadata = _known_metadata(encoder_file)
    method = None if from_scratch else metadata.method
    recipe = RECIPES[metadata.method]
    if from_scratch and freeze_encoder:
        raise UserError("a frozen encoder needs weights, got --from-scratch and --freeze-encoder; leave one out")
    default_name = TRAINERS[method].replace("nnUNetTrainer", "nnUNetPlans") + ("_frozen" if freeze_encoder else "")
    plans_name = plans_name or default_name
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
        spec = finetuning_spec(metadata.spec, recipe, len(channels), patch_size, drop_path_rate)
        check_channels(metadata, channels)
        volume = fit_volume(metadata, dataset_json, spacing_mm, window_hu, reader)
        finetune = _recipe(
            recipe.finetune,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            lr=recipe.frozen_lr if freeze_encoder and lr is None else lr,
            weight_decay=weight_decay,
            iterations_per_epoch=iterations_per_epoch,
            val_iterations_per_epoch=val_iterations_per_epoch,
            grad_clip=grad_clip,
            freeze_encoder=freeze_encoder,
            layer_decay=layer_decay,
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
    chosen = {"batch_size": batch_size, "decoder_width": decoder_width}
    messages = _messages(section, spec, volume, metadata, channels, metadata.method, chosen, given)
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


def _recipe(base: FinetuneRecipe, **given: Any) -> FinetuneRecipe:
    if given["epochs"] is not None and given["warmup_epochs"] is None:
        given["warmup_epochs"] = int(WARMUP_FRACTION * given["epochs"])
    return replace(base, **{k: v for k, v in given.items() if v is not None})


def _messages(
    section: PlansSection,
    spec: EncoderSpec,
    volume: VolumeFormat,
    metadata: EncoderMetadata,
    channels: tuple[str, ...],
    method: str,
    chosen: dict[str, Any],
    given: Set[str],
) -> tuple[str, ...]:
    """One line per origin: what was given, what the file said, what the dataset, what the recipe."""
    file, dataset, recipe = "from the encoder file", "from the dataset", f"from the recipe of {method}"
    settings = section.recipe
    weights = f"weights of {section.encoder_file}" if section.encoder_file else "the architecture only, no weights"
    encoder = f"{weights} ({spec.kind}, {spec.depth} blocks of width {spec.embed_dim})"
    window = f"window {volume.window_hu} HU" if volume.window_hu else "intensities by nnU-Net's rule"
    spacing = f"spacing {volume.spacing_mm} mm (D, H, W)" if volume.spacing_mm else "spacing by nnU-Net's rule"
    reader = f"reader {volume.image_reader_writer}" if volume.image_reader_writer else "reader by nnU-Net's rule"
    reader_of_file = volume.image_reader_writer and volume.image_reader_writer == metadata.volume.image_reader_writer
    facts = [
        ("encoder", file, encoder),
        ("patch_size", file if spec.img_size == metadata.spec.img_size else recipe, f"crop {spec.img_size} voxels"),
        ("spacing_mm", file if metadata.volume.spacing_mm else dataset, spacing),
        ("window_hu" if volume.window_hu else "", file if volume.window_hu else dataset, window),
        ("reader", file if reader_of_file else dataset, reader),
        ("channels", dataset, f"channels {', '.join(channels)}"),
        *((name, recipe, f"{name.replace('_', ' ')} {value}") for name, value in chosen.items()),
        ("drop_path_rate", recipe, f"drop path {spec.drop_path_rate:g}"),
        ("epochs", recipe, f"{settings.epochs} epochs of {settings.iterations_per_epoch} iterations"),
        ("warmup_epochs", "given" if "epochs" in given else recipe, f"{settings.warmup_epochs} epochs of warm-up"),
        ("lr", recipe, f"lr {settings.lr:g}"),
        ("weight_decay", recipe, f"weight decay {settings.weight_decay:g}"),
        ("layer_decay", recipe, f"layer decay {settings.layer_decay:g}"),
        ("grad_clip", recipe, f"gradients clipped to {settings.grad_clip:g}"),
    ]
    if settings.freeze_encoder:
        facts.append(("freeze_encoder", recipe, "encoder frozen"))
    told = {"given": [], file: [], dataset: [], recipe: []}
    for name, origin, text in facts:
        told["given" if name in given else origin].append(text)
    return tuple(f"{origin}: {'; '.join(texts)}" for origin, texts in told.items() if texts)


def _next_commands(number: int, name: str, plans_name: str, trainer: str, num_processes: int) -> tuple[str, ...]:
    images = nnunet_folder("nnUNet_raw") / name / "imagesTs"
    source = shlex.quote(str(images)) if images.is_dir() else "INPUT_FOLDER"
    return (
        f"nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c {CONFIGURATION} -np {num_processes}",
        f"nnUNetv2_train {number} {CONFIGURATION} 0 -p {plans_name} -tr {trainer}",
        f"nnUNetv2_predict -d {number} -c {CONFIGURATION} -p {plans_name} -tr {trainer} -f 0 "
        f"-i {source} -o OUTPUT_FOLDER",
    )
