#!/usr/bin/env bash
# nnU-Net's resample_torch_fornnunet takes `mode`, and ignores it unless one axis is resampled separately: images are then
# interpolated linearly whatever was asked for.
#
# Versions: nnunetv2 2.8.1, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: plans may name this function with its arguments for data, segmentations and probabilities. Plans that say
#   "mode": "nearest-exact" do what they say for some images of a dataset (slices more than three times as thick as pixels)
#   and interpolate linearly in others, without a word.
# Seen, values of a resampled image that are none of the image's own:
#   mode nearest-exact, no separate axis: 100 %; with a separate axis: 0 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.8.0 numpy==2.3.5
export nnUNet_raw=$folder nnUNet_preprocessed=$folder nnUNet_results=$folder
"$venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

image = np.random.default_rng(0).normal(size=(1, 20, 30, 30)).astype(np.float32)
found = {}
for separate in (False, True):
    made = resample_torch_fornnunet(
        image, (45, 45, 45), (5.0, 1.0, 1.0), (2.2, 0.7, 0.7), force_separate_z=separate, mode="nearest-exact"
    )
    found[separate] = round(100 * np.mean(~np.isin(made, image)))
    print(f"mode nearest-exact, separate axis: {separate}: {found[separate]} % of the values are none of the image's")
linear = resample_torch_fornnunet(image, (45, 45, 45), (5.0, 1.0, 1.0), (2.2, 0.7, 0.7), force_separate_z=False)
nearest = resample_torch_fornnunet(
    image, (45, 45, 45), (5.0, 1.0, 1.0), (2.2, 0.7, 0.7), force_separate_z=False, mode="nearest-exact"
)
assert found == {False: 100, True: 0} and np.array_equal(linear, nearest), found
PYTHON
