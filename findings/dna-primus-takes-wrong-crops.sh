#!/usr/bin/env bash
# A Primus of dynamic-network-architectures is built for one crop. Another crop is refused by accident, where the number of
# tokens differs; with as many tokens in another shape it runs, and every token gets the position of another place.
#
# Versions: dynamic-network-architectures 0.4.4, timm 1.0.22, torch 2.8.0, numpy 2.3.5 (Python 3.11, Linux, CPU)
# Why it matters: a network that was planned for crops of 32 x 24 x 16 takes crops of 16 x 24 x 32, which a change of axes
#   makes of them, without a word, and its learned and its rotary positions are wrong.
# Seen, for a network built for (32, 24, 16) with patches of 8:
#   crop (16, 16, 16): RuntimeError: The size of tensor a (8) must match the size of tensor b (24) at non-singleton dimension 1
#   crop (16, 24, 32): runs; an error was to be expected
#   difference from a network with the same weights that was built for it (positions resized), relative norm: 0.51
set -euo pipefail
venv=${FINDINGS_VENV:-$(mktemp -d)/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet dynamic-network-architectures==0.4.4 timm==1.0.22 torch==2.8.0 numpy==2.3.5
"$venv/bin/python" -W ignore - <<'PYTHON'
import torch
from dynamic_network_architectures.architectures.primus import Primus


def network(crop):
    return Primus(1, 36, (8, 8, 8), 2, eva_depth=2, eva_numheads=3, input_shape=crop).eval()


torch.manual_seed(0)
built = network((32, 24, 16))
for name, parameter in built.named_parameters():
    # norms and biases stay
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=1.0 if "pos_embed" in name else 0.3)
state = built.state_dict()
with torch.no_grad():
    try:
        built(torch.randn(1, 1, 16, 16, 16))
        raise AssertionError("a crop with fewer tokens runs")
    except RuntimeError as e:
        print("crop (16, 16, 16): RuntimeError:", e)
    image = torch.randn(1, 1, 16, 24, 32)
    silent = built(image)
    print("crop (16, 24, 32): runs")
    right = network((16, 24, 32))
    rows = state["eva.pos_embed"].unflatten(1, (4, 3, 2)).permute(0, 4, 1, 2, 3)
    rows = torch.nn.functional.interpolate(rows, size=(2, 3, 4), mode="trilinear", align_corners=False)
    right.load_state_dict({**state, "eva.pos_embed": rows.permute(0, 2, 3, 4, 1).flatten(1, 3)})
    difference = ((silent - right(image)).norm() / right(image).norm()).item()
print(f"difference from a network that was built for it, relative norm: {difference:.2f}")
assert difference > 0.1
PYTHON
echo "as described"
