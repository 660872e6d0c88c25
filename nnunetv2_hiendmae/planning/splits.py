"""Folds of a dataset that is planned: which one to train first, and what nnU-Net would not say of them in time."""

import logging
from pathlib import Path

from nnunetv2_hiendmae.errors import some
from nnunetv2_hiendmae.planning.dataset import RawDataset
from nnunetv2_hiendmae.schemas import NNUNET_FOLDS, SPLITS_FILE, Folds, read_json

logger = logging.getLogger(__name__)


def first_fold(raw: RawDataset, folder: Path) -> str:
    """What to train first; warns where nnU-Net cannot make its folds, or where those in `folder` do not fit.

    Raises:
        UserError: the file of folds is damaged.
    """
    file = folder / SPLITS_FILE
    if not file.is_file():
        if len(raw.cases) >= NNUNET_FOLDS:
            return "0"
        told = f"{raw.name} has {len(raw.cases)} cases, nnU-Net makes its folds of {NNUNET_FOLDS} at least"
        logger.warning(f"{told}: train with fold 'all', or write your own folds to {file}")
        return "all"
    mend = f"mend or remove it; the one in {folder} is a copy, or made by nnUNetv2_train"
    for number, fold in enumerate(read_json(file, Folds, mend)):
        train, val = set(fold["train"]), set(fold["val"])
        if unknown := sorted((train | val) - raw.cases.keys()):
            told = f"fold {number} in {file} names cases that {raw.name} lacks: {some(unknown)}"
            logger.warning(f"{told}; nnU-Net's training of it ends where it reads them: mend it")
        if both := sorted(train & val):
            told = f"fold {number} in {file} trains on its validation cases: {some(both)}"
            logger.warning(f"{told}; its Dice will be too high: mend it")
    return "0"
