"""`hiendmae presets`."""

import argparse
import json

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "list encoder presets with their parameter counts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    print(list_presets(as_json=args.json))


def list_presets(as_json: bool = False) -> str:
    """Every encoder preset with its size."""
    import torch

    from nnunetv2_hiendmae.architectures import PRESETS, build_encoder

    rows = {}
    for name, spec in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_encoder(spec).parameters())
        rows[name] = {**spec.to_dict(), "parameters": parameters}
    if as_json:
        return json.dumps(rows, indent=2)
    sizes = f"{'width':>6} {'depth':>6} {'heads':>6} {'parameters':>12}"
    lines = [f"{'preset':15} {'crop':>13} {'patch':>9} {'tokens':>7} {sizes}"]
    for name, row in rows.items():
        crop, patch = ("x".join(map(str, row[k])) for k in ("img_size", "patch_size"))
        sizes = f"{row['embed_dim']:>6} {row['depth']:>6} {row['num_heads']:>6} {row['parameters']:>12,}"
        lines.append(f"{name:15} {crop:>13} {patch:>9} {PRESETS[name].num_tokens:>7} {sizes}")
    return "\n".join(lines)
