"""Options that several commands share."""

import argparse


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, where a program may read the answer."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """`-d ID [ID …]`."""
    parser.add_argument("-d", dest="datasets", nargs="+", required=True, metavar="ID", help="dataset ids or names")
