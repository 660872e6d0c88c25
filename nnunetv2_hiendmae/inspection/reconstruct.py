"""`hiendmae reconstruct`: what a pretraining run makes of masked crops, as pictures and where they lie."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation
from torch import Tensor
from torch.utils.data import default_collate

from nnunetv2_hiendmae.environment import check_device
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.figures import MontageRow, draw_montage
from nnunetv2_hiendmae.files import CHECKPOINT, DATA_KEY, SETTINGS, STATE, STEP, read_settings
from nnunetv2_hiendmae.inspection.volumes import write_nifti
from nnunetv2_hiendmae.pretraining.method import Method, Reconstruction
from nnunetv2_hiendmae.pretraining.progress import how_shown, shown_range
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings
from nnunetv2_hiendmae.training.batches import SampleDataset
from nnunetv2_hiendmae.training.grids import Grid, case_grid
from nnunetv2_hiendmae.training.run import load_checkpoint
from nnunetv2_hiendmae.training.views import unaugmented
from nnunetv2_hiendmae.training.volumes import Case, CaseSet, find_cases
from nnunetv2_hiendmae.volume_format import VolumeFormat

logger = logging.getLogger(__name__)

PICTURE_SLICES = 5
# array axes of a picture: rows of slices from feet to head, front up, patient's right at the left
PICTURE_AXES = "SPL"


def reconstruct(
    run_dir: Path,
    output: Path,
    *,
    case: str | None = None,
    cases: int = 4,
    view: str | None = None,
    seed: int = 0,
    device: str = "cuda",
) -> list[Path]:
    """Writes, per case and view, `<dataset>/<case>_<view>.png` and, where the view is a crop of the volume as it is,
    `<case>_<view>_{input,masked,reconstruction}.nii.gz` on the crop's own grid, CT in HU.

    A crop is a function of the seed and the case, and is not augmented where the method allows that.

    Args:
        run_dir: of `hiendmae pretrain`; its preprocessed cases must still be there.
        case: 'Dataset/case'; None: `cases` of them, drawn by the seed.
        view: only this one of the method's; None: all.

    Returns:
        The PNG files.

    Raises:
        UserError: no such run, case, view or device, or data that is gone.
    """
    check_device(device)
    if cases < 1 or seed < 0:
        raise UserError(f"--cases is {cases} and --seed {seed}, needed at least 1 case and a seed of 0 or more")
    settings, method = load_run(run_dir)
    if type(method).reconstruct is Method.reconstruct:
        raise UserError(f"{settings.method} reconstructs nothing: there are no pictures of {run_dir}")
    data = find_cases(settings.datasets, settings.plans_name, settings.configuration)
    if read_settings(run_dir).get(DATA_KEY) != data.digest():
        logger.warning(f"the preprocessed cases are not those {run_dir} was trained on: some came, went or changed")
    grids = {chosen: case_grid(chosen) for chosen in _choose(data.cases, case, cases, seed)}
    views, pictures = unaugmented(method.to(device).views()), []
    for chosen, grid in grids.items():
        # alone, so that its crop does not depend on which others are shown
        drawn = SampleDataset(CaseSet((chosen,), data.format), views.draw, seed)[0, data.cases.index(chosen)]
        batch = default_collate([drawn])
        made = method.reconstruct({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        if view is not None and view not in made:
            raise UserError(f"--view {view} is no view of this method, needed one of {', '.join(made)}")
        for name in made if view is None else [view]:
            location = _location(drawn, made[name], grid)
            pictures.append(_write(output, chosen, name, made[name], grid, location, data.format))
    return pictures


def load_run(run_dir: Path) -> tuple[PretrainSettings, Method]:
    """Settings of a run, and its method with the weights of the last checkpoint, in eval mode on the CPU.

    Raises:
        UserError: not a run folder, no checkpoint yet, settings that this version does not know, or a checkpoint
            that is damaged or does not fit them.
    """
    file, checkpoint = run_dir / SETTINGS, run_dir / CHECKPOINT
    if not file.is_file():
        raise UserError(f"{run_dir} holds no {SETTINGS}, needed the folder of a run of: hiendmae pretrain")
    if not checkpoint.is_file():
        raise UserError(f"{run_dir} has no {CHECKPOINT} yet; let the run reach its first checkpoint")
    stored = {k: v for k, v in read_settings(run_dir).items() if k != DATA_KEY}
    try:
        settings = PretrainSettings.from_dict(stored)
    except (TypeError, ValueError, UserError) as e:
        raise UserError(f"{file} is damaged or of another version ({e}); start the run anew") from e
    method = settings.build_method()
    try:
        method.load_state_dict(load_checkpoint(run_dir, (STEP, STATE))[STATE])
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{checkpoint} does not fit {SETTINGS} beside it ({reason}); start anew") from e
    return settings, method.eval()


def _choose(cases: Sequence[Case], wanted: str | None, count: int, seed: int) -> list[Case]:
    names = [case.name for case in cases]
    if wanted is None:
        return [cases[i] for i in sorted(np.random.default_rng(seed).permutation(len(cases))[:count])]
    if wanted not in names:
        raise UserError(f"the run has no case '{wanted}', needed one of its {len(names)}: {some(names, 5)}")
    return [cases[names.index(wanted)]]


def _location(drawn: Mapping[str, Any], made: Reconstruction, grid: Grid) -> Grid | None:
    """Grid of a reconstruction, None where it is not simply the crop that was drawn at a known corner."""
    lower, image = drawn.get("lower"), drawn.get("image")
    if lower is None or not torch.equal(made.input[0].cpu().float(), image):
        return None
    return grid.cropped(lower.tolist(), image.shape[1:])


def _write(
    output: Path, case: Case, view: str, made: Reconstruction, grid: Grid, location: Grid | None, volumes: VolumeFormat
) -> Path:
    dataset, _, name = case.name.rpartition("/")
    stem = output / dataset / f"{name}_{view}"
    arrays = made.arrays(0)
    channels = len(volumes.channel_names)
    for channel in range(channels if location else 0):
        ending = f"_{channel:04d}" if channels > 1 else ""
        for title, array in arrays.items():
            path = stem.with_name(f"{stem.name}_{title}{ending}.nii.gz")
            write_nifti(path, volumes.to_intensity(array[channel], channel), location)
    change = grid.turn_to(PICTURE_AXES)
    turned = {k: apply_orientation(volumes.to_intensity(a[0], 0), change) for k, a in arrays.items()}
    limits, hidden = shown_range(turned["input"], volumes), made.hidden[0].cpu().numpy()
    turned["masked"] = np.ma.array(turned["masked"], mask=apply_orientation(hidden, change))
    total = len(turned["input"])
    count = min(PICTURE_SLICES, total)
    # the middles of equal parts, from head to feet
    shown = [(2 * i + 1) * total // (2 * count) for i in reversed(range(count))]
    upright = grid.turned(change)
    rows = [
        MontageRow(f"slice {z + 1} of {total}", {t: a[z] for t, a in turned.items()}, limits, upright.edges)
        for z in shown
    ]
    _, height, width = upright.spacing_mm
    picture = stem.with_name(f"{stem.name}.png")
    draw_montage(picture, rows, aspect=height / width, title=f"{case.name}, {view}\n{how_shown(made, volumes)}")
    return picture
