#!/usr/bin/env bash
# Primus and Eva of dynamic-network-architectures have an option patch_drop_rate for masked autoencoding. With timm 1.0.22,
# which its requirements allow (<1.0.23), no network with that option can be built; with timm 1.0.16 it can.
#
# Versions: dynamic-network-architectures 0.4.4, timm 1.0.22 and 1.0.16, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: a plain installation brings the newer timm. Its PatchDropout lost the argument return_indices, and gives
#   the indices of the kept patches no more where that class used to.
# Seen:
#   timm 1.0.22: TypeError: PatchDropout.__init__() got an unexpected keyword argument 'return_indices'
#   timm 1.0.16: builds and runs
set -euo pipefail
venv=${FINDINGS_VENV:-$(mktemp -d)/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
for timm in 1.0.22 1.0.16; do
  "$venv/bin/pip" install --quiet dynamic-network-architectures==0.4.4 timm==$timm torch==2.8.0 numpy==2.3.5
  "$venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from dynamic_network_architectures.architectures.primus import Primus

try:
    network = Primus(1, 36, (8, 8, 8), 2, 1, 3, input_shape=(32, 32, 32), patch_drop_rate=0.5)
    network(torch.randn(1, 1, 32, 32, 32))
    seen = "builds and runs"
except TypeError as e:
    seen = f"TypeError: {e}"
print(f"timm {version('timm')}: {seen}")
assert ("return_indices" in seen) == (version("timm") == "1.0.22")
PYTHON
done
echo "as described"
