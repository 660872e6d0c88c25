"""Commands that stop themselves at a defined point, so that no test has to hit the right moment to kill them.

As a script: `stopped.py METHOD CALLS SCRIPT ARGUMENTS…` runs the console script until METHOD (`module:Class.name`) was
called so often; then it stops, or gets the signal that the variable STOPPED_BY names. Of several processes the last one
does.
"""

import faulthandler
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

# a command that never gets there tells where it is and ends
CEILING_S = 300
STOPPED_BY = "STOPPED_BY"


def run_and_kill(method: str, calls: int, command: list[str], env: Mapping[str, str]) -> None:
    """Runs a console script, `command`, in a process of its own, and kills it and its children after that call.

    Raises:
        AssertionError: it ended before.
    """
    driver = [sys.executable, __file__, method, str(calls)]
    process = subprocess.Popen([*driver, *command], env=env, start_new_session=True)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"{command} ended before call {calls} of {method}: {status}"
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def run_until_killed(method: str, calls: int, command: list[str], env: Mapping[str, str]) -> None:
    """The same in a forked child that kills itself: for commands that start no processes.

    Raises:
        AssertionError: it ended before.
    """
    import forked

    driver = [sys.executable, "-m", Path(__file__).stem, method, str(calls)]
    with tempfile.NamedTemporaryFile() as log:
        killed = {**env, STOPPED_BY: "SIGKILL"}
        process = forked.Process([*driver, *command], env=killed, stdout=log, stderr=subprocess.STDOUT)
        code = forked.wait(process, log.name)
        assert code == -signal.SIGKILL, f"{command} → {code}\n{Path(log.name).read_text(encoding='utf-8')[-4000:]}"


def _stop_after(method: str, calls: int) -> None:
    owner, _, name = method.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original = getattr(owner, name)
    made = 0

    def counted(*arguments, **more):
        nonlocal made
        result = original(*arguments, **more)
        made += 1
        if made == calls and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            os.kill(os.getpid(), signal.Signals[os.environ.get(STOPPED_BY, "SIGSTOP")])
        return result

    setattr(owner, name, counted)


def _main() -> None:
    method, calls, script, *arguments = sys.argv[1:]
    faulthandler.dump_traceback_later(CEILING_S, exit=True)
    _stop_after(method, int(calls))
    sys.argv = [script, *arguments]
    (entry,) = entry_points(group="console_scripts", name=script)
    sys.exit(entry.load()())


if __name__ == "__main__":
    _main()
