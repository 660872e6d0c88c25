#!/usr/bin/env bash
# nnUNetv2_move_plans_between_datasets replaces the image reader of the plans by the first one that knows the target's file
# ending, also where the plans' own reader knows it as well. It says nothing.
#
# Versions: nnunetv2 2.8.1, torch 2.14.1, numpy 2.4.6 (Python 3.11, Linux, CPU)
# Why it matters: moved plans are how a model goes on from pretraining to another dataset. Plans with a reader that turns
#   images to RAS become plans with one that leaves them as they lie: the network then sees mirrored volumes.
# Seen, one NIfTI image that lies as LPS, plans with NibabelIOWithReorient:
#   reader after the move: SimpleITKIO
#   of the same file the former reader gives an array whose rows and columns are those of the new one, reversed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.14.1 numpy==2.4.6
export nnUNet_raw=$folder/raw nnUNet_preprocessed=$folder/preprocessed nnUNet_results=$folder/results
cat > "$folder/moved.py" <<'PYTHON'
import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
SOURCE, TARGET, PLANS = "Dataset001_Source", "Dataset002_Target", "Planned"
READERS = {reader.__name__: reader for reader in (NibabelIOWithReorient, SimpleITKIO)}

image = raw / TARGET / "imagesTr" / "case_0000.nii.gz"
image.parent.mkdir(parents=True)
(raw / TARGET / "labelsTr").mkdir()
# the identity is LPS
sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.float32).reshape(3, 4, 5)), str(image))
sitk.WriteImage(sitk.Image([5, 4, 3], sitk.sitkUInt8), str(raw / TARGET / "labelsTr" / "case.nii.gz"))
description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "numTraining": 1}
(raw / TARGET / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
for name in (SOURCE, TARGET):
    (preprocessed / name).mkdir(parents=True)
plans = {"dataset_name": SOURCE, "plans_name": PLANS, "configurations": {}}
plans["image_reader_writer"] = NibabelIOWithReorient.__name__
(preprocessed / SOURCE / f"{PLANS}.json").write_text(json.dumps(plans))

move_plans_between_datasets(SOURCE, TARGET, PLANS)
moved = json.loads((preprocessed / TARGET / f"{PLANS}.json").read_text())["image_reader_writer"]
print(f"reader before: {plans['image_reader_writer']}, after the move: {moved}")
before, after = (READERS[name]().read_images([str(image)])[0][0] for name in (plans["image_reader_writer"], moved))
mirrored = np.array_equal(before, after[:, ::-1, ::-1])
print(f"the same image: equal {np.array_equal(before, after)}, rows and columns reversed {mirrored}")
assert moved == "SimpleITKIO" and mirrored
PYTHON
"$venv/bin/python" -W ignore "$folder/moved.py"
