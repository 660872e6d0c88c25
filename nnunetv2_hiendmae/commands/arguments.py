"""Settings classes as arguments of the command line, and the options that several commands have."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_args, get_origin

from nnunetv2_hiendmae.options import Option, declared, flag, kinds_of

Settings = TypeVar("Settings")
# what `-w` takes
ENCODER_FILE = "encoder file, or hf://ORG/REPO[/FILE]"


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds an argument for every option of a settings class, in the order of its declarations."""
    for name, (declaration, about) in declared(cls).items():
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
    # long lists have a metavar: what is not in them is told in one line, by the settings class
    return {**common, "type": kind, "choices": None if about.metavar else about.choices or None}


def from_arguments(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; lists become tuples.

    Raises:
        UserError: a value is out of range.
    """
    given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def keywords(args: argparse.Namespace, *leave_out: str) -> dict[str, Any]:
    """What a command line asks for, as arguments of a function that calls them by the same names."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run", *leave_out)}


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, where a program may read the answer."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`-device`, of commands whose options are no settings class."""
    from nnunetv2_hiendmae.options.commands import DEVICES

    parser.add_argument("-device", default=DEVICES[0], choices=DEVICES, help="device")


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """`-d ID [ID …]`."""
    parser.add_argument("-d", dest="datasets", nargs="+", required=True, metavar="ID", help="dataset ids or names")
