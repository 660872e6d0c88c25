#!/usr/bin/env bash
# SimpleITK reads NaN in a NIfTI file as 0, and infinity too; nibabel, and SimpleITK itself from .mha and .nrrd, as they are.
#
# Versions: SimpleITK 2.5.7, nibabel 5.4.2, numpy 2.3.5 (Python 3.11, Linux)
# Why it matters: programs write NaN where there is no image (outside of the field of view, after registration). Read by
#   ITK, and so by nnU-Net's default reader, these voxels of a CT become 0 HU, which is water: a body part where there is
#   none, inside of every soft-tissue window. No check for NaN after reading can find it, nor can a loss.
# Seen:
#   nibabel        nii.gz  nan inf 7.0
#   SimpleITK      nii.gz  0.0 0.0 7.0
#   SimpleITK      mha     nan inf 7.0
#   SimpleITK      nrrd    nan inf 7.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.3.5
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import nibabel
import numpy as np
import SimpleITK as sitk

voxels = np.full((3, 4, 5), 7, np.float32)
voxels[0, 0, 0], voxels[0, 0, 1] = np.nan, np.inf
nibabel.save(nibabel.Nifti1Image(voxels.T, np.eye(4)), "image.nii.gz")
for ending in ("mha", "nrrd"):
    sitk.WriteImage(sitk.GetImageFromArray(voxels), f"image.{ending}")
found = {("nibabel", "nii.gz"): nibabel.load("image.nii.gz").get_fdata(dtype=np.float32).T}
for ending in ("nii.gz", "mha", "nrrd"):
    found["SimpleITK", ending] = sitk.GetArrayFromImage(sitk.ReadImage(f"image.{ending}"))
for (library, ending), array in found.items():
    print(f"{library:<14} {ending:<7}", *(float(v) for v in array[0, 0, :3]))
for which, array in found.items():
    expected = voxels.copy()
    if which == ("SimpleITK", "nii.gz"):
        expected[0, 0, :2] = 0
    assert np.array_equal(array, expected, equal_nan=True), which
PYTHON
echo "as described"
