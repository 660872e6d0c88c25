"""Starting the commands of the demo, one after the other, with logs, times and memory."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_hiendmae.errors import UserError

logger = logging.getLogger(__name__)
USER_MUST_ACT = 2
LINES_ON_FAILURE = 15


@dataclass(frozen=True)
class Phase:
    """One finished command.

    Args:
        seconds: wall clock.
        peak_gb: resident memory of the largest process of the command, in GB (10^9 bytes).
    """

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

    def ours(self, name: str, *arguments: object) -> None:
        """Runs `hiendmae ARGUMENTS`.

        Raises:
            UserError: the command says that the user must change something.
            RuntimeError: the command failed; the message holds its last lines and its log.
        """
        command = [sys.executable, "-m", "nnunetv2_hiendmae.cli", *map(str, arguments)]
        self._run(name, command, shlex.join(["hiendmae", *command[3:]]))

    def stock(self, name: str, script: str, *arguments: object) -> None:
        """Runs one of nnU-Net's console scripts.

        Raises:
            UserError: no such script in this environment.
            RuntimeError: as `ours`.
        """
        command = [console_script(script), *map(str, arguments)]
        self._run(name, command, shlex.join([script, *command[1:]]))

    def seeded_training(self, name: str, seed: int, *arguments: object) -> None:
        """Runs nnU-Net's own training entry point with seeded random generators, arguments as `nnUNetv2_train`.

        Raises:
            RuntimeError: as `ours`.
        """
        module = "nnunetv2_hiendmae.demo.seeded_train"
        command = [sys.executable, "-m", module, str(seed), *map(str, arguments)]
        self._run(name, command, shlex.join(["nnUNetv2_train", *command[4:]]) + f"  (seed {seed})")

    def _run(self, name: str, command: Sequence[str], shown: str) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{len(self.phases) + 1:02d}_{name}.log"
        self.say(f"{name}: {shown}")
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            out.write(f"$ {shown}\n")
            out.flush()
            process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
            try:
                # wait4 and not wait: it also tells the memory of this one command
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        phase = Phase(name, shown, round(time.perf_counter() - start, 1), _gigabytes(usage.ru_maxrss))
        if process.returncode:
            _fail(phase, process.returncode, log)
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


def read_jsonl(path: Path) -> list[dict]:
    """One dict per line of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _gigabytes(maxrss: int) -> float:
    # Linux counts in KiB, macOS in bytes
    return round(maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def _fail(phase: Phase, code: int, log: Path) -> None:
    with log.open(encoding="utf-8", errors="replace") as f:
        last = [line.rstrip() for line in deque(f, LINES_ON_FAILURE) if line.strip()]
    if code == USER_MUST_ACT and phase.command.startswith("hiendmae"):
        raise UserError(f"demo phase '{phase.name}': {last[-1]} (log: {log})")
    tail = "\n".join(last)
    raise RuntimeError(
        f"demo phase '{phase.name}' ended with exit code {code}: {phase.command}\nlast lines of {log}:\n{tail}"
    )
