"""An encoder file meets a dataset: what of the one can be followed for the other, with warnings where they clash."""

import logging
from dataclasses import replace
from typing import Any

from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnunetv2_hiendmae.architectures import ENCODERS, EncoderSpec
from nnunetv2_hiendmae.planning.dataset import channel_names, is_ct
from nnunetv2_hiendmae.recipes import MethodRecipe
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata

# nnU-Net's readers that turn every image to RAS; the second reads what the first does not
REORIENTING_READERS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
NNUNETS_CHOICE = "auto"

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]


def finetuning_spec(
    source: EncoderSpec, recipe: MethodRecipe, channels: int, patch_size: Size | None, drop_path_rate: float | None
) -> EncoderSpec:
    """The encoder of the segmentation network: no CLS, trainable positions, the dataset's channels and crop.

    Args:
        patch_size: crop (D, H, W) in voxels; None: that of the file, within the recipe's limit.
        drop_path_rate: None: the recipe's.

    Raises:
        ValueError: channels or crop do not fit.
    """
    if source.in_channels not in (1, channels):
        raise ValueError(
            f"the encoder has {source.in_channels} input channels, the dataset {channels}: only 1 can be spread"
        )
    size = _within(source, recipe.crop_limit) if patch_size is None else tuple(patch_size)
    if len(size) != 3:
        raise ValueError(f"patch size {size} needs three axes D, H, W: 2D is not supported")
    encoder = ENCODERS[source.kind]
    step = tuple(p * encoder.tokens_per_step for p in source.patch_size)
    fitting = tuple(max(1, round(s / p)) * p for s, p in zip(size, step, strict=True))
    if size != fitting:
        raise ValueError(f"patch size {size}: each axis must be a multiple of {step} for this encoder, e.g. {fitting}")
    if size == step:
        raise ValueError(f"patch size {size} is the smallest step of this encoder, needed at least two; make it larger")
    return source.with_(
        cls_token=False,
        pos_embed="learned",
        in_channels=channels,
        img_size=size,
        drop_path_rate=recipe.drop_path_rate if drop_path_rate is None else drop_path_rate,
        **encoder.finetuning,
    )


def _within(source: EncoderSpec, limit: Size | None) -> Size:
    if limit is None:
        return source.img_size
    sizes = zip(source.img_size, limit, source.patch_size, strict=True)
    return tuple(min(size, max(p, most // p * p)) for size, most, p in sizes)


def check_channels(metadata: EncoderMetadata, names: tuple[str, ...]) -> None:
    """Several channels must be those of pretraining; one may be spread over others, with a warning.

    Raises:
        ValueError: several channels, and other ones.
    """
    seen = metadata.volume.channel_names
    if len(seen) > 1 and [n.casefold() for n in seen] != [n.casefold() for n in names]:
        raise ValueError(
            f"the encoder was trained on the channels {', '.join(seen)}, the dataset has {', '.join(names)}: needed "
            "the same, in the same order"
        )
    if metadata.spec.in_channels == 1 and len(names) > 1:
        logger.warning(
            "the encoder saw one channel, the dataset has %d: its kernel is spread over them, each gets 1/%d of it",
            len(names),
            len(names),
        )
    others = [n for n in names if get_normalization_scheme(n).__name__ not in metadata.volume.normalization_schemes]
    if others and metadata.volume.normalization_schemes:
        known = ", ".join(seen or sorted(set(metadata.volume.normalization_schemes)))
        logger.warning("%s: normalised otherwise than what the encoder was trained on (%s)", ", ".join(others), known)


def fit_volume(
    metadata: EncoderMetadata,
    dataset_json: dict[str, Any],
    spacing_mm: tuple[float, float, float] | None,
    window_hu: tuple[float, float] | None,
    reader: str | None,
) -> VolumeFormat:
    """How the dataset's volumes become arrays: as in pretraining where the dataset allows it.

    Args:
        spacing_mm, window_hu: given by the user; None: of the file.
        reader: nnU-Net reader given by the user, "auto" for nnU-Net's choice; None: of the file.

    Raises:
        ValueError: a value is out of range, or the given reader cannot read the dataset.
    """
    volume = metadata.volume.overridden(spacing_mm, window_hu)
    volume = replace(volume, image_reader_writer=_reader(metadata, dataset_json, reader))
    names = channel_names(dataset_json)
    if any(is_ct(n) for n in names):
        return volume
    if volume.window_hu is not None:
        logger.warning("no channel of %s is CT: the window is ignored, nnU-Net's normalisation is used", names)
    return replace(volume, window_hu=None)


def _reader(metadata: EncoderMetadata, dataset_json: dict[str, Any], given: str | None) -> str | None:
    """Name of the reader; None: nnU-Net's choice."""
    ending = dataset_json["file_ending"].lower()
    if given == NNUNETS_CHOICE:
        return None
    if given is not None:
        if not _reads(given, ending):
            raise ValueError(f"reader {given} is none of nnU-Net's, or cannot read {ending}")
        return given
    wanted = metadata.volume.image_reader_writer
    if wanted is None:
        return None
    own = dataset_json.get("overwrite_image_reader_writer", "None")
    if own not in ("None", wanted):
        logger.warning(
            "dataset.json asks for the reader %s, the encoder was trained with %s (orientation: %s): the dataset's is "
            "used, check that it gives the same orientation, or give --reader %s",
            own,
            wanted,
            metadata.volume.orientation,
            wanted,
        )
        return None
    equal = REORIENTING_READERS if wanted in REORIENTING_READERS else ()
    for name in dict.fromkeys((wanted, *equal)):
        if _reads(name, ending):
            return name
    logger.warning(
        "%s cannot read %s: nnU-Net's own reader is used, check that the orientation is the same as in pretraining",
        wanted,
        ending,
    )
    return None


def _reads(reader: str, file_ending: str) -> bool:
    try:
        return file_ending in recursive_find_reader_writer_by_name(reader).supported_file_endings
    except RuntimeError:
        return False
