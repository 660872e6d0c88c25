"""The folder of a run: kept for one process, with its settings and checkpoints that a kill leaves whole."""

import io
import json
import logging
import os
import shutil
import zipfile
import zlib
from abc import ABC
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_hiendmae import files
from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.errors import DiskFull, UserError, printable
from nnunetv2_hiendmae.weights.checkpoint_io import read_checkpoint

logger = logging.getLogger(__name__)

_IN_USE = "{} is in use by another process; wait for it, or choose another --name or -o"


def check_free_disk(run_dir: Path, network: nn.Module) -> None:
    """A checkpoint is weights and two AdamW moments; while it is replaced there are two of them.

    Raises:
        UserError: less than that is free.
    """
    needed = 2 * 3 * 4 * sum(p.numel() for p in network.parameters())
    free = free_disk(run_dir)
    if free < needed:
        told = f"{free / 1e9:.1f} GB are free for {run_dir}, its checkpoints need {needed / 1e9:.1f} GB"
        raise UserError(f"{told}; free some, or choose another disk with -o")


def free_disk(run_dir: Path) -> int:
    """Bytes that are free for a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(run_dir)).free


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.resolve().parents) if p.is_dir())


class RunSettings(ABC):
    """What a run computes: base of frozen dataclasses that extend the user's options, whose fields are decided here:
    none is None. They have the field `spec`.

    Raises:
        UserError: a value is out of range.
    """

    # what is recorded, in the order of files of 0.1, and which of it does not decide the result
    keys: ClassVar[tuple[str, ...]]
    not_deciding: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs}, needed 0 to {self.epochs} (--epochs)")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        recorded = {**{key: getattr(self, key) for key in self.keys}, "spec": self.spec.to_dict()}
        return json.loads(json.dumps(recorded, default=vars))

    def as_before(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What must be as it is recorded."""
        return self.deciding()

    def deciding(self) -> dict[str, Any]:
        """JSON-ready form of what decides the result; a resumed run must have the same."""
        return {k: v for k, v in self.to_dict().items() if k not in self.not_deciding}


def choose_run_dir(settings: RunSettings, kind: str, default_name: str) -> Path:
    """The folder that was asked for, else $nnUNet_results/KIND/NAME."""
    return Path(settings.output or nnunet_folder("nnUNet_results") / kind / (settings.name or default_name))


@contextmanager
def claimed(run_dir: Path, settings: RunSettings, data_digest: str) -> Iterator[None]:
    """Keeps a run folder for this process; records settings and data of a new run, or checks those of a resumed one.

    Raises:
        UserError: another process uses the folder, it holds a run that is not to be resumed, there is nothing to
            resume, or settings or data differ; the disk became full inside, or the folder was removed.
    """
    with files.locked(run_dir / files.LOCK, _IN_USE.format(run_dir)):
        # the folder is ours, so whoever was writing these is dead
        for leftover in run_dir.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        check_folder(run_dir, settings, data_digest)
        if not settings.resume and (run_dir / files.LOG).exists():
            logger.warning(f"{run_dir} was stopped before its first checkpoint: its log begins anew")
        _record(run_dir, settings, data_digest)
        try:
            yield
        except DiskFull as e:
            # with what is on the disk by now, the same command may be refused
            needs_flag = _of_a_run(run_dir) and not settings.resume
            again = "continue with the same command and --c" if needs_flag else "run the same command again"
            raise DiskFull(e.told, again) from e
        if not (run_dir / files.SETTINGS).exists():
            told = f"{run_dir / files.SETTINGS}, or the folder with it, was removed while its run went on"
            raise UserError(f"{told}; what it wrote afterwards is there, but without that it cannot be continued")


def check_folder(run_dir: Path, settings: RunSettings, data_digest: str) -> None:
    """What `claimed` checks of a folder that nobody else uses; writes nothing."""
    there = _of_a_run(run_dir)
    if there and not (run_dir / files.SETTINGS).exists():
        told = f"{run_dir} holds {there[0]} but has lost its {files.SETTINGS}"
        raise UserError(f"{told}: put that back to continue, or choose another --name or -o")
    if settings.resume:
        _check_same(run_dir, settings, data_digest)
    elif there:
        raise UserError(f"{run_dir} already holds a run; continue it with --c, or choose another --name or -o")


def check_claimable(run_dir: Path, settings: RunSettings, data_digest: str) -> None:
    """Raises what `claimed` would for a run that starts now; leaves everything as it is."""
    existing = _existing(run_dir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {run_dir}: {existing} is not writable; choose a writable folder")
    if (run_dir / files.LOCK).exists():
        files.check_unlocked(run_dir / files.LOCK, _IN_USE.format(run_dir))
    check_folder(run_dir, settings, data_digest)


def _of_a_run(run_dir: Path) -> list[str]:
    """What is there that a new run must not replace."""
    return [name for name in (files.CHECKPOINT, files.ENCODER, files.PROBE_ENCODER) if (run_dir / name).exists()]


def _record(run_dir: Path, settings: RunSettings, data_digest: str) -> None:
    """Writes the settings; of a run that goes on, only what decides the result and is new."""
    recorded = {**settings.to_dict(), files.DATA_KEY: data_digest}
    if settings.resume:
        before = files.read_settings(run_dir)
        recorded = {**before, **settings.deciding()}
        if recorded == before:
            return
    files.write_text(run_dir / files.SETTINGS, json.dumps(recorded, indent=2))


def _check_same(run_dir: Path, settings: RunSettings, data_digest: str) -> None:
    if not (run_dir / files.SETTINGS).is_file():
        raise UserError(f"nothing to continue in {run_dir} (no {files.SETTINGS}); run the same command without --c")
    before = files.read_settings(run_dir)
    now = settings.as_before(before)
    told = ", ".join(f"{k} was {before.get(k)}, is {now[k]}" for k in now if before.get(k) != now[k])
    if told:
        raise UserError(f"cannot continue {run_dir} with other settings: {told}; give the same ones, or another --name")
    if before.get(files.DATA_KEY) != data_digest:
        raise UserError(
            f"cannot continue {run_dir}: its preprocessed cases are not those it was started with (some came or went, "
            "or their size or normalisation changed); start anew under another --name"
        )


def save_state(run_dir: Path, parts: Mapping[str, Any], **values: Any) -> None:
    """Replaces the checkpoint in one step, by values and the `state_dict()` of parts.

    Raises:
        UserError: the disk is full; the former checkpoint is untouched.
    """
    state = _state(parts, values)
    # through a Python file, so that a full disk is an OSError and not an abort inside torch's writer
    with files.replacing(run_dir / files.CHECKPOINT) as temporary, temporary.open("wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:
            # closing the archive fails too, and hides what went wrong first
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def _state(parts: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **{name: part.state_dict() for name, part in parts.items()}}


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


def state_size(parts: Mapping[str, Any], **values: Any) -> int:
    """Bytes of the file that `save_state` would write."""
    counter = _Counter()
    torch.save(_state(parts, values), counter)
    return counter.size


def restore_state(run_dir: Path, parts: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Puts back the parts of the last checkpoint; its values, or those given where there is none yet."""
    state = load_checkpoint(run_dir, {*parts, *values})
    if state is None:
        logger.warning(f"{run_dir} was stopped before its first checkpoint: starting again from the beginning")
        return values
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def load_checkpoint(run_dir: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """State of the last checkpoint on the CPU, None if there is none yet.

    Raises:
        UserError: the file is damaged, or of another kind of run: it lacks some of the keys.
    """
    path = run_dir / files.CHECKPOINT
    if not path.exists():
        return None
    mend = "start anew under another --name"
    try:
        # the format has a checksum of every record, which torch does not look at
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} is not what was written; {mend}")
        state, _ = read_checkpoint(path, check_sums=False)
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is damaged ({printable(e)}); {mend}") from e
    missing = sorted(set(keys) - set(state if isinstance(state, dict) else ()))
    if missing:
        # nnU-Net's own checkpoints have the same name
        raise UserError(f"{path} is no checkpoint of such a run (no {', '.join(missing)}); give the folder of one")
    return state
