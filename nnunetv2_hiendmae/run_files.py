"""What a run folder holds: names of its files, keys of its checkpoints and settings. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.errors import UserError

SETTINGS, CHECKPOINT, LOG, LOCK = "run.json", "checkpoint_latest.pth", "log.jsonl", ".lock"
ENCODER = "encoder.safetensors"
# of a pretraining checkpoint: the next step, and the state of the method
STEP, STATE = "step", "method"
# of the settings: digest of the cases that the run was started with
DATA_KEY = "data_sha256"


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Content of a run's settings file.

    Raises:
        UserError: it is not a JSON object.
    """
    file = run_dir / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is damaged ({e}); start anew under another --name") from e
    if not isinstance(settings, dict):
        raise UserError(f"{file} is damaged (no JSON object); start anew under another --name")
    return settings
