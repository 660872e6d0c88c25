"""Writing files so that nothing on disk is ever half-written, and keeping folders for one process."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnunetv2_hiendmae.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hands out a temporary path beside `path`; on success it takes `path`'s place, on failure it is removed.

    Raises:
        UserError: the disk is full, the folder is not writable, or `path` is a device, pipe or socket; what stood at
            `path` is untouched.
    """
    path = Path(path)
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """
    Raises:
        UserError: a device (/dev/null for one), pipe or socket: a file would take its place for everyone.
    """
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
        raise _as_user_error(Path(path), e) from e


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Lets a library write the file (it gets a path to write to), in one step."""
    with replacing(path) as temporary:
        write(temporary)


@contextmanager
def locked(lock: Path, in_use: str, timeout_s: float = 0) -> Iterator[None]:
    """Keeps what a lock file stands for for this process.

    Args:
        in_use: what to tell where another process still has it after `timeout_s`.

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


def _flush(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    # safetensors and tempfiles create 0600; users share encoder files
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _as_user_error(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left on the disk for {path}; free some (see: df -h {path.parent}) and run the same command again"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}; choose a writable folder")
