#!/usr/bin/env bash
# Where a patch reaches beyond a volume, nnU-Net fills it with 0, in training and in prediction. After z-scoring, its
# normalisation of MR, 0 is the mean intensity of the image: grey tissue, not the air that lies around the patient.
#
# Versions: nnunetv2 2.8.1, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: a network that is pretrained by rebuilding patches learns to paint grey bars beside the head, and one that
#   segments sees an edge of the image that no scanner makes, in every volume that is smaller than the patch along an axis.
#   (CT: 0 is the mean of the labelled voxels.)
# Seen, for an MR-like head in air of which 16 of 24 slices are there, normalised by nnU-Net's ZScoreNormalization:
#   air -0.79, head 1.24, whole image 0.00
#   beyond the volume: 0.00 in training (nnUNetDataLoader), 0.00 in prediction (nnUNetPredictor)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.8.0 numpy==2.3.5
export nnUNet_raw=$folder nnUNet_preprocessed=$folder nnUNet_results=$folder OMP_NUM_THREADS=1 FOLDER=$folder/arrays
"$venv/bin/python" -W ignore - <<'PYTHON'
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

# air around 20, a head around 600, 16 slices of it
rng, shape = np.random.default_rng(0), (16, 32, 32)
head = np.zeros(shape, bool)
head[:, 6:26, 6:26] = True
image = np.where(head, rng.normal(600, 60, shape), np.abs(rng.normal(20, 8, shape))).astype(np.float32)
scheme = ZScoreNormalization(use_mask_for_norm=False, intensityproperties={}, target_dtype=np.float32)
image = scheme.run(image, None)
air, tissue, mean = (float(np.mean(x)) for x in (image[~head], image[head], image))
print(f"air {air:.2f}, head {tissue:.2f}, whole image {mean + 0:.2f}".replace("-0.00", "0.00"))

folder = Path(os.environ["FOLDER"])
folder.mkdir()
seg = head[None].astype(np.int8)
properties = {"class_locations": {1: np.argwhere(seg == 1)}}
nnUNetDatasetBlosc2.save_case(image[None], seg, properties, str(folder / "case"), (1, *shape), (1, *shape))
patch = (24, 32, 32)
loader = nnUNetDataLoader(
    nnUNetDatasetBlosc2(str(folder)), 1, patch, patch, LabelManager({"background": 0, "head": 1}, None), 0.0, None, None
)
(batch,) = np.asarray(next(loader)["data"])[0]
# slices beyond the volume: those that are constant
beyond = np.concatenate([piece.ravel() for piece in batch if piece.min() == piece.max()])
assert beyond.size == 8 * 32 * 32


class Network(torch.nn.Module):
    """Keeps what prediction shows it."""

    def forward(self, x):
        self.seen = x[0, 0].numpy()
        return x.repeat(1, 2, 1, 1, 1)


predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False)
predictor.network, predictor.allowed_mirroring_axes = Network(), None
predictor.configuration_manager = SimpleNamespace(patch_size=patch)
predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
predictor.predict_sliding_window_return_logits(torch.from_numpy(image[None]))
seen = predictor.network.seen
assert seen.shape == patch
predicted = np.concatenate([piece.ravel() for piece in seen if piece.min() == piece.max()])
assert predicted.size == 8 * 32 * 32
told = f"{beyond.mean():.2f} in training (nnUNetDataLoader), {predicted.mean():.2f} in prediction (nnUNetPredictor)"
print(f"beyond the volume: {told}")
assert not beyond.any() and not predicted.any() and abs(mean) < 1e-3 < 0.5 < min(tissue, -air)
PYTHON
echo "as described"
