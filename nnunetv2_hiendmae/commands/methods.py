"""`hiendmae methods`."""

import argparse
import json
from typing import Any

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "list pretraining methods with their defaults and sources"
PARTS = ("options", "recipe", "volumes")
NOTES = (
    "options are changed with --set key=value; None means derived from the encoder. batch_size counts samples per "
    "optimizer step (crops, unless noted), lr is AdamW's peak, spacing_mm is D H W, window_hu becomes [0, 1]."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    print(list_methods(as_json=args.json))


def list_methods(as_json: bool = False) -> str:
    """Every pretraining method with its options, recipe and source."""
    from nnunetv2_hiendmae.pretraining import METHODS

    methods = {name: _method(name) for name in METHODS}
    if as_json:
        return json.dumps(methods, indent=2)
    return "\n\n".join([*(_text(name, about) for name, about in methods.items()), NOTES])


def _method(name: str) -> dict[str, Any]:
    from nnunetv2_hiendmae.pretraining import METHODS
    from nnunetv2_hiendmae.recipes import RECIPES

    method, recipe = METHODS[name], RECIPES[name]
    volume = recipe.volume
    return {
        "title": method.title,
        "source": method.source,
        "options": method.defaults(),
        "recipe": vars(method.recipe),
        "volumes": {"spacing_mm": volume.spacing_mm, "window_hu": volume.window_hu},
        "notes": method.notes(),
        "citations": list(recipe.citations),
    }


def _text(name: str, about: dict[str, Any]) -> str:
    lines, notes = [f"{name}: {about['title']} ({about['source']})"], about["notes"]
    for part in PARTS:
        pairs = (f"{k}={v}" + (f" ({notes[k]})" if k in notes else "") for k, v in about[part].items())
        lines.append(f"  {part}: {', '.join(pairs)}")
    return "\n".join(lines)
