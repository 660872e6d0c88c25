#!/usr/bin/env bash
# dynamic-network-architectures 0.4.3 changed the order in which its Primus lays tokens out, from (h w d) to (w h d). The
# names and shapes of all weights stayed the same: a checkpoint of one version loads strictly into the other, without a
# word, and gives other features.
#
# Versions: dynamic-network-architectures 0.4.2 and 0.4.3, timm 1.0.16, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: learned positions and rotary angles belong to places in the sequence. Weights that were trained with the
#   one order, which programs with a copy of the older class still have, see their first and second axis exchanged.
# Seen, for the same weights and image on a grid of 4 x 4 x 4 tokens (random weights, positions as large as tokens):
#   strict load: <All keys matched successfully>
#   difference of the logits, relative norm: 0.53 (0 was to be expected)
#   after exchanging the positions' rows and a third of the channels of queries and keys with another: below 0.0001
set -euo pipefail
venv=${FINDINGS_VENV:-$(mktemp -d)/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet dynamic-network-architectures==0.4.2 timm==1.0.16 torch==2.8.0 numpy==2.3.5
work=$(mktemp -d)
cat > "$work/run.py" <<'PYTHON'
import sys

import torch
from dynamic_network_architectures.architectures.primus import Primus

GRID, WIDTH, HEADS = 4, 36, 3


def network():
    torch.manual_seed(0)
    built = Primus(1, WIDTH, (8, 8, 8), 2, eva_depth=3, eva_numheads=HEADS, input_shape=(8 * GRID,) * 3).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in built.named_parameters():
        # norms and biases stay
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "pos_embed" in name else 0.3, generator=generator)
    return built


def reordered(state):
    """Exact where the first two sides of the grid are the same."""
    state = dict(state)
    rows = state["eva.pos_embed"].unflatten(1, (GRID, GRID, GRID))
    state["eva.pos_embed"] = rows.transpose(1, 2).flatten(1, 3)
    for name, tensor in state.items():
        if "q_proj" in name or name.endswith("k_proj.weight"):
            first, second, third = tensor.unflatten(0, (HEADS, 3, -1)).unbind(1)
            state[name] = torch.stack([second, first, third], 1).flatten(0, 2)
    return state


torch.manual_seed(2)
image = torch.randn(1, 1, *(8 * GRID,) * 3)
with torch.no_grad():
    if sys.argv[1] == "old":
        old = network()
        torch.save((old.state_dict(), old(image)), sys.argv[2])
    else:
        state, before = torch.load(sys.argv[2], weights_only=True)
        new = network()
        print("strict load:", new.load_state_dict(state, strict=True))
        difference = ((new(image) - before).norm() / before.norm()).item()
        new.load_state_dict(reordered(state))
        mended = ((new(image) - before).norm() / before.norm()).item()
        print(f"difference of the logits, relative norm: {difference:.2f}")
        print(f"after exchanging rows and channels: {mended:.1e}")
        assert difference > 0.1 and mended < 1e-4
PYTHON
"$venv/bin/python" -W ignore "$work/run.py" old "$work/old.pt"
"$venv/bin/pip" install --quiet --no-deps dynamic-network-architectures==0.4.3
"$venv/bin/python" -W ignore "$work/run.py" new "$work/old.pt"
echo "as described"
