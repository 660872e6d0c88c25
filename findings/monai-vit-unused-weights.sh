#!/usr/bin/env bash
# MONAI's ViT, and UNETR on it, hold a LayerNorm for cross-attention in every block that nothing uses: its weights never
# get a gradient, and DistributedDataParallel with its defaults stops at the second step.
#
# Versions: MONAI 1.6.1, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: a network that trains on one GPU fails on two, in a line about "parameters that were not used in producing
#   loss", where the user has changed nothing; find_unused_parameters=True is the way round it. It is 2 x 768 x 12 numbers
#   of a ViT-B, which parameter counts and weight decay include.
# Seen:
#   ViT: 24 of 161 tensors without gradient, all of them norm_cross_attn
#   UNETR: 24 of 194 tensors without gradient, all of them norm_cross_attn
#   ViT in DistributedDataParallel: Expected to have finished reduction in the prior iteration before starting a new one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet monai==1.6.1 torch==2.8.0 numpy==2.3.5
"$venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import torch
from monai.networks.nets import UNETR, ViT
from torch.nn.parallel import DistributedDataParallel


def loss(network, image):
    output = network(image)
    return (output[0] if isinstance(output, tuple) else output).square().mean()


image, small = torch.rand(1, 1, 32, 32, 32), {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
vit = ViT(1, (32, 32, 32), (16, 16, 16), **small)
for network in (vit, UNETR(1, 2, (32, 32, 32), **small)):
    loss(network, image).backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    told = f"{len(without)} of {len(list(network.parameters()))} tensors without gradient"
    print(f"{type(network).__name__}: {told}, all of them norm_cross_attn")
    assert len(without) == 24 and all("norm_cross_attn" in name for name in without)

with tempfile.NamedTemporaryFile() as store:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    parallel = DistributedDataParallel(vit)
    try:
        for _ in range(2):
            loss(parallel, image).backward()
        told = ""
    except RuntimeError as e:
        told = str(e)
    torch.distributed.destroy_process_group()
print("ViT in DistributedDataParallel:", told.partition(". ")[0] + ".")
assert told.startswith("Expected to have finished reduction in the prior iteration")
PYTHON
echo "as described"
