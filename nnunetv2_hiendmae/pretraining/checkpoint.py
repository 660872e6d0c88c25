"""The run folder: its lock, its settings, and checkpoints that a kill at any moment leaves whole."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import replacing, telling_disk_errors, write_text
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.data import PretrainData
from nnunetv2_hiendmae.pretraining.method import Method
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder
from nnunetv2_hiendmae.weights.run_checkpoint import ENCODER, SETTINGS

CHECKPOINT = "checkpoint_latest.pth"
LOCK = ".lock"
DATA_KEY = "data_sha256"
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class PretrainSettings:
    """What a run computes, and how often it saves.

    Args:
        batch_size: crops per optimizer step over all processes and accumulated micro-batches.
        accumulate: micro-batches per optimizer step.
        checkpoint_epochs, picture_epochs: every so many epochs (and at the end).

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    plans_name: str
    configuration: str
    method: str
    options: dict[str, Any]
    spec: EncoderSpec
    epochs: int
    steps_per_epoch: int
    warmup_epochs: int
    batch_size: int
    accumulate: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    precision: str
    seed: int
    checkpoint_epochs: int = 10
    picture_epochs: int = 10

    def __post_init__(self):
        counts = ("epochs", "steps_per_epoch", "batch_size", "accumulate", "checkpoint_epochs", "picture_epochs")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, needed at least 1")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs}, needed 0 to {self.epochs} (--epochs)")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--lr {self.lr} must be positive and --weight-decay {self.weight_decay} not negative")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision} is unknown, needed one of {', '.join(PRECISIONS)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}, needed 0 to 2^63 - 1")
        if self.spec.drop_path_rate:
            # its draws come from the global generator: neither stateless nor in the checkpoint
            raise UserError(
                f"drop_path_rate {self.spec.drop_path_rate} is for fine-tuning only, needed 0 in pretraining"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak learning rate."""
        return self.warmup_epochs * self.steps_per_epoch

    def build_method(self) -> Method:
        """The method with freshly initialised weights; the same ones for the same seed."""
        torch.manual_seed(self.seed)
        try:
            return METHODS[self.method](self.spec, **self.options)
        except (ValueError, AssertionError, RuntimeError) as e:
            # timm and torch check sizes with assertions and runtime errors
            raise UserError(f"{self.method} cannot be built with {self.options}: {e}; change --set") from e

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return json.loads(json.dumps({**asdict(self), "spec": self.spec.to_dict()}))

    def deciding(self) -> dict[str, Any]:
        """JSON-ready form of what decides the result; a resumed run must have the same."""
        return {
            k: v for k, v in self.to_dict().items() if k not in ("accumulate", "checkpoint_epochs", "picture_epochs")
        }


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps a run folder for this process.

    Raises:
        UserError: another process uses it.
    """
    with telling_disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise UserError(f"{run_dir} is in use by another process; wait for it, or choose another --name or -o") from e
    try:
        yield
    finally:
        lock.release()


def claim_run(run_dir: Path, settings: PretrainSettings, data: PretrainData, resume: bool) -> None:
    """Records the settings and the data of a new run, or checks those of a resumed one.

    Raises:
        UserError: the folder holds a run and `resume` is off, there is nothing to resume, or settings or data differ.
    """
    file = run_dir / SETTINGS
    if not resume:
        if (run_dir / CHECKPOINT).exists() or (run_dir / ENCODER).exists():
            raise UserError(f"{run_dir} already holds a run; continue it with --c, or choose another --name or -o")
        write_text(file, json.dumps({**settings.to_dict(), DATA_KEY: data.digest()}, indent=2))
        return
    if not file.is_file():
        raise UserError(f"nothing to continue in {run_dir} (no {SETTINGS}); run the same command without --c")
    before, now = read_settings(run_dir), settings.deciding()
    differing = [k for k in now if before.get(k) != now[k]]
    if differing:
        told = ", ".join(f"{k} was {before.get(k)}, is {now[k]}" for k in differing)
        raise UserError(f"cannot continue {run_dir} with other settings: {told}; give the same ones, or another --name")
    if before.get(DATA_KEY) != data.digest():
        raise UserError(
            f"cannot continue {run_dir}: its preprocessed cases are not those it was started with (some came or went, "
            "or their size or normalisation changed); start anew under another --name"
        )


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Content of a run's settings file.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads((run_dir / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{run_dir / SETTINGS} is damaged ({e}); start anew under another --name") from e


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint in one step.

    Raises:
        UserError: the disk is full; the former checkpoint is untouched.
    """
    # through a Python file, so that a full disk is an OSError and not an abort inside torch's writer
    with replacing(run_dir / CHECKPOINT) as temporary, temporary.open("wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:
            # closing the archive fails too, and hides what went wrong first
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """State of the last checkpoint on the CPU, None if there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged file
        reason = str(e).partition("\n")[0]
        raise UserError(
            f"{path} is damaged or no pretraining checkpoint ({reason}); start anew under another --name"
        ) from e
    if not isinstance(state, dict) or not {"step", "method", "optimizer", "precision"} <= set(state):
        # nnU-Net's own checkpoints have the same name
        raise UserError(f"{path} is no pretraining checkpoint of ours; give the folder of a run of hiendmae pretrain")
    return state


def export_encoder(run_dir: Path, method: Method, settings: PretrainSettings, data: PretrainData, step: int) -> None:
    """Writes `encoder.safetensors` of a run. Its bytes depend on settings, data and weights only."""
    metadata = EncoderMetadata(
        settings.spec,
        settings.method,
        data.format,
        citations=method.citations,
        licence="that of the images it was trained on; the software is Apache-2.0",
        training={
            "step": step,
            "cases": len(data.cases),
            **{k: v for k, v in settings.deciding().items() if k != "spec"},
        },
    )
    save_encoder(run_dir / ENCODER, method.encoder.state_dict(), metadata)
