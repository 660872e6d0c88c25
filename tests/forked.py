"""Commands that do not import nnU-Net again: each is forked from a server that has imported it once.

Importing nnU-Net costs several seconds of CPU per process, and one `nnUNetv2_train` is three of them. Here a command
is a child of a server that ran nothing but imports: no threads, no pools, no monkeypatches of a test. Two things differ
from a process of its own: the modules are there already, and nnU-Net's pools are forked from the command instead of
being spawned.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from importlib.metadata import entry_points
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import nnunetv2.utilities.utils
from matplotlib.figure import Figure
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.logging.nnunet_logger import MetaLogger

# what the tests' commands import
PRELOADED = [
    "nnunetv2.evaluation.find_best_configuration",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.model_sharing.entry_points",
    "nnunetv2.run.run_training",
    "nnunetv2_hiendmae.planning",
    "nnunetv2_hiendmae.pretraining",
    "nnunetv2_hiendmae.trainers",
]
TIMEOUT_S = 300
PROCESSES = "nnUNet_def_n_proc"
# a variable of commands whose pictures, most of a tiny run's time, are empty files
UNDRAWN = "UNDRAWN"


class _PoolProcess(multiprocessing.context.ForkServerProcess):
    """A process with the variables of the one that made it, as a spawned one has them, and not with the server's."""

    def __init__(self, *arguments: object, **more: object):
        super().__init__(*arguments, **more)
        self.environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        super().run()


class _Server(ForkServerContext):
    Process = _PoolProcess


SERVER = _Server()
SERVER.set_forkserver_preload(PRELOADED)


class Process:
    """A command in a forked child that leads a process group; as much of `subprocess.Popen` as the tests need.

    Args:
        command: a console script, by name or path, or a Python with `-m` and a module; then the arguments.
        env: all variables of the command.
        stdout: named file; what the command writes, to either stream, is appended to it.
        stderr: `subprocess.STDOUT`.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO, stderr: int):
        assert stderr == subprocess.STDOUT
        self.args, self.returncode = list(command), None
        self._child = SERVER.Process(target=_execute, args=(self.args, dict(env), stdout.name))
        self._child.start()
        self.pid = self._child.pid

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: the command still runs.
        """
        self._child.join(timeout)
        self.returncode = self._child.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def terminate(self) -> None:
        """Ends the command alone, not its children."""
        self._child.terminate()


def run(
    command: Sequence[object],
    env: Mapping[str, str],
    *,
    start: Callable[..., Process | subprocess.Popen] = Process,
    fails: bool = False,
) -> str:
    """What a command said; it must succeed, or fail when `fails`, and end in time.

    Args:
        start: `Process` or `spawn`.
    """
    with tempfile.NamedTemporaryFile() as log:
        process = start(list(map(str, command)), env=env, stdout=log, stderr=subprocess.STDOUT)
        code = wait(process, log.name)
        said = Path(log.name).read_text(encoding="utf-8")
    ended_well = code in range(1, 128) if fails else code == 0
    assert ended_well, f"{process.args} → {code}\n{said[-4000:]}"
    return said


def run_together(command: Sequence[object], env: Mapping[str, str], processes: int = 2) -> list[str]:
    """What each of several processes said, which find each other by the variables that torchrun on one machine sets."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    shared = {**env, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "none"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} for rank in range(processes)]
    with ThreadPoolExecutor(processes) as threads:
        return list(threads.map(lambda rank: run(command, {**shared, **rank}), ranks))


def free_port() -> str:
    """Of this machine, for processes that have to find each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def spawn(command: Sequence[str], **options: object) -> subprocess.Popen:
    """A process of its own, as a user starts it, that leads a process group."""
    program = str(Path(sys.executable).parent / command[0])
    return subprocess.Popen([program, *command[1:]], **options, start_new_session=True)


def wait(process: Process | subprocess.Popen, log: str) -> int:
    """Exit code of a process that leads a group.

    Raises:
        AssertionError: it took longer than `TIMEOUT_S`, and was killed with all that it had started.
    """
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        said = Path(log).read_text(encoding="utf-8")
        raise AssertionError(f"{process.args} → still running after {TIMEOUT_S} s\n{said[-4000:]}") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def quicken_nnunet() -> None:
    """Spares what takes nnU-Net long however small a dataset is, in this process and in the commands.

    Fingerprints are made of 10^4 voxels instead of 10^8, files are listed without forking twelve processes, prediction
    takes windows side by side and once instead of eight times as many in eight mirrorings, the picture of the curves,
    3000 x 5400 pixels after each epoch, is an empty file, and a pool that this process needs for a fingerprint is
    forked from the server.
    """
    work_little()
    fingerprint_extractor.multiprocessing = SimpleNamespace(get_context=lambda _: SERVER)


def work_little() -> None:
    """What `quicken_nnunet` says, but for the processes of fingerprints, from here on."""
    extractor = fingerprint_extractor.DatasetFingerprintExtractor
    _set_after_init(extractor, num_foreground_voxels_for_intensitystats=1e4)
    _set_after_init(nnUNetPredictor, tile_step_size=1, use_mirroring=False)
    nnunetv2.utilities.utils.Pool = lambda processes: nullcontext(SimpleNamespace(starmap=_starmap))
    MetaLogger.plot_progress_png = lambda _, folder: Path(folder, "progress.png").touch()


def _set_after_init(kind: type, **values: object) -> None:
    original = kind.__init__

    def initialize(self, *arguments, **more):
        original(self, *arguments, **more)
        vars(self).update(values)

    kind.__init__ = initialize


def _starmap(function: Callable, jobs: Iterable[tuple]) -> list:
    return [function(*job) for job in jobs]


def _execute(command: list[str], environment: dict[str, str], log: str) -> None:
    """In the child: becomes the command and ends with its exit code."""
    os.setsid()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # what goes to both streams stays in the order in which it was written
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    _fork_instead_of_spawning()
    if UNDRAWN in environment:
        Figure.savefig = lambda _, path, **__: path.touch()
    program, *arguments = command
    if arguments[:1] == ["-m"]:
        _, module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = [program, *arguments]
    (entry,) = entry_points(group="console_scripts", name=Path(program).name)
    sys.exit(entry.load()())


def _fork_instead_of_spawning() -> None:
    """Lets nnU-Net's pools be forked from this process; to be safe, it then must stay without threads."""
    import nnunetv2.configuration
    import torch
    import tqdm

    # the default of many of its functions since nnU-Net was imported
    assert int(os.environ[PROCESSES]) == nnunetv2.configuration.default_num_processes
    # nnUNetv2_train and nnUNetv2_predict ask for all cores
    torch.set_num_threads = lambda _: None
    # a thread that would redraw idle bars
    tqdm.tqdm.monitor_interval = 0
    work_little()
    fork = multiprocessing.get_context("fork")
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.get_context = lambda _=None: fork
