"""How a run ends before its end: signals, and a run folder that somebody removed."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae import files
from nnunetv2_hiendmae.errors import Stopped, UserError

logger = logging.getLogger(__name__)


@contextmanager
def noting_stop_signals(tell: bool = True) -> Iterator[Callable[[], int]]:
    """The first Ctrl-C or SIGTERM inside is only noted, so that work ends at a good place; a second acts at once.

    Gives a function that tells the signal's number, 0 for none. Outside the main thread nothing changes. `tell`: log
    it, which one of several processes does.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        noted.append(number)
        restore()
        if tell:
            logger.warning(f"{signal.Signals(number).name}: stopping at the end of this step; again stops at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        restore()


def stopped(number: int, where: str) -> Stopped:
    """What ends a run after a signal, once it is saved. `where`: after which step."""
    told = f"stopped by {signal.Signals(number).name} {where}, which is saved"
    return Stopped(number, f"{told}; continue with the same command and --c")


def check_still_there(run_dir: Path, where: str, save: Callable[[], None]) -> None:
    """Ends a run whose log or settings were removed; an open log would still take lines, which nobody could read.

    Args:
        where: after which step.
        save: writes the run's checkpoint; called where the folder is still there.

    Raises:
        UserError: the log, the settings, or the folder with them is gone.
    """
    lost = [name for name in (files.SETTINGS, files.LOG) if not (run_dir / name).exists()]
    if not lost:
        return
    if not run_dir.is_dir():
        told = f"{run_dir} was removed or moved while its run went on, which ended {where}"
        raise UserError(f"{told}, nothing is saved; put it back and continue with --c, or start anew without --c")
    save()
    told = f"{run_dir / lost[0]} was removed while its run went on, which ended {where}; the weights are saved"
    first = "put it back, and " if files.SETTINGS in lost else ""
    raise UserError(f"{told}; {first}continue with the same command and --c")
