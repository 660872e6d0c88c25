"""Options that several commands share."""

import argparse


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, where a program may read the answer."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """`-d ID [ID …]`."""
    parser.add_argument("-d", dest="datasets", nargs="+", required=True, metavar="ID", help="dataset ids or names")


def add_weight_hints(parser: argparse.ArgumentParser) -> None:
    """What a user may say about a checkpoint of another program."""
    add = parser.add_argument
    add(
        "--format",
        metavar="NAME",
        help="hiendmae, mim, glmae, mae3d, timm or monai (default: by the names of its tensors; a bare GL-MAE file has "
        "those of mae3d, without its decoder those of timm)",
    )
    add("--num-heads", type=int, metavar="H", help="attention heads (default: those of the released sizes)")
    add(
        "--img-size",
        type=int,
        nargs=3,
        metavar=("D", "H", "W"),
        help="crop in voxels, in nnU-Net's order z y x, that its positions belong to (default: read off sin-cos "
        "positions, otherwise a cube)",
    )
    add(
        "--axes",
        choices=["xyz", "dhw"],
        help="order of its arrays; xyz is permuted to nnU-Net's z y x (default: xyz for the authors' files hiendmae, "
        "mim, glmae and mae3d; dhw, kept as it is, for timm and monai)",
    )
    add("--use-teacher", action="store_true", help="take GL-MAE's momentum teacher instead of the student")
    add("--method", metavar="NAME", help="whose fine-tuning recipe timm and monai weights get (default: mae3d)")
