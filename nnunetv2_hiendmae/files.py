"""Writing files so that nothing on disk is ever half-written, keeping folders for one process, and what the folder of a
run holds. Imports nothing heavy."""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunetv2_hiendmae.errors import DiskFull, UserError

# files of a run's folder
SETTINGS, CHECKPOINT, LOG, LOCK = "run.json", "checkpoint_latest.pth", "log.jsonl", ".lock"
ENCODER = "encoder.safetensors"
# the encoder that a probe found best
PROBE_ENCODER = "encoder_probe.safetensors"
# of a pretraining checkpoint: the next step, and the state of the method
STEP, STATE = "step", "method"
# of the settings: digest of the cases that the run was started with
DATA_KEY = "data_sha256"

# files of weights in a folder, as patterns
_OF_WEIGHTS = ("*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin", "fold_*/checkpoint_final.pth")
_MOST_NAMED = 3


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Hands out a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed. What
    processes that were killed left beside `path` is removed too. `new`: never replaces a file, not even one that
    another process made in the meantime.

    Raises:
        UserError: the disk is full, the folder is not writable, `path` is a device, pipe or socket, or `new` and
            there; what stood at `path` is untouched.
    """
    path = Path(path)
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield temporary
            _flush(temporary)
            if new:
                _put_new(temporary, path)
            else:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for what a library writes in place; it is removed at the end, as are those that killed
    processes of this machine left.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    name = f".scratch.{platform.node()}"
    with telling_disk_errors(parent):
        for left in parent.glob(f"{glob.escape(name)}.*.tmp"):
            if _is_left_behind(left):
                shutil.rmtree(left, ignore_errors=True)
        folder = parent / f"{name}.{os.getpid()}.tmp"
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporaries of a file whose process is dead."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        # one of a process on another machine goes too: then that one's write fails, and says so
        if _is_left_behind(temporary):
            temporary.unlink(missing_ok=True)


def _is_left_behind(temporary: Path) -> bool:
    """Whether the process that a temporary is named after has ended."""
    process = temporary.name.split(".")[-2]
    return process.isdigit() and not _is_alive(int(process))


def _is_alive(process: int) -> bool:
    try:
        # signal 0 only asks; elsewhere it would end the process
        if os.name == "posix":
            os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _put_new(temporary: Path, path: Path) -> None:
    """Gives a file its name, unless there is one of that name: in one step, which only a second name is."""
    try:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            raise
        except OSError:
            # a disk without second names: an empty file keeps the place for a moment
            path.touch(exist_ok=False)
            temporary.replace(path)
    except FileExistsError as e:
        raise UserError(f"{path} was made by another process in the meantime; give another name") from e


def check_replaceable(path: Path) -> None:
    """Raises UserError: a device (/dev/null for one), pipe or socket: a file would take its place for everyone."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a device, pipe or socket, which a file must not replace; give the name of a file")


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """What goes wrong when writing to `path` inside is told in one line.

    Raises:
        UserError: the disk is full or the path is not writable.
    """
    try:
        yield
    except OSError as e:
        if is_disk_full(e):
            raise DiskFull(f"no space left on the disk for {path}; free some (see: df -h {Path(path).parent})") from e
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose a writable folder") from e


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, quota or largest file size is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Lets a library write the file (it gets a path to write to), in one step."""
    with replacing(path) as temporary:
        write(temporary)


@contextmanager
def locked(lock: Path, in_use: str, timeout_s: float = 0) -> Iterator[None]:
    """Keeps what a lock file stands for for this process. `in_use`: what to tell where another process still has it
    after `timeout_s`.

    Raises:
        UserError: another process has it, or its folder is not writable.
    """
    with telling_disk_errors(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=timeout_s)
        except Timeout as e:
            raise UserError(in_use) from e
    try:
        yield
    finally:
        held.release()


def check_unlocked(lock: Path, in_use: str, timeout_s: float = 0) -> None:
    """Raises what `locked` would, and keeps nothing."""
    with locked(lock, in_use, timeout_s):
        pass


def refuse_folder(path: Path) -> None:
    """Raises UserError: a folder where a file of weights is needed; names those in it, in a fold of nnU-Net's too."""
    if not path.is_dir():
        return
    found = [file for end in _OF_WEIGHTS for file in sorted(path.glob(end)) if not file.name.startswith(".")]
    there = ", ".join(map(str, found[:_MOST_NAMED])) or "it holds none"
    raise UserError(f"{path} is a folder, needed a file of weights; give one: {there}")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def telling_damage(path: Path, needed: str) -> Iterator[None]:
    """What goes wrong when reading `path` and taking it apart inside is told in one line.

    Raises:
        UserError: it is not what was needed.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}), needed {needed}") from e


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Content of a run's settings file.

    Raises:
        UserError: it is not a JSON object.
    """
    with telling_damage(run_dir / SETTINGS, "a JSON object; start anew under another --name"):
        return {**json.loads((run_dir / SETTINGS).read_text(encoding="utf-8"))}


def _flush(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    # safetensors and tempfiles create 0600; users share encoder files
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
