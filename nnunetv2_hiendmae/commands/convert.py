"""`hiendmae convert`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.options import add_json

HELP = "turn a checkpoint of other programs into an encoder file, or an encoder file into one for timm or MONAI"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="checkpoint; see what it is with: hiendmae inspect FILE")
    add("-o", dest="output", type=Path, required=True, metavar="OUT", help="file to write, e.g. encoder.safetensors")
    add(
        "--format",
        metavar="NAME",
        help="hiendmae, mim, glmae, mae3d, timm or monai (default: by the names of its tensors; a bare GL-MAE file has "
        "those of mae3d)",
    )
    add("--num-heads", type=int, metavar="H", help="attention heads (default: those of the released sizes)")
    add(
        "--img-size",
        type=int,
        nargs=3,
        metavar=("D", "H", "W"),
        help="crop in voxels, in nnU-Net's order z y x, that its positions belong to (default: a cube)",
    )
    add(
        "--axes",
        choices=["xyz", "dhw"],
        help="order of its arrays; xyz is permuted to nnU-Net's z y x (default: xyz for the authors' files hiendmae, "
        "mim, glmae and mae3d; dhw, kept as it is, for timm, monai and our own)",
    )
    add("--use-teacher", action="store_true", help="take GL-MAE's momentum teacher instead of the student")
    add(
        "--method",
        metavar="NAME",
        help="whose fine-tuning recipe timm and monai weights get (default: mae3d)",
    )
    add("--to", choices=["timm", "monai"], help="write a .safetensors with these names (default: an encoder file)")
    add("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    import json

    from nnunetv2_hiendmae.weights import ConvertOptions, convert_checkpoint

    size = None if args.img_size is None else tuple(args.img_size)
    options = ConvertOptions(args.format, args.num_heads, size, args.axes, args.use_teacher, args.method)
    done = convert_checkpoint(args.file, args.output, options, to=args.to, force=args.force)
    about = json.loads(done.metadata.to_json())
    if args.json:
        told = {"output": str(done.path), "format": done.format, "metadata": about, "report": done.report.to_dict()}
        print(json.dumps(told, indent=2))
        return
    spec = ", ".join(f"{k}={v}" for k, v in about["spec"].items())
    lines = [f"format: {done.format}", f"encoder: {spec}", f"licence: {done.metadata.licence}"]
    lines += [f"note: {note}" for note in done.metadata.notes]
    lines += [f"tensors: {done.report.text()}", f"written: {done.path}"]
    if args.to is None:
        lines.append(f"next: hiendmae plan -d LABELLED_DATASET -w {done.path}")
    print("\n".join(lines))
