"""`hiendmae preprocess`: raw images, with or without labels, become the arrays that pretraining reads."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.environment import dataset_name, nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning.dataset import LABEL_FREE_KEY, is_ct
from nnunetv2_hiendmae.planning.plans import CONFIGURATION
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS
from nnunetv2_hiendmae.preprocessing.cases import (
    BrokenCase,
    BrokenCaseError,
    RawDataset,
    check_files,
    check_finite,
    check_volume,
    map_cases,
    naming_reason,
    read_raw_dataset,
    refuse_if_nothing_left,
)
from nnunetv2_hiendmae.preprocessing.fingerprint import ensure_fingerprint
from nnunetv2_hiendmae.preprocessing.plans import (
    Settings,
    choose_settings,
    data_folder,
    ensure_plans,
    plans_path,
)
from nnunetv2_hiendmae.volume_format import VolumeFormat

# the image comes last: where it stands, the case is finished
CASE_FILES = (".pkl", "_seg.b2nd", ".b2nd")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessSummary:
    """What came of it.

    Args:
        done: cases preprocessed now.
        skipped: cases that were finished before.
        broken: (dataset, case, reason) of every case that was left out.
    """

    done: int
    skipped: int
    broken: tuple[BrokenCase, ...]


@dataclass(frozen=True)
class _CaseJob:
    case: str
    images: tuple[str, ...]
    channels: tuple[str, ...]
    plans: Path
    folder: Path
    partial: Path


def preprocess_datasets(
    datasets: Sequence[str | int],
    *,
    plans_name: str = PRETRAIN_PLANS,
    like: str | Path | None = None,
    spacing_mm: Sequence[float] | None = None,
    window_hu: Sequence[float] | None = None,
    num_processes: int = 4,
) -> PreprocessSummary:
    """Fingerprint, plans and preprocessed cases of raw datasets, for pretraining.

    Labels are never read into the result: the arrays are the same with and without them. Finished cases are
    skipped, so an interrupted run continues where it stopped. Broken cases are logged, listed and left out.

    Args:
        datasets: ids or names; all get the same settings and need the same channels.
        plans_name: plans are written to `$nnUNet_preprocessed/<dataset>/<plans_name>.json`, cases to the folder
            `<plans_name>_3d_fullres` beside it, in nnU-Net's format.
        like: a method of `planning.recipes.RECIPES` (None: its default) or an encoder file, whose spacing, window
            and image reader are taken over.
        spacing_mm: target spacing (D, H, W) in mm; wins over `like`.
        window_hu: CT window (lo, hi) in HU that becomes [0, 1]; wins over `like`. Channels other than CT keep
            nnU-Net's normalisation.
        num_processes: 1 works in this process.

    Raises:
        UserError: the datasets or settings cannot be used, settings differ from those of existing data, every
            case of a dataset is broken, or the disk is full.
    """
    if not datasets or num_processes < 1:
        raise UserError(f"{len(datasets)} datasets and {num_processes} processes, needed at least one of each")
    settings = choose_settings(like, spacing_mm, window_hu)
    # a dataset given twice, by id and by name, is one dataset
    raws = [read_raw_dataset(name) for name in dict.fromkeys(dataset_name(d) for d in datasets)]
    channels = _common_channels(raws)
    _say_what_keeps_nnunets_normalisation(channels, settings.volume)
    settings = replace(settings, spec=settings.spec.with_(in_channels=len(channels)))
    for raw in raws:
        plans_path(raw.name, plans_name)
    with ExitStack() as stack:
        for raw in raws:
            stack.enter_context(_locked(raw.name, plans_name))
        return _preprocess(raws, plans_name, settings, num_processes, stack)


def _preprocess(
    raws: list[RawDataset], plans_name: str, settings: Settings, num_processes: int, stack: ExitStack
) -> PreprocessSummary:
    broken: list[BrokenCase] = []
    jobs: dict[tuple[str, str], _CaseJob] = {}
    finished: dict[str, int] = {}
    # everything that can be refused is refused before hours of work begin
    for raw in raws:
        fingerprint, found = ensure_fingerprint(raw, num_processes)
        broken += found
        _check_fingerprint(raw, fingerprint, settings.volume)
        plans = ensure_plans(raw, plans_name, settings)
        left_out = {case for _, case, _ in found}
        folder = data_folder(plans)
        folder.mkdir(exist_ok=True)
        partial = stack.enter_context(_partial_folder(folder))
        for case, images in raw.cases.items():
            if all((folder / f"{case}{end}").is_file() for end in CASE_FILES):
                finished[raw.name] = finished.get(raw.name, 0) + 1
            elif case not in left_out:
                jobs[raw.name, case] = _CaseJob(case, images, raw.channels, plans, folder, partial)
    skipped = sum(finished.values())
    if skipped:
        logger.info("%d cases are finished already", skipped)
    done, found = map_cases(_preprocess_case, jobs, num_processes, "preprocessing")
    broken += found
    for raw in raws:
        if not finished.get(raw.name) and not any(name == raw.name for name, _ in done):
            refuse_if_nothing_left(raw.name, [b for b in broken if b[0] == raw.name])
    return PreprocessSummary(len(done), skipped, tuple(broken))


def _common_channels(raws: list[RawDataset]) -> tuple[str, ...]:
    first = raws[0]
    for raw in raws[1:]:
        if raw.channels != first.channels:
            raise UserError(
                f"{first.name} has the channels {', '.join(first.channels)} and {raw.name} has "
                f"{', '.join(raw.channels)}, needed the same; preprocess them in separate commands"
            )
    return first.channels


def _say_what_keeps_nnunets_normalisation(channels: tuple[str, ...], volume: VolumeFormat) -> None:
    others = [name for name in channels if not is_ct(name)]
    if volume.window_hu is not None and others:
        logger.warning(
            "the window %g to %g HU is for CT channels; nnU-Net's normalisation stays for: %s",
            *volume.window_hu,
            ", ".join(others),
        )


@contextmanager
def _locked(name: str, plans_name: str) -> Iterator[None]:
    folder = nnunet_folder("nnUNet_preprocessed") / name
    lock = FileLock(folder / f".{plans_name}.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as e:
        raise UserError(f"another process is preprocessing {name} with {plans_name}; wait for it to end") from e
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror or e}; choose a writable nnUNet_preprocessed") from e
    try:
        yield
    finally:
        lock.release()


def _check_fingerprint(raw: RawDataset, fingerprint: dict[str, Any], volume: VolumeFormat) -> None:
    if all(shape[0] == 1 for shape in fingerprint["shapes_after_crop"]):
        raise UserError(f"every image of {raw.name} is a single slice; 2D is not supported, needed 3D volumes")
    if volume.window_hu is None and not fingerprint.get(LABEL_FREE_KEY) and any(map(is_ct, raw.channels)):
        raise UserError(
            f"without a window, CT intensities of {raw.name} would be scaled by statistics of its labels, and "
            f"pretraining must not see labels; give --window LO HI"
        )


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """Where cases are written before they are moved to `folder`: nnU-Net allows nothing but cases in there."""
    partial = folder.with_name(f".{folder.name}.partial")
    # the lock is ours, so what lies there was left by a process that was killed
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _CheckedPreprocessor(DefaultPreprocessor):
    """nnU-Net's preprocessor; whatever is wrong with the images is a BrokenCaseError."""

    def __init__(self, channels: tuple[str, ...]):
        super().__init__(verbose=False)
        self.channels = channels

    def run_case(self, image_files, *args, **kwargs):
        with naming_reason():
            check_files(image_files)
            data, seg, properties = super().run_case(image_files, *args, **kwargs)
            check_finite(data)
            return data, seg, properties

    def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
        check_volume(data, properties["spacing"], self.channels)
        # our plans never transpose, so both spacings are in array order
        left = compute_new_shape(data.shape[1:], properties["spacing"], configuration_manager.spacing)
        if not all(left):
            raise BrokenCaseError(
                f"its {tuple(data.shape[1:])} voxels become {tuple(int(s) for s in left)} at the target spacing"
            )
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)


def _preprocess_case(job: _CaseJob) -> None:
    plans = PlansManager(str(job.plans))
    preprocessor = _CheckedPreprocessor(job.channels)
    try:
        with TemporaryDirectory(dir=job.partial) as temporary:
            written = Path(temporary) / job.case
            # the segmentation is None, always: no label may reach pretraining
            preprocessor.run_case_save(
                str(written), list(job.images), None, plans, plans.get_configuration(CONFIGURATION), {}
            )
            for end in CASE_FILES:
                source = written.with_name(f"{job.case}{end}")
                with source.open("rb") as f:
                    os.fsync(f.fileno())
                source.replace(job.folder / source.name)
    # blosc2 says RuntimeError for every failure to write
    except (OSError, RuntimeError) as e:
        free = shutil.disk_usage(job.folder).free / 1e9
        raise UserError(
            f"cannot write {job.case} to {job.folder} ({e}; {free:.1f} GB free): no space left on the disk or not "
            f"writable; free some and run the same command again"
        ) from e
