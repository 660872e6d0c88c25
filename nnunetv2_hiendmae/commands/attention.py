"""`hiendmae attention`."""

import argparse
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import ENCODER_FILE, keywords
from nnunetv2_hiendmae.errors import UserError

HELP = "where in an image the token of one voxel looks: attention of an encoder's or decoder's layers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, nargs="?", metavar="RUN", help="folder of a run of hiendmae pretrain, instead of -w")
    add("-w", dest="encoder_file", type=Path, metavar="FILE", help=ENCODER_FILE)
    images = "raw image, one file per channel, in order"
    add("--image", type=Path, nargs="+", required=True, metavar="FILE", help=images)
    where = parser.add_mutually_exclusive_group(required=True).add_argument
    where("--voxel", type=int, nargs=3, metavar=("D", "H", "W"), help="the asking voxel, index in the file's array")
    world = "the same in mm, NIfTI's world (RAS)"
    where("--point", dest="point_mm", type=float, nargs=3, metavar=("X", "Y", "Z"), help=world)
    add("--cls", action="store_true", help="the CLS token asks; the voxel only decides where the crop lies")
    add("--cross", action="store_true", help="the cross-attention of a Hi-End-MAE run's decoder, of a masked patch")
    add("--layers", type=int, nargs="+", metavar="L", help="layers from 0 (default: the last; with --cross: all)")
    add("--heads", type=_head, nargs="+", default=["mean"], metavar="H", help="heads from 0, or mean")
    add("--seed", type=int, default=0, help="decides which other patches are masked (--cross)")
    add("-o", dest="output", type=Path, required=True, metavar="DIR", help="where the PNG and NIfTI files go")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.inspection.attention import attention_pictures

    if (args.encoder_file is None) == (args.run_dir is None):
        raise UserError("give either an encoder file (-w encoder.safetensors) or the folder of a run, not both or none")
    chosen = keywords(args, "encoder_file", "run_dir")
    print(*attention_pictures(source=args.encoder_file or args.run_dir, **chosen), sep="\n")


def _head(text: str) -> int | str:
    return int(text) if text.isdigit() else text
