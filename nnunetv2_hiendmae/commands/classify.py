"""`hiendmae classify train` and `hiendmae classify predict`."""

import argparse
from pathlib import Path
from shlex import quote

from nnunetv2_hiendmae.commands.arguments import ENCODER_FILE, add_datasets, add_options, from_arguments
from nnunetv2_hiendmae.environment import device_words
from nnunetv2_hiendmae.options.commands import ClassifyOptions, PredictOptions

HELP = "classify preprocessed volumes with a pretrained encoder"
ACTIONS = {
    "train": ("train a classifier on labelled cases", ClassifyOptions),
    "predict": ("write probabilities of preprocessed cases", PredictOptions),
}
# files that an action cannot do without
NEEDED = {
    "train": [
        ("--labels", "labels_file", "CSV", "columns case,label and, if wanted, fold or split"),
        ("-w", "encoder_file", "FILE", ENCODER_FILE),
    ],
    "predict": [("-m", "run_dir", "RUN_DIR", "run folder of classify train")],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, (about, options) in ACTIONS.items():
        sub = actions.add_parser(action, help=about, description=about, formatter_class=parser.formatter_class)
        add_datasets(sub)
        for flag, dest, metavar, told in NEEDED[action]:
            sub.add_argument(flag, dest=dest, type=Path, required=True, metavar=metavar, help=told)
        add_options(sub, options)


def run(args: argparse.Namespace) -> None:
    options = from_arguments(ACTIONS[args.action][1], args)
    if args.action == "train":
        from nnunetv2_hiendmae.classification.train import train

        metrics = train(args.datasets, args.labels_file, args.encoder_file, options)
        print(f"metrics: {metrics}")
        print(f"next: hiendmae classify predict -d DATASET -m {quote(str(metrics.parent))}{device_words()}")
    else:
        from nnunetv2_hiendmae.classification.predict import predict

        print(f"predictions: {predict(args.datasets, args.run_dir, options)}")
