"""`hiendmae presets`."""

import argparse
import json
import math
from typing import TYPE_CHECKING

from nnunetv2_hiendmae.commands.arguments import add_json

if TYPE_CHECKING:
    from nnunetv2_hiendmae.architectures import EncoderSpec

HELP = "list encoder presets with their parameter counts"

add_arguments = add_json


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.architectures import PRESETS

    rows, columns = {}, "{:15} {:>13} {:>9} {:>7} {:>6} {:>6} {:>6} {:>12}"
    lines = [columns.format("preset", "crop", "patch", "tokens", "width", "depth", "heads", "parameters")]
    for name, spec in PRESETS.items():
        parameters = _parameters(spec)
        rows[name] = {**spec.to_dict(), "parameters": parameters}
        crop, patch = ("x".join(map(str, size)) for size in (spec.img_size, spec.patch_size))
        sizes = (spec.num_tokens, spec.embed_dim, spec.depth, spec.num_heads, f"{parameters:,}")
        lines.append(columns.format(name, crop, patch, *sizes))
    print(json.dumps(rows, indent=2) if args.json else "\n".join(lines))


def _parameters(spec: "EncoderSpec") -> int:
    """Numbers of a spec's encoder, fixed positions among them."""
    from nnunetv2_hiendmae.architectures.kinds import tensor_shapes

    if shapes := tensor_shapes(spec):
        return sum(map(math.prod, shapes.values()))
    import torch

    from nnunetv2_hiendmae.architectures import build_encoder

    with torch.device("meta"):
        return sum(p.numel() for p in build_encoder(spec).parameters())
