#!/usr/bin/env bash
# Fabric's mixed precision rounds every floating-point tensor of a batch to 16 bits before the forward pass, targets that
# the module compares with included. torch.autocast alone leaves them in float32.
#
# Versions: lightning-fabric 2.6.6, torch 2.14.1 (Python 3.11, Linux, CPU)
# Why it matters: a masked autoencoder's input is its target. bfloat16 has 8 significant bits, so the loss
#   compares with stairs; losses of runs with other precisions, or of a loop with plain autocast, differ for that alone.
#   A precision plugin whose convert_input returns its argument keeps the batch.
# Seen, a module that reconstructs 1001 intensities from 0 to 1 exactly, mean squared error to the float32 image:
#   torch.autocast, bfloat16: float32 arrives, error 0
#   Fabric, bf16-mixed: bfloat16 arrives, 507 different values are left of 1001, error 7.3e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet lightning-fabric==2.6.6 torch==2.14.1
"$venv/bin/python" -W ignore - <<'PYTHON'
import torch
from lightning_fabric import Fabric

image = torch.linspace(0, 1, 1001)[:, None]


class Same(torch.nn.Module):
    """Hands back what it got; the weight is there because Fabric wants one."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x


with torch.autocast("cpu", dtype=torch.bfloat16):
    plain = Same()(image)
arrived = []
network = Same()
network.register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
Fabric(accelerator="cpu", precision="bf16-mixed").setup(network)(image)
found = {"autocast": plain, "Fabric": arrived[0]}
for name, seen in found.items():
    error = (seen.float() - image).square().mean().item()
    print(f"{name}: {seen.dtype}, {len(seen.unique())} values, error {error:.2g}")
assert found["autocast"].dtype == torch.float32 and torch.equal(found["autocast"], image)
assert found["Fabric"].dtype == torch.bfloat16 and len(found["Fabric"].unique()) == 507
PYTHON
