"""The training images of a raw dataset, what makes one of them unusable, and work on all of them at once."""

import io
import logging
import multiprocessing
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning.dataset import channel_names, raw_dataset_json

logger = logging.getLogger(__name__)

# dataset, case, reason
BrokenCase = tuple[str, str, str]
Job = TypeVar("Job")
Result = TypeVar("Result")


class BrokenCaseError(Exception):
    """One case cannot be used; the message is the reason, in one line. The others go on."""


@dataclass(frozen=True)
class RawDataset:
    """Training images of `$nnUNet_raw/<name>`; imagesTs is never looked at.

    Args:
        dataset_json: with `labels` (background only) and `numTraining` filled in where the file lacks them.
        cases: image files of every case, one per channel.
        labelled: every case has a label file.
    """

    name: str
    dataset_json: dict[str, Any]
    cases: dict[str, tuple[str, ...]]
    labelled: bool

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in order."""
        return channel_names(self.dataset_json)

    def reader(self) -> type[BaseReaderWriter]:
        """nnU-Net's reader for these files: the one that reads the first readable image.

        Raises:
            UserError: nnU-Net has no reader for the file ending.
        """
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for images in self.cases.values():
                try:
                    return determine_reader_writer_from_dataset_json(self.dataset_json, images[0], verbose=False)
                except (RuntimeError, IndexError):
                    continue
            try:
                # nothing is readable: let every case be named with its own reason
                return determine_reader_writer_from_dataset_json(self.dataset_json, verbose=False)
            except RuntimeError as e:
                raise UserError(
                    f"nnU-Net has no reader for '{self.dataset_json['file_ending']}' files ({self.name}); "
                    f"check file_ending in its dataset.json"
                ) from e


def read_raw_dataset(name: str) -> RawDataset:
    """Lists a raw dataset; reads no image.

    Raises:
        UserError: dataset.json is missing or incomplete, or there are no training images.
    """
    folder = nnunet_folder("nnUNet_raw") / name
    dataset_json = raw_dataset_json(name)
    # nnU-Net changes what it is given
    listing = deepcopy(dataset_json)
    try:
        found = get_filenames_of_train_images_and_targets(str(folder), listing)
    except FileNotFoundError as e:
        raise UserError(f"{name} has no training images ({e}); put CASE_0000 files into imagesTr") from e
    except KeyError as e:
        raise UserError(
            f'an entry under "dataset" in {folder / "dataset.json"} has no {e}; nnU-Net needs "images" and "label", '
            f'where there is no label write "label": ""'
        ) from e
    if not found:
        raise UserError(
            f"{folder / 'imagesTr'} holds no '{dataset_json['file_ending']}' files; check file_ending in dataset.json"
        )
    return RawDataset(
        name,
        {"labels": {"background": 0}, "numTraining": len(found), **dataset_json},
        {str(case): _images(folder, str(case), files["images"], listing) for case, files in found.items()},
        all(Path(files["label"]).is_file() for files in found.values()),
    )


def _images(folder: Path, case: str, found: list[str], dataset_json: dict[str, Any]) -> tuple[str, ...]:
    if "dataset" in dataset_json:
        return tuple(found)
    # found by pattern: with 0000 and 0002 there, 0002 would pass for the second channel
    ending = dataset_json["file_ending"]
    return tuple(str(folder / "imagesTr" / f"{case}_{i:04d}{ending}") for i in range(len(found)))


def check_files(images: Sequence[str]) -> None:
    """
    Raises:
        BrokenCaseError: a channel file is missing, or a NIfTI file ends early or holds NaN or infinite values.
    """
    if not images:
        raise BrokenCaseError("no channel file such as CASE_0000")
    for image in images:
        path = Path(image)
        if not path.is_file():
            raise BrokenCaseError(f"{path.name} is missing")
        if path.name.endswith((".nii", ".nii.gz")):
            _check_nifti(path)


def _check_nifti(path: Path) -> None:
    # nnU-Net reads NIfTI through ITK, which puts zeros for NaN and for the missing end of a truncated file
    # and says nothing
    try:
        stored = nibabel.load(path).dataobj
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error):
        # not even a header: the reader tells what it is
        return
    try:
        values = stored.get_unscaled()
    except (EOFError, OSError, ValueError, zlib.error) as e:
        raise BrokenCaseError(f"{path.name} is truncated or damaged: {str(e).splitlines()[0]}") from e
    if values.dtype.kind == "f":
        check_finite(values)


def check_volume(data: np.ndarray, spacing: Sequence[float], channels: Sequence[str]) -> None:
    """Checks what a reader returned, (C, D, H, W) and mm per voxel.

    Raises:
        BrokenCaseError: wrong number of channels or axes, values that are not finite, an image of one value,
            or a spacing that is not three positive numbers.
    """
    if data.ndim != 4 or len(data) != len(channels):
        raise BrokenCaseError(
            f"array of shape {tuple(data.shape)}, needed {len(channels)} channel(s) ({', '.join(channels)}) × D × H × W"
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise BrokenCaseError(f"spacing {tuple(float(s) for s in spacing)} mm, needed three positive numbers")
    check_finite(data)
    if data.min() == data.max():
        raise BrokenCaseError(f"every voxel is {data.min():g}")


def check_finite(data: np.ndarray) -> None:
    """
    Raises:
        BrokenCaseError: NaN or infinite voxels; one of them makes a whole pretraining run NaN.
    """
    wrong = data.size - int(np.isfinite(data).sum())
    if wrong:
        raise BrokenCaseError(f"{wrong} voxels are NaN or infinite")


@contextmanager
def naming_reason() -> Iterator[None]:
    """Whatever goes wrong inside becomes a BrokenCaseError with a one-line reason; nothing is printed."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    except BrokenCaseError:
        raise
    except MemoryError as e:
        raise BrokenCaseError("not enough memory; run again with fewer processes: -np 1") from e
    except Exception as e:
        # nnU-Net's readers print what is wrong and raise without a message; SimpleITK's last line is the telling one
        said = str(e).strip().splitlines() or [line for line in printed.getvalue().splitlines() if "ERROR" in line]
        raise BrokenCaseError(said[-1].strip() if said else type(e).__name__) from e


def map_cases(
    task: Callable[[Job], Result],
    jobs: Mapping[tuple[str, str], Job],
    num_processes: int,
    title: str,
) -> tuple[dict[tuple[str, str], Result], list[BrokenCase]]:
    """Runs `task` on every job, keyed by (dataset, case), in spawned processes (in this one if `num_processes` is 1).

    Returns:
        Results in the order of `jobs`, and the cases whose task raised BrokenCaseError.

    Raises:
        UserError: a task raised it, or a process was killed.
    """
    results: dict[tuple[str, str], Result] = {}
    broken: dict[tuple[str, str], str] = {}
    for key, outcome in _with_progress(_outcomes(task, jobs, num_processes), len(jobs), title):
        if isinstance(outcome, BrokenCaseError):
            broken[key] = str(outcome)
            logger.warning("%s %s is broken and left out: %s", *key, outcome)
        else:
            results[key] = outcome
    return {k: results[k] for k in jobs if k in results}, [(*k, broken[k]) for k in jobs if k in broken]


def refuse_if_nothing_left(dataset: str, broken: Sequence[BrokenCase]) -> None:
    """
    Raises:
        UserError: always; names the first broken cases of a dataset of which nothing could be used.
    """
    told = "; ".join(f"{case} ({reason})" for _, case, reason in broken[:3])
    more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
    raise UserError(f"all {len(broken)} training images of {dataset} are broken: {told}{more}; replace them")


def _outcomes(
    task: Callable[[Job], Result], jobs: Mapping[tuple[str, str], Job], num_processes: int
) -> Iterator[tuple[tuple[str, str], Result | BrokenCaseError]]:
    if min(num_processes, len(jobs)) <= 1:
        for key, job in jobs.items():
            try:
                yield key, task(job)
            except BrokenCaseError as e:
                yield key, e
        return
    # spawn, as nnU-Net does: a forked child may inherit a lock that nobody releases
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context)
    try:
        keys = {executor.submit(task, job): key for key, job in jobs.items()}
        for future in as_completed(keys):
            error = future.exception()
            if error is not None and not isinstance(error, BrokenCaseError):
                raise error
            yield keys.pop(future), error if error is not None else future.result()
    except BrokenProcessPool as e:
        raise UserError(
            f"a background process was killed, most likely for want of memory; "
            f"run the same command with fewer processes than -np {num_processes}"
        ) from e
    finally:
        executor.shutdown(cancel_futures=True)


def _with_progress(outcomes: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    if sys.stderr.isatty():
        yield from tqdm(outcomes, desc=title, total=total, unit="case")
        return
    step = max(1, total // 20)
    for number, outcome in enumerate(outcomes, 1):
        yield outcome
        if number % step == 0 or number == total:
            logger.info("%s: %d of %d cases", title, number, total)
