"""What `hiendmae plan` says: what was decided and why, and the stock commands that follow."""

import shlex
from typing import Any

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.environment import device_words, preprocess_command
from nnunetv2_hiendmae.planning.dataset import RawDataset
from nnunetv2_hiendmae.planning.plans import CONFIGURATION
from nnunetv2_hiendmae.plans_section import PlansSection
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata

# where a value comes from, in the messages
_GIVEN, _FILE, _DATASET = "given", "from the encoder file", "from the dataset"
_NNUNETS_RULE = "by nnU-Net's rule"
# how options of the recipe are told
_TOLD = {
    "batch_size": "batch size {batch_size}",
    "decoder_width": "decoder width {decoder_width}",
    "drop_path_rate": "drop path {drop_path_rate:g}",
    "epochs": "{epochs} epochs of {iterations_per_epoch} iterations",
    "warmup_epochs": "{warmup_epochs} epochs of warm-up",
    "lr": "lr {lr:g} with weights",
    "scratch_lr": "lr {scratch_lr:g} from scratch",
    "weight_decay": "weight decay {weight_decay:g}",
    "layer_decay": "layer decay {layer_decay:g}",
    "encoder_lr_scale": "lr of the encoder x {encoder_lr_scale:g}",
    "decoder_warmup": "{decoder_warmup} epochs of decoder warm-up",
    "seed": "seed {seed}",
    "grad_clip": "gradients clipped to {grad_clip:g}",
}
# values that change nothing
_UNTOLD = {"encoder_lr_scale": 1, "decoder_warmup": 0}


def decisions(
    section: PlansSection,
    spec: EncoderSpec,
    volume: VolumeFormat,
    metadata: EncoderMetadata,
    channels: tuple[str, ...],
    values: dict[str, Any],
    given: dict[str, Any],
) -> tuple[str, ...]:
    """One line per origin: what was given, what the file said, what the dataset, what the recipe."""
    seen = metadata.volume
    ours = metadata.method in RECIPES
    recipe = f"from the recipe of {metadata.method}" if ours else "from our recipe for weights of other programs"
    weights = f"weights of {section.encoder_file}" if section.encoder_file else "the architecture only, no weights"
    window = f"window {volume.window_hu} HU" if volume.window_hu else f"intensities {_NNUNETS_RULE}"
    if volume.scheme_of_all:
        window = f"intensities by {volume.scheme_of_all} whatever the channel, CT too"
    spacing = f"spacing {volume.spacing_mm} mm (D, H, W)" if volume.spacing_mm else f"spacing {_NNUNETS_RULE}"
    reader, of_file = volume.image_reader_writer, seen.image_reader_writer or ""
    # slices that are much thicker than their pixels are repeated
    own = " (nnU-Net's own, which files of 0.1 mean too: it repeats thick slices)"
    interpolation = f"{volume.interpolation} interpolation{own if volume.interpolation == 'nnunet' else ''}"
    # option, where it comes from unless it was given, what it is
    facts = [
        ("encoder", _FILE, f"{weights} ({spec.kind}, {spec.depth} blocks of width {spec.embed_dim})"),
        *([("network", _GIVEN, f"network {values['network']}")] if "network" in given else []),
        ("patch_size", _FILE if spec.img_size == metadata.spec.img_size else recipe, f"crop {spec.img_size} voxels"),
        ("spacing_mm", _FILE if seen.spacing_mm else _DATASET, spacing),
        ("interpolation", _FILE if seen.interpolation else recipe, interpolation),
        (
            "window_hu" if volume.window_hu else "",
            _FILE if volume.window_hu or volume.scheme_of_all else _DATASET,
            window,
        ),
        ("reader", _FILE if reader == of_file else _DATASET, f"reader {reader}"),
        ("channels", _DATASET, f"channels {', '.join(channels)}"),
        *((o, recipe, text.format(**values)) for o, text in _TOLD.items() if values[o] not in (None, _UNTOLD.get(o))),
    ]
    if section.recipe.freeze_encoder:
        facts.append(("freeze_encoder", _GIVEN, "encoder frozen"))
    told = {_GIVEN: [], _FILE: [], _DATASET: [], recipe: []}
    for option, origin, text in facts:
        told[_GIVEN if option in given else origin].append(text)
    return tuple(f"{origin}: {'; '.join(texts)}" for origin, texts in told.items() if texts)


def next_commands(
    raw: RawDataset, number: int, plans_name: str, trainer: str, num_processes: int, fold: str
) -> tuple[str, ...]:
    images = raw.folder / "imagesTs"
    source, device = shlex.quote(str(images)) if images.is_dir() else "INPUT_FOLDER", device_words()
    return (
        f"{preprocess_command(raw.name, plans_name, CONFIGURATION)} -np {num_processes}",
        f"nnUNetv2_train {number} {CONFIGURATION} {fold} -p {plans_name} -tr {trainer}{device}",
        f"nnUNetv2_predict -d {number} -c {CONFIGURATION} -p {plans_name} -tr {trainer} -f {fold} "
        f"-i {source} -o OUTPUT_FOLDER{device}",
    )
