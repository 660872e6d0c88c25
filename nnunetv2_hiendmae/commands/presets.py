"""`hiendmae presets`."""

import argparse
import json
import math

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "list encoder presets with their parameter counts"

add_arguments = add_json


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.architectures import KINDS, PRESETS

    rows, columns = {}, "{:15} {:>13} {:>9} {:>7} {:>6} {:>6} {:>6} {:>12}"
    lines = [columns.format("preset", "crop", "patch", "tokens", "width", "depth", "heads", "parameters")]
    for name, spec in PRESETS.items():
        # fixed positions among them
        parameters = sum(map(math.prod, KINDS[spec.kind].tensor_shapes(spec).values()))
        rows[name] = {**spec.to_dict(), "parameters": parameters}
        crop, patch = ("x".join(map(str, size)) for size in (spec.img_size, spec.patch_size))
        sizes = (spec.num_tokens, spec.embed_dim, spec.depth, spec.num_heads, f"{parameters:,}")
        lines.append(columns.format(name, crop, patch, *sizes))
    print(json.dumps(rows, indent=2) if args.json else "\n".join(lines))
