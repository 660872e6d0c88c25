#!/usr/bin/env bash
# torch.load does not look at the checksums that torch.save writes: a checkpoint of which one bit has changed on its way
# loads without a word, also with weights_only=True and as nnU-Net loads it, and the network has another weight.
#
# Versions: torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: checkpoints of this field are copied between clusters and kept for years, and a flipped exponent bit
#   makes 0.1 to 3.4e37, or, as here, to 5e-21: no error, no NaN, a worse segmentation. The archive knows: `unzip -t` and
#   Python's zipfile say which record is not what was written.
# Seen:
#   written 0.1, loaded 5.4e-21 (weights_only=False) and 5.4e-21 (weights_only=True) and 5.4e-21 (mmap=True)
#   zipfile says: checkpoint/data/0 is damaged
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.8.0 numpy==2.3.5
cd "$folder"
"$venv/bin/python" -W ignore - <<'PYTHON'
import zipfile
from pathlib import Path

import torch

# as nnU-Net's checkpoint_final.pth
weight = torch.full((4, 4), 0.1)
torch.save({"network_weights": {"weight": weight}, "current_epoch": 1000, "trainer_name": "T"}, "checkpoint.pth")
content = bytearray(Path("checkpoint.pth").read_bytes())
assert zipfile.ZipFile("checkpoint.pth").testzip() is None
place = content.index(weight.numpy().tobytes())
# little-endian: the last byte of a float32 holds its sign and most of its exponent
content[place + 3] ^= 1 << 5
Path("checkpoint.pth").write_bytes(content)

options = ({"weights_only": False}, {"weights_only": True}, {"mmap": True})
loaded = [torch.load("checkpoint.pth", map_location="cpu", **o)["network_weights"]["weight"] for o in options]
told = (f"{tensor[0, 0]:.2g} ({key}={value})" for tensor, o in zip(loaded, options) for key, value in o.items())
print("written 0.1, loaded", " and ".join(told))
damaged = zipfile.ZipFile("checkpoint.pth").testzip()
print(f"zipfile says: {damaged} is damaged")
assert damaged == "checkpoint/data/0"
for tensor in loaded:
    assert tensor[0, 0] != weight[0, 0] and torch.equal(tensor.flatten()[1:], weight.flatten()[1:])
PYTHON
echo "as described"
