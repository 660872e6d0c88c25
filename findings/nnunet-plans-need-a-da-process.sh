#!/usr/bin/env bash
# nnU-Net's training takes nnUNet_n_proc_DA=0 for augmentation without background processes; with it exported, its planning
# ends with "set_num_threads expects a positive integer": the planner takes the number for torch's threads.
#
# Versions: nnunetv2 2.8.1, torch 2.8.0, SimpleITK 2.5.7, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: the variable is exported for a whole session or cluster job (containers with little shared memory need 0),
#   and the traceback names neither it nor what to do.
# Seen:
#   nnUNet_n_proc_DA=1: exit 0, plans written
#   nnUNet_n_proc_DA=0: exit 1, no plans, RuntimeError: set_num_threads expects a positive integer
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.8.0 SimpleITK==2.5.7 numpy==2.3.5
export nnUNet_raw=$folder/raw nnUNet_preprocessed=$folder/preprocessed nnUNet_results=$folder/results OMP_NUM_THREADS=1
"$venv/bin/python" - <<'PYTHON'
import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

folder, rng = Path(os.environ["nnUNet_raw"]) / "Dataset001_Box", np.random.default_rng(0)
for sub in ("imagesTr", "labelsTr"):
    (folder / sub).mkdir(parents=True)
for case in range(2):
    label = np.zeros((32, 32, 32), np.uint8)
    label[8:20, 8:20, 8:20] = 1
    image = (rng.normal(size=label.shape) * 50 + 100 * label).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"c{case}_0000.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labelsTr" / f"c{case}.nii.gz"))
about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "box": 1}, "numTraining": 2, "file_ending": ".nii.gz"}
(folder / "dataset.json").write_text(json.dumps(about))
PYTHON
run() { "$venv/bin/$1" "${@:2}" >"$folder/said" 2>&1; }
run nnUNetv2_extract_fingerprint -d 1 -np 1
plans=$nnUNet_preprocessed/Dataset001_Box/nnUNetPlans.json
nnUNet_n_proc_DA=1 run nnUNetv2_plan_experiment -d 1
[ -f "$plans" ]
echo "nnUNet_n_proc_DA=1: exit 0, plans written"
rm "$plans"
code=0
nnUNet_n_proc_DA=0 run nnUNetv2_plan_experiment -d 1 || code=$?
told=$(tail -n 1 "$folder/said")
echo "nnUNet_n_proc_DA=0: exit $code, $([ -f "$plans" ] && echo plans written || echo no plans), $told"
[ "$code" = 1 ] && [ ! -f "$plans" ] && [ "$told" = "RuntimeError: set_num_threads expects a positive integer" ]
echo "as described"
