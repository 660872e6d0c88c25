#!/usr/bin/env bash
# MONAI's 3D sin-cos positions hold the axes of a volume in the order 1, 0, 2 along their channels, while the tokens go
# through the grid in the order 0, 1, 2.
#
# Versions: MONAI 1.6.1, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: the table is a function of the grid alone, so it is often left out of what is saved or built anew by other
#   code, whose formula goes through the axes as the tokens do. Weights that were trained with the one then see first and
#   second axis exchanged with the other. On cubic grids all shapes fit, and nothing fails but the results.
# Seen, for a grid of 2 x 3 x 4 tokens and 12 channels; each number is the axis that a sixth of the channels depends on:
#   ViT and MaskedAutoEncoderViT: axes of the channels 1 1 0 0 2 2, where 0 0 1 1 2 2 was to be expected
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet monai==1.6.1 torch==2.8.0 numpy==2.3.5
"$venv/bin/python" -W ignore - <<'PYTHON'
import torch
from monai.networks.nets import MaskedAutoEncoderViT, ViT

grid, patch, width = (2, 3, 4), 4, 12
size = {"img_size": tuple(g * patch for g in grid), "patch_size": (patch,) * 3, "hidden_size": width, "num_heads": 2}
vit = ViT(1, pos_embed_type="sincos", mlp_dim=24, num_layers=1, **size)
mae = MaskedAutoEncoderViT(
    1, pos_embed_type="sincos", mlp_dim=24, num_layers=1, decoder_hidden_size=width, decoder_mlp_dim=24,
    decoder_num_layers=1, decoder_num_heads=2, **size
)
tables = [
    module.position_embeddings for network in (vit, mae) for module in network.modules()
    if hasattr(module, "position_embeddings")
]
assert len(tables) == 2
# where in the grid a token lies: the patch embedding's own order, a convolution that is flattened
for axis in range(3):
    shape = [1] * 3
    shape[axis] = grid[axis]
    image = torch.arange(grid[axis]).float().reshape(shape).expand(grid)
    image = image.repeat_interleave(patch, 0).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    embedding = vit.patch_embedding.patch_embeddings(image[None, None])
    embedding = embedding if embedding.ndim == 3 else embedding.flatten(2).transpose(1, 2)
    by_place = embedding[0].reshape(*grid, width).movedim(axis, 0)
    assert torch.allclose(by_place, by_place[:, :1, :1].expand_as(by_place), atol=1e-5), "tokens in another order"
for table in tables:
    table = table.reshape(*grid, 6, width // 6)
    found = []
    for part in table.unbind(3):
        varying = [axis for axis in range(3) if not torch.allclose(part, part.narrow(axis, 0, 1).expand_as(part))]
        found += varying
    print("axes of the channels", *found)
    assert found == [1, 1, 0, 0, 2, 2]
PYTHON
echo "as described"
