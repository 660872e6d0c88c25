"""`hiendmae doctor`."""

import argparse
import json

from nnunetv2_hiendmae.commands.arguments import add_json

HELP = "check nnU-Net's variables, versions, trainer discovery, device and disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from nnunetv2_hiendmae.doctor import examine

    checks = examine()
    if args.json:
        print(json.dumps([vars(c) for c in checks], indent=2))
    else:
        for check in checks:
            print(
                f"[{'ok' if check.ok else '!!'}] {check.name}: {check.found}" + ("" if check.ok else f"; {check.mend}")
            )
    return 0 if all(c.ok for c in checks) else 2
