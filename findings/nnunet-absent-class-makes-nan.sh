#!/usr/bin/env bash
# nnU-Net's mean Dice is NaN if a class is in no case's truth and, rightly, in no prediction; one wrong voxel makes it a
# number again. nnUNetv2_find_best_configuration then ends with an IndexError where the right model is named first, and
# prefers the wrong one where it is named second.
#
# Versions: nnunetv2 2.8.1, torch 2.14.1, numpy 2.4.6 (Python 3.11, Linux, CPU)
# Why it matters: few labelled cases, slabs and pathologies leave classes without a validation case, and folds of a few
#   cases are what pretraining is compared on. Means of such folds say whether a stray voxel was predicted, not how good the
#   model is; average over classes that have a truth instead.
# Seen, two cases with classes 1 and 2, no voxel of class 2 in the truth:
#   class 1 perfect, no voxel of class 2: mean nan
#   class 1 wrong by half, one voxel of class 2: mean 0.3333
#   find_best_configuration, the perfect model first: IndexError; second: it chooses the other one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.14.1 numpy==2.4.6
export nnUNet_raw=$folder/raw nnUNet_preprocessed=$folder/preprocessed nnUNet_results=$folder/results
cat > "$folder/absent.py" <<'PYTHON'
import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

raw, preprocessed, results = (Path(os.environ[f"nnUNet_{kind}"]) for kind in ("raw", "preprocessed", "results"))
DATASET, CASES = "Dataset001_Absent", ("a", "b")
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))


def model(name, prediction):
    """A trained fold of two cases, as nnU-Net leaves it."""
    folder = results / DATASET / f"nnUNetTrainer__{name}__3d_fullres"
    validation = folder / "fold_0" / "validation"
    for case in CASES:
        write(validation / f"{case}.nii.gz", prediction)
    summary = compute_metrics_on_folder(
        str(truth), str(validation), str(validation / "summary.json"), SimpleITKIO(), ".nii.gz", [1, 2], None, 1
    )
    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
    plans = {
        "dataset_name": DATASET,
        "plans_name": name,
        "image_reader_writer": "SimpleITKIO",
        "configurations": {"3d_fullres": {"data_identifier": name, "architecture": {}}},
    }
    for place in (folder, preprocessed / DATASET):
        (place / "dataset.json").write_text(json.dumps(description))
    (folder / "plans.json").write_text(json.dumps(plans))
    (preprocessed / DATASET / f"{name}.json").write_text(json.dumps(plans))
    mean = summary["foreground_mean"]["Dice"]
    print(f"{name}: mean Dice {mean:.4f}")
    return mean


def best(*names):
    models = [{"plans": name, "configuration": "3d_fullres", "trainer": "nnUNetTrainer"} for name in names]
    try:
        found = find_best_configuration(DATASET, models, False, 1, True, (0,))
    except Exception as error:
        return type(error).__name__
    return found["best_model_or_ensemble"]["selected_model_or_models"][0]["plans_identifier"]


if __name__ == "__main__":
    truth = preprocessed / DATASET / "gt_segmentations"
    organ = np.zeros((8, 8, 8), np.uint8)
    organ[2:6, 2:6, 2:6] = 1
    for case in CASES:
        write(truth / f"{case}.nii.gz", organ)
    half = organ.copy()
    half[2:6, 2:6, 4:6] = 0
    half[0, 0, 0] = 2
    means = model("perfect", organ), model("half", half)
    assert np.isnan(means[0]) and round(means[1], 4) == 0.3333, means
    chosen = best("perfect", "half"), best("half", "perfect")
    print(f"best of perfect and half: {chosen[0]}; of half and perfect: {chosen[1]}")
    assert chosen == ("IndexError", "half"), chosen
PYTHON
"$venv/bin/python" -W ignore "$folder/absent.py"
