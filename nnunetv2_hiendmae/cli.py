"""The `hiendmae` command: finds the command's file in `commands`, runs it, turns errors into exit codes."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from nnunetv2_hiendmae.errors import Stopped, UserError
from nnunetv2_hiendmae.threads import wait_passively

# in the order of the help: what is there, pretraining and fine-tuning, results
COMMANDS = (
    *("env", "doctor", "methods", "presets", "inspect"),
    *("convert", "preprocess", "pretrain", "plan", "splits"),
    *("compare", "classify", "reconstruct", "attention", "demo"),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 2 the user must change something; a bug keeps its traceback (1)."""
    words = sys.argv[1:] if arguments is None else arguments
    # only the command that is asked for: `hiendmae env` runs in every shell start-up
    parser = build_parser([name for name in COMMANDS if name in words[:1]] or COMMANDS)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("nnunetv2_hiendmae").setLevel(logging.INFO)
    # what libraries tell each other's authors; nothing a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    # before a command imports torch
    wait_passively()
    try:
        return args.run(args) or 0
    except UserError as e:
        if _is_told_elsewhere():
            return 2
        print(f"hiendmae {args.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except Stopped as e:
        if not _is_told_elsewhere():
            print(f"hiendmae {args.command}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"hiendmae {args.command}: interrupted", file=sys.stderr)
        return 130


def _is_told_elsewhere() -> bool:
    """Whether this is one of several processes that all found the same, before they joined or after they parted; the
    first one tells it."""
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    distributed = sys.modules.get("torch.distributed")
    return rank > 0 and not (distributed and distributed.is_initialized())


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Commands with their options."""
    parser = argparse.ArgumentParser(
        prog="hiendmae", description="Masked-autoencoder pretraining of 3D vision transformers for nnU-Net v2."
    )
    told = "show program's version number and exit"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=told)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in names:
        command = import_module(f"nnunetv2_hiendmae.commands.{name}")
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP, formatter_class=_HelpFormatter)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


class _Version(argparse.Action):
    """Prints the version; looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"nnunetv2_hiendmae {version('nnunetv2_hiendmae')}")
        parser.exit()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless it is derived and the help says from what."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
