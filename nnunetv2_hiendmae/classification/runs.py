"""What a classification run keeps in its folder besides models: log.jsonl and the checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.pretraining.checkpoint import CHECKPOINT

LOG = "log.jsonl"
KEYS = {"epoch", "network", "optimizer", "precision", "best"}


class EpochLog:
    """log.jsonl, one JSON object per epoch; lines from `first_epoch` on (of a run that was killed) are dropped."""

    def __init__(self, run_dir: Path, first_epoch: int):
        self._path = run_dir / LOG
        text = self._path.read_text(encoding="utf-8") if first_epoch else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()][:first_epoch]

    def add(self, line: dict[str, Any]) -> None:
        """Appends an epoch. The file is written anew, in one step: it never holds half a line."""
        self.lines.append(line)
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """State of the last checkpoint on the CPU, None if there is none yet.

    Raises:
        UserError: the file is damaged, or no checkpoint of a classifier.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged file
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} is damaged ({reason}); start anew under another --name") from e
    if not isinstance(state, dict) or set(state) != KEYS:
        raise UserError(f"{path} is no checkpoint of a classifier; give the folder of a run of hiendmae classify train")
    return state
