"""The log of a run: one JSON object per step or epoch, a progress bar, and Weights & Biases if asked for."""

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_hiendmae import files
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.schemas import LogLine, validated

logger = logging.getLogger(__name__)

# nnU-Net's own switch
WANDB_VARIABLE = "nnUNet_wandb_enabled"


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
        # of a run that begins nothing is kept, not even what was measured before its first step
        kept = [line for line in read_log(run_dir, unit) if line[unit] < first] if first else []
        self.first_line, self.last = (kept[0], kept[-1]) if kept else (None, None)
        files.write_text(run_dir / files.LOG, "".join(json.dumps(line) + "\n" for line in kept))
        with files.telling_disk_errors(run_dir / files.LOG):
            self._file = (run_dir / files.LOG).open("a", encoding="utf-8")
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit=unit, disable=not self._terminal, dynamic_ncols=True)
        asked = wandb_config is not None and _asks_for_wandb()
        self.wandb = _wandb_logger(run_dir, first > 0, wandb_config) if asked else None

    def add(self, line: dict[str, Any], told: str = "", **shown: str) -> None:
        """Records a finished step or epoch; `told` is logged where there is no terminal, `shown` stands beside the
        bar."""
        self.last = line
        self.write(line)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if told and not self._terminal:
            logger.info(told)

    def write(self, line: dict[str, Any]) -> None:
        """Records a line as it is, which no bar counts."""
        with files.telling_disk_errors(self.run_dir / files.LOG):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

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


def _asks_for_wandb() -> bool:
    return os.environ.get(WANDB_VARIABLE, "0") in ("1", "True", "true")


def check_wandb() -> None:
    """Raises UserError: Weights & Biases is asked for, and not installed."""
    from nnunetv2.training.logging import nnunet_logger

    if _asks_for_wandb() and nnunet_logger.wandb is None:
        raise UserError(f"{WANDB_VARIABLE} is set, but wandb is missing; run: pip install wandb, or: unset it")


def _wandb_logger(run_dir: Path, resume: bool, config: dict[str, Any]) -> Any:
    from nnunetv2.training.logging.nnunet_logger import WandbLogger

    try:
        wandb = WandbLogger(str(run_dir), resume)
    except RuntimeError as e:
        raise UserError(f"{WANDB_VARIABLE} is set, but {e} Or run: unset {WANDB_VARIABLE}") from e
    wandb.update_config(config)
    return wandb
