#!/usr/bin/env bash
# nnU-Net's default resampling repeats slices where a target is isotropic: as soon as the slices of an image are more than
# three times as thick as its pixels, every new slice is a copy of the nearest old one (order_z 0).
#
# Versions: nnunetv2 2.8.1, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: the rule is made for targets with thick slices, where few slices are made anew. Isotropic targets (what
#   3D transformers want, and -overwrite_target_spacing gives) turn most clinical CTs into stairs: the same image at the
#   same target is interpolated if its pixels are a bit larger. Networks that learn by filling in hidden slices find them
#   next door.
# Seen, noise of 0.75 mm pixels resampled to 1.5 mm by the functions and arguments of nnU-Net's default plans:
#   slices of 2.5 mm: 40 % of neighbouring slices are identical; of 5 mm: 71 %
#   slices of 2.5 mm and pixels of 0.85 mm: 0 %
#   the same with the arguments of nnU-Net's torchres planner (linear, no separate z): 0 %, 2 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.8.0 numpy==2.3.5
export nnUNet_raw=$folder nnUNet_preprocessed=$folder nnUNet_results=$folder
"$venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

default, arguments, _, _ = ExperimentPlanner.determine_resampling(None)
target = (1.5, 1.5, 1.5)


def twins(function, arguments, spacing):
    image = np.random.default_rng(0).normal(size=(1, round(150 / spacing[0]), 40, 40)).astype(np.float32)
    shape = compute_new_shape(image.shape[1:], spacing, target)
    made = np.asarray(function(image, shape, spacing, target, **arguments))[0]
    return round(100 * np.mean([np.array_equal(a, b) for a, b in zip(made, made[1:])]))


linear = {"is_seg": False, "force_separate_z": False}
found = {
    "default, 2.5 mm": twins(default, arguments, (2.5, 0.75, 0.75)),
    "default, 5 mm": twins(default, arguments, (5.0, 0.75, 0.75)),
    "default, 2.5 mm, pixels of 0.85 mm": twins(default, arguments, (2.5, 0.85, 0.85)),
    "torch, 2.5 mm": twins(resample_torch_fornnunet, linear, (2.5, 0.75, 0.75)),
    "torch, 5 mm": twins(resample_torch_fornnunet, linear, (5.0, 0.75, 0.75)),
}
for which, percent in found.items():
    print(f"{which:<36} {percent} % of neighbouring slices are identical")
assert list(found.values()) == [40, 71, 0, 0, 2], found
PYTHON
