"""Starting the commands of the demo, one after the other, with logs, times and memory."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nnunetv2_hiendmae.errors import UserError

logger = logging.getLogger(__name__)
USER_MUST_ACT = 2
LINES_ON_FAILURE = 15


def run_command(command: Sequence[str], environment: Mapping[str, str], log: IO) -> tuple[int, float]:
    """Runs a command as a process, which is ended where this one is interrupted.

    Returns:
        its exit code, and the resident memory of the largest of its processes in GB (10^9 bytes).
    """
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        # wait4 and not wait: it also tells the memory of this one command
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes
    return process.returncode, round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


@dataclass(frozen=True)
class Phase:
    """One finished command: its wall clock, and the memory of its largest process in GB (10^9 bytes)."""

    name: str
    command: str
    seconds: float
    peak_gb: float


@dataclass
class Runner:
    """Runs commands one after the other and remembers what each took.

    Args:
        logs: folder for one log file per command.
        environment: variables of the commands.
        say: gets one line when a command starts and one when it ends.
    """

    logs: Path
    environment: dict[str, str]
    say: Callable[[str], None] = logger.info
    phases: list[Phase] = field(default_factory=list)

    def run(self, name: str, program: str, *arguments: object, seed: int | None = None) -> None:
        """Runs `hiendmae`, or one of nnU-Net's console scripts.

        Args:
            name: of the phase and its log.
            seed: nnU-Net's own training entry point with seeded random generators, arguments as `nnUNetv2_train`.

        Raises:
            UserError: a command of ours says that the user must change something, or there is no such script.
            RuntimeError: the command failed; the message holds its last lines and its log.
        """
        rest = list(map(str, arguments))
        told = shlex.join([program, *rest])
        if program == "hiendmae":
            command = [sys.executable, "-m", "nnunetv2_hiendmae.cli", *rest]
        elif seed is None:
            command = [console_script(program), *rest]
        else:
            command = [sys.executable, "-m", "nnunetv2_hiendmae.demo.seeded_train", str(seed), *rest]
            told += f"  (seed {seed})"
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{len(self.phases) + 1:02d}_{name}.log"
        self.say(f"{name}: {told}")
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            out.write(f"$ {told}\n")
            out.flush()
            code, peak_gb = run_command(command, self.environment, out)
        phase = Phase(name, told, round(time.perf_counter() - start, 1), peak_gb)
        if code:
            _fail(phase, code, log)
        self.phases.append(phase)
        self.say(f"{name}: done in {phase.seconds:.0f} s, largest process {phase.peak_gb:.1f} GB")


def console_script(name: str) -> str:
    """Path of a console script, first of all beside the running Python.

    Raises:
        UserError: it is nowhere.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise UserError(f"no command {name} beside {sys.executable} or on PATH; run: pip install nnunetv2")
    return found


def _fail(phase: Phase, code: int, log: Path) -> None:
    with log.open(encoding="utf-8", errors="replace") as f:
        last = [line.rstrip() for line in deque(f, LINES_ON_FAILURE) if line.strip()]
    if code == USER_MUST_ACT and phase.command.startswith("hiendmae"):
        raise UserError(f"demo phase '{phase.name}': {last[-1]} (log: {log})")
    tail = "\n".join(last)
    raise RuntimeError(
        f"demo phase '{phase.name}' ended with exit code {code}: {phase.command}\nlast lines of {log}:\n{tail}"
    )
