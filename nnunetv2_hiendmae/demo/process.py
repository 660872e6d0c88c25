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
from nnunetv2_hiendmae.host_memory import RSS_UNIT

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
    return process.returncode, round(usage.ru_maxrss * RSS_UNIT / 1e9, 2)


@dataclass
class Runner:
    """Runs commands one after the other, each a phase of its own name, and remembers what each took.

    Args:
        logs: folder for one log file per command.
        environment: variables of the commands.
        say: gets one line when a command starts and one when it ends.
        commands: those that are finished.
        seconds, peak_gb: phase -> wall clock, and memory of its largest process in GB (10^9 bytes).
    """

    logs: Path
    environment: dict[str, str]
    say: Callable[[str], None] = logger.info
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gb: dict[str, float] = field(default_factory=dict)

    def run(self, phase: str, program: str, *arguments: object) -> None:
        """Runs `hiendmae`, or one of nnU-Net's console scripts.

        Args:
            phase: name of it and of its log.

        Raises:
            UserError: a command of ours says that the user must change something, or there is no such script.
            RuntimeError: the command failed; the message holds its last lines and its log.
        """
        words = [program, *map(str, arguments)]
        told = shlex.join(words)
        if program == "hiendmae":
            words[:1] = [sys.executable, "-m", "nnunetv2_hiendmae.cli"]
        else:
            words[0] = console_script(program)
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{len(self.commands) + 1:02d}_{phase}.log"
        self.say(f"{phase}: {told}")
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            out.write(f"$ {told}\n")
            out.flush()
            code, peak_gb = run_command(words, self.environment, out)
        if code:
            _fail(phase, told, code, log)
        seconds = self.seconds[phase] = round(time.perf_counter() - start, 1)
        self.peak_gb[phase] = peak_gb
        self.commands.append(told)
        self.say(f"{phase}: done in {seconds:.0f} s, largest process {peak_gb:.1f} GB")


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


def _fail(phase: str, command: str, code: int, log: Path) -> None:
    with log.open(encoding="utf-8", errors="replace") as f:
        last = [line.rstrip() for line in deque(f, LINES_ON_FAILURE) if line.strip()]
    if code == USER_MUST_ACT and command.startswith("hiendmae"):
        raise UserError(f"demo phase '{phase}': {last[-1]} (log: {log})")
    told = "\n".join([f"last lines of {log}:", *last])
    raise RuntimeError(f"demo phase '{phase}' ended with exit code {code}: {command}\n{told}")
