"""`hiendmae convert`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_json, add_options, from_arguments
from nnunetv2_hiendmae.errors import printable
from nnunetv2_hiendmae.options.commands import ConvertOptions

HELP = "turn a checkpoint of other programs into an encoder file, or one into a file for others or a folder for the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="checkpoint, or hf://ORG/REPO[/FILE]; see: hiendmae inspect FILE")
    add("-o", dest="output", type=Path, required=True, metavar="OUT", help="file to write, e.g. encoder.safetensors")
    add_options(parser, ConvertOptions)
    told = "write a .safetensors with these names, nnssl: a .pth with its plan, hub-folder: a folder for the Hub"
    add("--to", choices=["timm", "monai", "nnssl", "hub-folder"], help=f"{told} (default: an encoder file)")
    add("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    import json
    from shlex import quote

    from nnunetv2_hiendmae.weights import convert_checkpoint

    options = from_arguments(ConvertOptions, args)
    done = convert_checkpoint(args.file, args.output, options, to=args.to, force=args.force)
    about = json.loads(done.metadata.to_json())
    if args.json:
        told = {"output": str(done.path), "format": done.format, "metadata": about, "report": done.report.to_dict()}
        print(json.dumps({**told, "notes": done.notes}, indent=2))
        return
    spec = ", ".join(f"{k}={v}" for k, v in about["spec"].items())
    lines = [f"format: {done.format}", f"encoder: {spec}", f"licence: {printable(done.metadata.licence)}"]
    lines += [f"note: {printable(note, None)}" for note in done.notes]
    lines += [f"tensors: {done.report.text()}", f"written: {done.path}"]
    if args.to is None:
        lines.append(f"next: hiendmae plan -d LABELLED_DATASET -w {quote(str(done.path))}")
    elif args.to == "hub-folder":
        lines.append(f"next: hf upload ORG/REPO {quote(str(done.path))}")
    print("\n".join(lines))
