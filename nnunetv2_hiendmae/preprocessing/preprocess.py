"""`hiendmae preprocess`: raw images, with or without labels, become the arrays that pretraining reads."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import check_unlocked, locked, write_text
from nnunetv2_hiendmae.former_plans import CONFIGURATION, array_settings
from nnunetv2_hiendmae.options.commands import PreprocessOptions
from nnunetv2_hiendmae.planning.dataset import LABEL_FREE_KEY, RawDataset, is_ct, read_raw_dataset
from nnunetv2_hiendmae.planning.plans import (
    changed_since,
    check_plans_name,
    data_folder,
    is_preprocessed,
    make_plans,
    read_plans,
    save_plans,
)
from nnunetv2_hiendmae.planning.readers import Reader, choose_readers
from nnunetv2_hiendmae.preprocessing.cases import (
    BrokenCase,
    Key,
    map_cases,
    preprocess_case,
    refuse_if_nothing_left,
)
from nnunetv2_hiendmae.preprocessing.fingerprint import ensure_fingerprint
from nnunetv2_hiendmae.recipes import DEFAULT_METHOD, HEAD_CROP, MRI, MRI_VOLUME, RECIPES, MethodRecipe
from nnunetv2_hiendmae.volume_format import DEFAULT_INTERPOLATION, VolumeFormat
from nnunetv2_hiendmae.weights import read_metadata
from nnunetv2_hiendmae.weights.hub import local_file

# of the encoder that the plans name, where no file does
DEFAULT_PRESET = "vit_base_p16"
RULE = "nnU-Net's rule"
# factor between the spacings of images and of arrays that is worth a warning
FAR = 3
# how long to wait for a lock that is held only to be looked at
_LOOK_S = 10

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
    readers = choose_readers(raws, recipe.volume.image_reader_writer)
    with ExitStack() as stack:
        for raw in raws:
            _keep_for_this_process(raw, options, stack)
        scratches = {raw.name: _scratch(raw, options, stack) for raw in raws}
        with ExitStack() as planning:
            for raw in raws if options.part else ():
                folder, name = _folder(raw), options.plans_name
                # the first part makes fingerprint and plans, the others wait for it
                planning.enter_context(locked(folder / f".{name}.planning.lock", "", timeout_s=-1))
            planned = [
                _plan(raw, reader, options, spec, recipe, scratches[raw.name])
                for raw, reader in zip(raws, readers, strict=True)
            ]
        return _preprocess(planned, options, scratches)


@dataclass(frozen=True)
class _Planned:
    """A dataset whose plans are written; `broken`: what the fingerprint found."""

    raw: RawDataset
    plans: Path
    broken: list[BrokenCase]


def _plan(
    raw: RawDataset, reader: Reader, options: PreprocessOptions, spec: EncoderSpec, recipe: MethodRecipe, scratch: Path
) -> _Planned:
    """Fingerprint and plans of a dataset: whatever can be refused is refused before hours of work begin."""
    volume = replace(recipe.volume, image_reader_writer=reader.__name__)
    logger.info("%s: %s", raw.name, _told_settings(raw, volume, options, recipe.volume.image_reader_writer))
    fingerprint, broken = ensure_fingerprint(raw, options.num_processes, reader, scratch)
    with_labels = not fingerprint.get(LABEL_FREE_KEY)
    by_dataset = recipe.volume.window_hu is None and recipe.volume.scheme_of_all is None
    if by_dataset and with_labels and any(map(is_ct, raw.channels)):
        raise UserError(
            f"without a window, CT intensities of {raw.name} would be scaled by statistics of its labels, and "
            f"pretraining must not see labels; give --window LO HI"
        )
    _warn_if_far(raw, fingerprint, volume, options.spacing_mm)
    return _Planned(raw, _ensure_plans(raw, options.plans_name, spec, replace(recipe, volume=volume)), broken)


def _preprocess(
    planned: list[_Planned], options: PreprocessOptions, scratches: Mapping[str, Path]
) -> PreprocessSummary:
    jobs: dict[Key, Callable[[], str]] = {}
    finished: set[Key] = set()
    broken: list[BrokenCase] = []
    number, parts = options.number_of_parts
    for raw, plans, found in ((p.raw, p.plans, p.broken) for p in planned):
        folder = data_folder(plans)
        folder.mkdir(exist_ok=True)
        if number == 1 and (left := sorted({f.stem for f in folder.glob("*.pkl")} - raw.cases.keys())):
            told = f"{raw.name} no longer has images of {some(left)}, whose arrays pretraining goes on to use"
            logger.warning(f"{told}; where it should not, delete their files in {folder}")
        mine = list(raw.cases)[number - 1 :: parts]
        if changed := changed_since(folder, {case: raw.cases[case] for case in mine}):
            told = f"images of {some(changed)} in {raw.name} are newer than their arrays, which stay as they are"
            logger.warning(f"{told}; where voxels changed, delete their files in {folder} and run the command again")
        broken += [b for b in found if b[1] in mine]
        for case in mine:
            if is_preprocessed(folder, case):
                finished.add((raw.name, case))
                continue
            job = partial(preprocess_case, case, raw.cases[case], raw.channels, plans, folder, scratches[raw.name])
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
    for name in (p.raw.name for p in planned):
        of_this = [b for b in broken if b[0] == name]
        if of_this and name not in {n for n, _ in (*finished, *done)} and parts == 1:
            refuse_if_nothing_left(name, of_this)
    return PreprocessSummary(len(done), len(finished), tuple(broken))


def _keep_for_this_process(raw: RawDataset, options: PreprocessOptions, stack: ExitStack) -> None:
    """Locks a dataset's arrays, or one part of them, until `stack` ends. A part keeps its own lock and looks at that of
    the whole, the whole keeps its own and looks at those of the parts: whoever comes second is refused."""
    folder, name = _folder(raw), options.plans_name
    whole = folder / f".{name}.lock"
    busy = f"another process is preprocessing {raw.name} with {name}; wait for it to end"
    if options.part is None:
        stack.enter_context(locked(whole, f"{busy}, or share the work: --part K/N"))
        for lock in folder.glob(f".{name}.part-*.lock"):
            check_unlocked(lock, busy)
        return
    own = f"another process is preprocessing part {options.part} of {raw.name} with {name}; wait for it to end"
    stack.enter_context(locked(folder / f".{name}.{_part_name(options)}.lock", own))
    # other parts hold it for a moment
    check_unlocked(whole, busy, timeout_s=_LOOK_S)


def _part_name(options: PreprocessOptions) -> str:
    return "part-{}-of-{}".format(*options.number_of_parts)


def _folder(raw: RawDataset) -> Path:
    return nnunet_folder("nnUNet_preprocessed") / raw.name


def _scratch(raw: RawDataset, options: PreprocessOptions, stack: ExitStack) -> Path:
    """Where cases are written before they are moved: nnU-Net allows nothing but cases in the folder of the arrays."""
    ours = f".{options.plans_name}_{CONFIGURATION}"
    whole = options.part is None
    scratch = _folder(raw) / (f"{ours}.partial" if whole else f"{ours}.{_part_name(options)}.partial")
    # the lock is ours, so what lies there was left by a process that was killed
    for folder in (scratch, *(_folder(raw).glob(f"{ours}.part-*.partial") if whole else ())):
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    stack.callback(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


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
    like = DEFAULT_METHOD if options.like is None else str(local_file(options.like))
    if like in RECIPES:
        spec, recipe = PRESETS[DEFAULT_PRESET], RECIPES[like]
    elif like == MRI:
        if ct := [name for name in channels if is_ct(name)]:
            raise UserError(f"--like {MRI} z-scores MR, got the channel {ct[0]}; for CT, needed --like METHOD")
        if options.window_hu is not None:
            raise UserError(f"--window is for CT, and --like {MRI} takes MR only; leave one out")
        spec = PRESETS[DEFAULT_PRESET].with_(img_size=HEAD_CROP)
        recipe = replace(RECIPES[DEFAULT_METHOD], volume=MRI_VOLUME)
    elif Path(like).is_file():
        metadata = read_metadata(Path(like))
        spec = metadata.spec
        recipe = replace(RECIPES.get(metadata.method, RECIPES[DEFAULT_METHOD]), volume=metadata.volume)
    else:
        known = f"neither a method ({', '.join(RECIPES)}) nor '{MRI}' nor an existing encoder file"
        raise UserError(f"--like '{like}' is {known}")
    try:
        volume = recipe.volume.overridden(options.spacing_mm, options.window_hu, options.interpolation)
    except (ValueError, TypeError) as e:
        raise UserError(f"{e}; check --spacing and --window") from e
    others = [name for name in channels if not is_ct(name)]
    if volume.window_hu is not None and others:
        window = "the window {:g} to {:g} HU is for CT channels".format(*volume.window_hu)
        logger.warning(f"{window}; nnU-Net's normalisation stays for: {', '.join(others)}")
    volume = replace(volume, interpolation=volume.interpolation or DEFAULT_INTERPOLATION)
    return spec.with_(in_channels=len(channels)), replace(recipe, volume=volume)


def _told_settings(raw: RawDataset, volume: VolumeFormat, options: PreprocessOptions, wanted: str | None) -> str:
    """What is done to the images, and who says so, in a line. `wanted`: reader that the encoder file names."""
    like = options.like or DEFAULT_METHOD
    whose = f"{like}'s recipe" if like in (*RECIPES, MRI) else f"as {like} says"
    spacing, window = volume.spacing_mm, volume.window_hu
    # what it is, whether it was given, whether it comes from `like`
    facts = [
        (f"spacing {_shown(spacing)} mm (D H W)" if spacing else "the median spacing", options.spacing_mm, spacing)
    ]
    if volume.scheme_of_all or any(map(is_ct, raw.channels)):
        told = "window {:g} to {:g} HU".format(*window) if window else volume.scheme_of_all or "window of the dataset"
        facts.append((told, options.window_hu, window or volume.scheme_of_all))
    facts.append((f"{volume.interpolation} interpolation", options.interpolation, volume.interpolation))
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
    others = volume.window_hu is not None and not all(map(is_ct, raw.channels))
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
