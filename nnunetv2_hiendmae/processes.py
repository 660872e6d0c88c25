"""Many jobs at once, with progress. Imports nothing heavy."""

import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from nnunetv2_hiendmae.environment import end_with_parent
from nnunetv2_hiendmae.errors import UserError

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def in_processes(jobs: Collection[Callable[[], Result]], num_processes: int, title: str) -> Iterator[Result]:
    """Does every job, one for each case, in spawned processes (in this one if `num_processes` is 1), and hands out the
    results in the order of the jobs. Progress is a bar on a terminal, else lines of the log.

    Raises:
        UserError: a job raised it, or a process was killed.
    """
    return _with_progress(_results(jobs, num_processes), len(jobs), title)


def _results(jobs: Collection[Callable[[], Result]], num_processes: int) -> Iterator[Result]:
    processes = min(num_processes, len(jobs))
    if processes <= 1:
        yield from (job() for job in jobs)
        return
    # spawn, as nnU-Net does: a forked child may inherit a lock that nobody releases
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start)
    try:
        yield from executor.map(_call, jobs)
    except BrokenProcessPool as e:
        raise UserError(
            f"a background process was killed, most likely for want of memory; "
            f"run the same command with fewer processes than -np {num_processes}"
        ) from e
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    end_with_parent()
    # Ctrl-C reaches workers too: they end without a traceback each, below which what the command says would be lost
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _call(job: Callable[[], Result]) -> Result:
    return job()


def _with_progress(results: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    if sys.stderr.isatty():
        yield from tqdm(results, desc=title, total=total, unit="case")
        return
    step = max(1, total // 20)
    for number, result in enumerate(results, 1):
        yield result
        if number % step == 0 or number == total:
            logger.info("%s: %d of %d cases", title, number, total)
