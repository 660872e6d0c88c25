"""`hiendmae methods`."""

import argparse
import json
from typing import Any

from nnunetv2_hiendmae.commands.arguments import add_json
from nnunetv2_hiendmae.recipes import RECIPES

HELP = "list pretraining methods with their defaults and sources"
PARTS = ("options", "recipe", "volumes")
NOTES = (
    "options are changed with --set key=value; None means derived from the encoder. batch_size counts samples per "
    "optimizer step (crops, unless noted), lr is AdamW's peak, spacing_mm is D H W, window_hu becomes [0, 1]."
)

add_arguments = add_json


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.pretraining.declared import DECLARED

    methods = {}
    for name, method in DECLARED.items():
        volume = RECIPES[name].volume
        methods[name] = {
            "title": method.title,
            "source": method.source,
            "options": method.defaults(),
            "recipe": vars(method.recipe),
            "volumes": {"spacing_mm": volume.spacing_mm, "window_hu": volume.window_hu},
            "notes": method.notes(),
            "citations": list(RECIPES[name].citations),
        }
    told = [*(_text(name, about) for name, about in methods.items()), NOTES]
    print(json.dumps(methods, indent=2) if args.json else "\n\n".join(told))


def _text(name: str, about: dict[str, Any]) -> str:
    lines, notes = [f"{name}: {about['title']} ({about['source']})"], about["notes"]
    for part in PARTS:
        pairs = (f"{k}={v}" + (f" ({notes[k]})" if k in notes else "") for k, v in about[part].items())
        lines.append(f"  {part}: {', '.join(pairs)}")
    return "\n".join(lines)
