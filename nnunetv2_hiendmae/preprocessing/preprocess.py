"""`hiendmae preprocess`: raw images, with or without labels, become the arrays that pretraining reads."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import locked, write_text
from nnunetv2_hiendmae.options.commands import PreprocessOptions
from nnunetv2_hiendmae.planning.dataset import LABEL_FREE_KEY, RawDataset, is_ct, read_raw_dataset
from nnunetv2_hiendmae.planning.plans import (
    array_settings,
    check_plans_name,
    data_folder,
    make_plans,
    read_plans,
    save_plans,
)
from nnunetv2_hiendmae.planning.readers import choose_reader
from nnunetv2_hiendmae.preprocessing.cases import (
    CASE_FILES,
    BrokenCase,
    Key,
    map_cases,
    preprocess_case,
    refuse_if_nothing_left,
)
from nnunetv2_hiendmae.preprocessing.fingerprint import ensure_fingerprint
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, RECIPES, MethodRecipe
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import read_metadata

# of the encoder that the plans name, where no file does
DEFAULT_PRESET = "vit_base_p16"
RULE = "nnU-Net's rule"
# factor between the spacing of images and of arrays
FAR = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessSummary:
    """What came of it.

    Args:
        done, skipped: how many cases were preprocessed now, and how many were finished before.
        broken: (dataset, case, reason) of every case that was left out.
    """

    done: int
    skipped: int
    broken: tuple[BrokenCase, ...]


def preprocess_datasets(
    datasets: Sequence[str | int], options: PreprocessOptions | None = None, **changes: Any
) -> PreprocessSummary:
    """Fingerprint, plans and preprocessed cases of raw datasets, for pretraining.

    Labels are never read into the result: the arrays are the same with and without them. Finished cases are
    skipped, so an interrupted run continues where it stopped. Broken cases are logged, listed and left out.
    Channels other than CT keep nnU-Net's normalisation.

    Plans are written to `$nnUNet_preprocessed/<dataset>/<plans_name>.json`, cases to the folder
    `<plans_name>_3d_fullres` beside it, in nnU-Net's format.

    Args:
        datasets: ids or names; all get the same settings and need the same channels.
        changes: fields of `PreprocessOptions` that differ from `options`.

    Raises:
        UserError: the datasets or settings cannot be used, settings differ from those of existing data, every
            case of a dataset is broken, or the disk is full.
    """
    options = replace(options or PreprocessOptions(), **changes)
    if not datasets:
        raise UserError("0 datasets, needed at least one: -d")
    # a dataset given twice, by id and by name, is one dataset
    raws = [read_raw_dataset(name) for name in dict.fromkeys(dataset_name(d) for d in datasets)]
    channels = _common_channels(raws)
    spec, recipe = _wanted(options, channels)
    for raw in raws:
        check_plans_name(raw.name, options.plans_name, for_pretraining=True)
    with ExitStack() as stack:
        for raw in raws:
            lock = nnunet_folder("nnUNet_preprocessed") / raw.name / f".{options.plans_name}.lock"
            in_use = f"another process is preprocessing {raw.name} with {options.plans_name}; wait for it to end"
            stack.enter_context(locked(lock, in_use))
        return _preprocess(raws, options, spec, recipe, stack)


def _preprocess(
    raws: list[RawDataset], options: PreprocessOptions, spec: EncoderSpec, recipe: MethodRecipe, stack: ExitStack
) -> PreprocessSummary:
    jobs: dict[Key, Callable[[], str]] = {}
    finished: set[Key] = set()
    broken: list[BrokenCase] = []
    # everything that can be refused is refused before hours of work begin
    for raw in raws:
        reader = choose_reader(raw, recipe.volume.image_reader_writer)
        volume = replace(recipe.volume, image_reader_writer=reader.__name__)
        logger.info("%s: %s", raw.name, _told_settings(raw, volume, options, recipe.volume.image_reader_writer))
        fingerprint, found = ensure_fingerprint(raw, options.num_processes, reader)
        broken += found
        with_labels = not fingerprint.get(LABEL_FREE_KEY)
        by_dataset = recipe.volume.window_hu is None and recipe.volume.scheme_of_all is None
        if by_dataset and with_labels and any(map(is_ct, raw.channels)):
            raise UserError(
                f"without a window, CT intensities of {raw.name} would be scaled by statistics of its labels, and "
                f"pretraining must not see labels; give --window LO HI"
            )
        _warn_if_far(raw, fingerprint, volume, options.spacing_mm)
        plans = _ensure_plans(raw, options.plans_name, spec, replace(recipe, volume=volume))
        folder = data_folder(plans)
        unfinished = _unfinished_folder(folder, stack)
        for case, images in raw.cases.items():
            if all((folder / f"{case}{end}").is_file() for end in CASE_FILES):
                finished.add((raw.name, case))
                continue
            job = partial(preprocess_case, case, images, raw.channels, plans, folder, unfinished)
            jobs[raw.name, case] = job
    if finished:
        logger.info("%d cases are finished already", len(finished))
    for name, case, _ in broken:
        jobs.pop((name, case), None)
    done, found = map_cases(jobs, options.num_processes, "preprocessing")
    broken += found
    for (name, case), said in done.items():
        if said:
            logger.warning("%s %s: its reader says: %s", name, case, said)
    for raw in raws:
        if raw.name not in {name for name, _ in (*finished, *done)}:
            refuse_if_nothing_left(raw.name, [b for b in broken if b[0] == raw.name])
    return PreprocessSummary(len(done), len(finished), tuple(broken))


def _common_channels(raws: list[RawDataset]) -> tuple[str, ...]:
    first = raws[0]
    for other in (raw for raw in raws if raw.channels != first.channels):
        raise UserError(
            f"{first.name} has the channels {', '.join(first.channels)} and {other.name} has "
            f"{', '.join(other.channels)}, needed the same; preprocess them in separate commands"
        )
    return first.channels


def _wanted(options: PreprocessOptions, channels: tuple[str, ...]) -> tuple[EncoderSpec, MethodRecipe]:
    """The encoder that the plans name, and the recipe with the volumes of `like` and what was given over them."""
    like = DEFAULT_METHOD if options.like is None else str(options.like)
    if like in RECIPES:
        spec, recipe = PRESETS[DEFAULT_PRESET], RECIPES[like]
    elif Path(like).is_file():
        metadata = read_metadata(Path(like))
        spec = metadata.spec
        recipe = replace(RECIPES.get(metadata.method, RECIPES[DEFAULT_METHOD]), volume=metadata.volume)
    else:
        raise UserError(f"--like '{like}' is neither a method ({', '.join(RECIPES)}) nor an existing encoder file")
    try:
        volume = recipe.volume.overridden(options.spacing_mm, options.window_hu)
    except (ValueError, TypeError) as e:
        raise UserError(f"{e}; check --spacing and --window") from e
    others = [name for name in channels if not is_ct(name)]
    if volume.window_hu is not None and others:
        window = "the window {:g} to {:g} HU is for CT channels".format(*volume.window_hu)
        logger.warning(f"{window}; nnU-Net's normalisation stays for: {', '.join(others)}")
    return spec.with_(in_channels=len(channels)), replace(recipe, volume=volume)


def _told_settings(raw: RawDataset, volume: VolumeFormat, options: PreprocessOptions, wanted: str | None) -> str:
    """What is done to the images, and who says so, in a line. `wanted`: reader that the encoder file names."""
    like = options.like or DEFAULT_METHOD
    whose = f"{like}'s recipe" if like in RECIPES else f"as {like} says"
    spacing, window = volume.spacing_mm, volume.window_hu
    # what it is, whether it was given, whether it comes from `like`
    facts = [
        (f"spacing {_shown(spacing)} mm (D H W)" if spacing else "the median spacing", options.spacing_mm, spacing)
    ]
    if any(map(is_ct, raw.channels)):
        told = "window {:g} to {:g} HU".format(*window) if window else volume.scheme_of_all or "window of the dataset"
        facts.append((told, options.window_hu, window or volume.scheme_of_all))
    facts.append(("cubic interpolation, nearest between thick slices", None, None))
    facts.append((f"reader {volume.image_reader_writer}", None, volume.image_reader_writer == wanted))
    return "; ".join(f"{what} ({'given' if given else whose if likes else RULE})" for what, given, likes in facts)


def _shown(spacing_mm: Sequence[float]) -> str:
    return " ".join(f"{s:.3g}" for s in spacing_mm)


def _warn_if_far(raw: RawDataset, fingerprint: dict[str, Any], volume: VolumeFormat, given: object) -> None:
    """Says so where nobody chose a target spacing and it is far from the images', or was chosen for CT only."""
    median = np.median(fingerprint["spacings"], axis=0)
    if given or not volume.spacing_mm:
        return
    factors = np.asarray(volume.spacing_mm) / median
    others = not all(map(is_ct, raw.channels))
    if others or factors.max() > FAR or factors.min() < 1 / FAR:
        told = f"{raw.name} has a median spacing of {_shown(median)} mm, and becomes {_shown(volume.spacing_mm)} mm"
        why = ", which was chosen for CT" if others else f", {factors.max():.3g} times as much along one axis"
        logger.warning(f"{told}{why}; --spacing {_shown(median)} keeps it (with another -p where there are arrays)")


def _ensure_plans(raw: RawDataset, plans_name: str, spec: EncoderSpec, recipe: MethodRecipe) -> Path:
    """Existing plans that make the same arrays stay as they are; others are replaced, but never while preprocessed
    cases depend on them."""
    path = check_plans_name(raw.name, plans_name, for_pretraining=True)
    width, batch = recipe.decoder_width, recipe.batch_size
    plans = make_plans(raw, plans_name, spec, recipe.volume, decoder_width=width, batch_size=batch, section=None)
    write_text(path.with_name("dataset.json"), json.dumps(raw.dataset_json, indent=4) + "\n")
    existing = read_plans(path)
    if existing is None:
        return save_plans(plans)
    old, new = array_settings(existing), array_settings(plans)
    changed = [key for key in new if old[key] != new[key]]
    if not changed:
        return path
    folder = data_folder(path)
    if any(folder.glob("*.b2nd")):
        told = ", ".join(f"{key} {old[key]}, now {new[key]}" for key in changed)
        raise UserError(f"{folder} was made with other settings: {told}; choose another name with -p or delete it")
    return save_plans(plans)


def _unfinished_folder(folder: Path, stack: ExitStack) -> Path:
    """Where cases are written before they are moved to `folder`: nnU-Net allows nothing but cases in there."""
    folder.mkdir(exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.partial")
    # the lock is ours, so what lies there was left by a process that was killed
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
    return unfinished
