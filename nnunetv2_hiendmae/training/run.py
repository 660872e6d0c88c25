"""How a run is carried out: device, processes and precision; and its folder, kept for one process, with its settings,
its log, and checkpoints that a kill leaves whole."""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
import zipfile
import zlib
from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from torch import nn
from tqdm import tqdm

from nnunetv2_hiendmae import files
from nnunetv2_hiendmae.environment import check_device, nnunet_folder
from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.options.commands import PRECISIONS
from nnunetv2_hiendmae.schemas import LogLine, validated
from nnunetv2_hiendmae.weights.checkpoint_io import read_checkpoint

logger = logging.getLogger(__name__)

# nnU-Net's own switch
WANDB_VARIABLE = "nnUNet_wandb_enabled"


def num_processes() -> int:
    """Processes of this run, by torchrun's variables or those of srun."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def launch(device: str, precision: str, alone: str = "") -> Fabric:
    """Fabric for this process, alone or as one of torchrun's or srun's. `alone`: name of a command that needs no
    distributed training and uses one device.

    Raises:
        UserError: no such device, one that the precision does not go with, or several processes of such a command.
    """
    check_device(device)
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs -device cuda, not {device}; use fp32 or bf16")
    if alone:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(f"{alone} uses one device, got several processes; run it without torchrun")
        return Fabric(accelerator=device, devices=1, precision=PRECISIONS[precision])
    processes = num_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(1, processes // int(os.environ.get("SLURM_NNODES") or 1)))
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    devices = {"devices": local, "num_nodes": processes // local, "strategy": "ddp" if processes > 1 else "auto"}
    fabric = Fabric(accelerator=device, precision=PRECISIONS[precision], **devices)
    fabric.launch()
    return fabric


def choose_precision(asked: str, device: str) -> str:
    """What "auto" means on a device: bf16 on GPUs that have it, fp16 on older ones, else fp32."""
    if asked != "auto":
        return asked
    if device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextmanager
def noting_stop_signals() -> Iterator[Callable[[], int]]:
    """The first Ctrl-C or SIGTERM inside is only noted, so that work ends at a good place; a second acts at once.

    Gives a function that tells the signal's number, 0 for none. Outside the main thread nothing changes.
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
        logger.warning(f"{signal.Signals(number).name}: stopping at the end of this step; again stops at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        restore()


def on_first_process(fabric: Fabric, work: Callable[[], None]) -> None:
    """Runs `work` on the first process; its UserError ends all of them, so that none waits, and is told once."""
    told = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as e:
            told = str(e)
    told = fabric.broadcast(told)
    if told and not fabric.is_global_zero:
        raise SystemExit(2)
    if told:
        raise UserError(told)


def check_free_disk(run_dir: Path, network: nn.Module) -> None:
    """A checkpoint is weights and two AdamW moments; while it is replaced there are two of them.

    Raises:
        UserError: less than that is free.
    """
    needed = 2 * 3 * 4 * sum(p.numel() for p in network.parameters())
    existing = next(p for p in (run_dir, *run_dir.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        told = f"{free / 1e9:.1f} GB are free for {run_dir}, its checkpoints need {needed / 1e9:.1f} GB"
        raise UserError(f"{told}; free some, or choose another disk with -o")


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
            resume, or settings or data differ.
    """
    in_use = f"{run_dir} is in use by another process; wait for it, or choose another --name or -o"
    with files.locked(run_dir / files.LOCK, in_use):
        # the folder is ours, so whoever was writing these is dead
        for leftover in run_dir.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        there = [name for name in (files.CHECKPOINT, files.ENCODER) if (run_dir / name).exists()]
        if there and not (run_dir / files.SETTINGS).exists():
            told = f"{run_dir} holds {there[0]} but has lost its {files.SETTINGS}"
            raise UserError(f"{told}: put that back to continue, or choose another --name or -o")
        if settings.resume:
            _check_same(run_dir, settings, data_digest)
            _record(run_dir, settings, data_digest)
        elif there:
            raise UserError(f"{run_dir} already holds a run; continue it with --c, or choose another --name or -o")
        else:
            if (run_dir / files.LOG).exists():
                logger.warning(f"{run_dir} was stopped before its first checkpoint: its log begins anew")
            _record(run_dir, settings, data_digest)
        yield


def _record(run_dir: Path, settings: RunSettings, data_digest: str) -> None:
    """Writes the settings; where they are recorded, only what decides the result and is new."""
    recorded = {**settings.to_dict(), files.DATA_KEY: data_digest}
    if (run_dir / files.SETTINGS).exists():
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
    state = {**values, **{name: part.state_dict() for name, part in parts.items()}}
    # through a Python file, so that a full disk is an OSError and not an abort inside torch's writer
    with files.replacing(run_dir / files.CHECKPOINT) as temporary, temporary.open("wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:
            # closing the archive fails too, and hides what went wrong first
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


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


class RunLog:
    """log.jsonl, one JSON object per step or epoch; a progress bar on a terminal, log lines elsewhere.

    Args:
        unit: "step" or "epoch", the key of a line's number; lines from `first` on are dropped: a run was killed.
        total: for the bar.
        wandb_config: of the run in Weights & Biases, `wandb` where nnU-Net's variable turns it on; None: not used.

    Raises:
        UserError: the file cannot be written, or W&B is not installed.
    """

    def __init__(self, run_dir: Path, unit: str, first: int, total: int, wandb_config: dict[str, Any] | None = None):
        self.run_dir, self.first, self.total = run_dir, first, total
        kept = [line for line in read_log(run_dir, unit) if line[unit] < first]
        self.last = kept[-1] if kept else None
        files.write_text(run_dir / files.LOG, "".join(json.dumps(line) + "\n" for line in kept))
        with files.telling_disk_errors(run_dir / files.LOG):
            self._file = (run_dir / files.LOG).open("a", encoding="utf-8")
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit=unit, disable=not self._terminal, dynamic_ncols=True)
        asked = wandb_config is not None and os.environ.get(WANDB_VARIABLE, "0") in ("1", "True", "true")
        self.wandb = _wandb_logger(run_dir, first > 0, wandb_config) if asked else None

    def add(self, line: dict[str, Any], told: str = "", **shown: str) -> None:
        """Records a finished step or epoch; `told` is logged where there is no terminal, `shown` stands beside the
        bar."""
        self.last = line
        with files.telling_disk_errors(self.run_dir / files.LOG):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if told and not self._terminal:
            logger.info(told)

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        # what could not be written was told before; closing tries again
        with suppress(OSError):
            self._file.close()


def read_log(run_dir: Path, unit: str) -> list[dict[str, Any]]:
    """Lines of log.jsonl that are whole, by their number, the value of `unit`; none where there is no such file."""
    path = run_dir / files.LOG
    lines = {}
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = validated(LogLine, text)
            lines[int(line[unit])] = json.loads(text)
        except (ValueError, KeyError, TypeError):
            # a kill may cut the last line; the step is done again
            logger.warning(f"dropped a damaged line of {path}")
    return [lines[number] for number in sorted(lines)]


def _wandb_logger(run_dir: Path, resume: bool, config: dict[str, Any]) -> Any:
    from nnunetv2.training.logging.nnunet_logger import WandbLogger

    try:
        wandb = WandbLogger(str(run_dir), resume)
    except RuntimeError as e:
        raise UserError(f"{WANDB_VARIABLE} is set, but {e} Or run: unset {WANDB_VARIABLE}") from e
    wandb.update_config(config)
    return wandb
