"""Folders of `hiendmae pretrain`, opened to look at what was learnt."""

from pathlib import Path

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.method import Method
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings
from nnunetv2_hiendmae.run_files import CHECKPOINT, DATA_KEY, SETTINGS, STATE, STEP, read_settings
from nnunetv2_hiendmae.training.run_folder import load_checkpoint


def read_run(run_dir: Path) -> PretrainSettings:
    """Settings of a run that has a checkpoint; reads no weights.

    Raises:
        UserError: not a run folder, no checkpoint yet, or settings that this version does not know.
    """
    if not (run_dir / SETTINGS).is_file():
        raise UserError(f"{run_dir} holds no {SETTINGS}, needed the folder of a run of: hiendmae pretrain")
    if not (run_dir / CHECKPOINT).is_file():
        raise UserError(f"{run_dir} has no {CHECKPOINT} yet; let the run reach its first checkpoint")
    stored = {k: v for k, v in read_settings(run_dir).items() if k != DATA_KEY}
    try:
        settings = PretrainSettings.from_dict(stored)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{run_dir / SETTINGS} is damaged or of another version ({e}); start the run anew") from e
    if settings.method not in METHODS:
        raise UserError(f"{run_dir} is of the method '{settings.method}', known are {', '.join(METHODS)}")
    return settings


def load_method(run_dir: Path, settings: PretrainSettings) -> Method:
    """The run's method with the weights of its last checkpoint, in eval mode on the CPU.

    Raises:
        UserError: the checkpoint is damaged or does not fit the settings.
    """
    method = settings.build_method()
    try:
        method.load_state_dict(load_checkpoint(run_dir, (STEP, STATE))[STATE])
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{run_dir / CHECKPOINT} does not fit {SETTINGS} beside it ({reason}); start anew") from e
    return method.eval()
