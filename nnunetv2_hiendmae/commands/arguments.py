"""Settings classes as arguments of the command line, and the options that several commands have."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_args, get_origin

from nnunetv2_hiendmae.options import Option, declared, flag, kinds_of

Settings = TypeVar("Settings")


def add_options(parser: argparse.ArgumentParser, cls: type, leave_out: Sequence[str] = ()) -> None:
    """Adds an argument for every option of a settings class, in the order of its declarations."""
    for name, (declaration, about) in declared(cls).items():
        if name not in leave_out:
            parser.add_argument(flag(name, about), **_argument(name, declaration, about, kinds_of(cls, name)))


def _argument(name: str, declaration: Field, about: Option, kinds: Sequence[type]) -> dict[str, Any]:
    default = None if declaration.default is MISSING else declaration.default
    told = f"{about.help} (default: {about.default_is})" if about.default_is else about.help
    common = {"dest": name, "default": default, "help": told.replace("%", "%%")}
    kind = kinds[0]
    if kind is bool:
        return {**common, "action": argparse.BooleanOptionalAction if default else "store_true"}
    common |= {"required": declaration.default is MISSING, "metavar": about.metavar}
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        if rest != [...]:
            return {**common, "type": inner, "nargs": 1 + len(rest)}
        # several at once or one by one; what is given replaces a default
        return {**common, "type": inner, "nargs": "+", "action": "store" if default else "extend"}
    return {**common, "type": kind, "choices": about.choices or None}


def from_arguments(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; lists become tuples.

    Raises:
        UserError: a value is out of range.
    """
    given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


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
