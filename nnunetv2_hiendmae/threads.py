"""How many threads compute on a CPU, and how they wait for each other. Imports nothing heavy: the second is decided
before torch starts its threads."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

CHOSEN_BY_USER = "OMP_NUM_THREADS"
# of GNU's OpenMP, which torch has on Linux, and of LLVM's and Intel's. The count is of turns before a thread sleeps:
# with none a small network trains at two thirds of the speed on quiet cores, and 1000 cost little on busy ones
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
# floating-point operations of a step for every thread: with less, threads wait for each other rather than work
WORK_PER_THREAD = 2e9
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def wait_passively() -> None:
    """Lets threads sleep when they have waited a little: in this process, if torch is not imported yet, and in all that
    it starts.

    By default they spin at every barrier: where cores are busy with other work, the thread that is waited for then gets
    no core. What the user has set is kept.
    """
    os.environ.update(passively(os.environ))


def passively(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let waiting threads sleep; none where the user has chosen a policy, which a number of turns would
    undo."""
    if "OMP_WAIT_POLICY" in environment:
        return {}
    return {name: value for name, value in PASSIVE.items() if name not in environment}


def use_threads(work: float, processes: int = 1, tell: bool = True) -> None:
    """Sets torch's number of threads, and logs which and why. A user's own OMP_NUM_THREADS stays as it is.

    Args:
        work: floating-point operations of a step of this process, roughly.
        processes: those of this run on this machine, which share the cores.
        tell: log it.
    """
    if os.environ.get(CHOSEN_BY_USER):
        return
    import torch

    number, why = choose_threads(work, processes)
    torch.set_num_threads(number)
    if tell:
        told = f"{number} thread{'' if number == 1 else 's'} on the CPU: {why}"
        logger.info(f"{told}; set {CHOSEN_BY_USER} for another number")


def use_allowed_cores() -> None:
    """In place of nnU-Net's choice, which is every core of the machine, whoever may use it: a user's own
    OMP_NUM_THREADS, else the cores that this process may use."""
    import torch

    chosen = os.environ.get(CHOSEN_BY_USER, "").split(",")[0].strip()
    torch.set_num_threads(int(chosen) if chosen.isdecimal() and int(chosen) else available_cores())


def choose_threads(work: float, processes: int = 1) -> tuple[int, str]:
    """Number of threads, and why so many: the least of the cores that this process may use and of what the work of a
    step is worth. Not how busy the cores are: a run must repeat, and continue, with the same bits."""
    cores = max(1, available_cores() // processes)
    worth = max(1, math.floor(work / WORK_PER_THREAD))
    told = f"{cores} core{'' if cores == 1 else 's'} may be used"
    return min(cores, worth), told if cores <= worth else f"steps are too small for more, {told}"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the processor time of its cgroups, rounded down."""
    return max(1, math.floor(min([len(_affinity()), *_quotas()])))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quotas() -> list[float]:
    """Cores' worth of processor time that the cgroups of this process may use, those around them too; versions 1 and
    2."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / ("" if not controllers else "cpu" if (_CGROUPS / "cpu").is_dir() else controllers)
        group = root / path.strip("/")
        # a container may see its own group as the root
        found += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [quota for quota in found if quota is not None]


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        # "max", or nothing is said here
        return None
