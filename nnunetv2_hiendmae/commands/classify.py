"""`hiendmae classify train` and `hiendmae classify predict`."""

import argparse
import os
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_datasets
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS

HELP = "classify preprocessed volumes with a pretrained encoder"
TRAIN_HELP = "train a classifier on labelled cases"
PREDICT_HELP = "write probabilities of preprocessed cases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, about, add_options in (
        ("train", TRAIN_HELP, _add_train),
        ("predict", PREDICT_HELP, _add_predict),
    ):
        sub = actions.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_datasets(sub)
        add_options(sub)
        sub.add_argument(
            "--precision",
            default="auto",
            choices=["auto", "fp32", "bf16", "fp16"],
            help="auto: bf16 (old GPUs fp16), fp32 on a CPU",
        )
        sub.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="device")
        sub.add_argument(
            "--workers",
            type=int,
            # torch warns before every epoch of more workers than cores
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="loader processes; do not change results",
        )


def run(args: argparse.Namespace) -> None:
    {"train": _train, "predict": _predict}[args.action](args)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--labels", type=Path, required=True, metavar="CSV", help="columns case,label and, if wanted, fold or split")
    add("-w", dest="encoder_file", type=Path, required=True, metavar="FILE", help="encoder file (encoder.safetensors)")
    add("-p", dest="plans", default=PRETRAIN_PLANS, metavar="PLANS", help="plans the images were preprocessed with")
    add("-c", dest="configuration", default="3d_fullres", metavar="CONFIG", help="configuration of those plans")
    add(
        "-f",
        dest="fold",
        metavar="FOLD",
        help="validation fold, 0 to 4 or one of the column fold (default: 0), or 'all': train on all, validate on none",
    )
    add("--fraction", type=float, default=1.0, metavar="F", help="share of the training cases of every class")
    add("--pool", default="mean", choices=["mean", "cls"], help="what the head reads: mean of patch tokens, or CLS")
    add("--input", default="resize", choices=["resize", "crops"], help="whole volumes resized, or crops of them")
    add("--crops", type=int, default=1, metavar="N", help="crops per case: random in training, a grid in prediction")
    add("--crop-size", type=int, nargs=3, metavar=("D", "H", "W"), help="input in voxels (default: the encoder's)")
    add("--freeze-encoder", action="store_true", help="train the head only (linear probe)")
    add("--from-scratch", action="store_true", help="same network without pretrained weights: the baseline")
    add("--augmentation", action=argparse.BooleanOptionalAction, default=True, help="flips, turns, intensity changes")
    add("--epochs", type=int, default=100, metavar="N", help="passes over the training cases")
    add("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up (default: 10%% of the epochs)")
    add("--batch-size", type=int, default=8, metavar="B", help="cases per optimizer step")
    add("--lr", type=float, help="peak learning rate (default: 1e-4, with --freeze-encoder 1e-3)")
    add("--weight-decay", type=float, default=1e-5, help="AdamW weight decay")
    add("--seed", type=int, default=0, help="decides initial weights, order, crops and augmentation")
    add("--split-seed", type=int, default=0, help="decides folds and fractions")
    add("--validate-every", type=int, default=1, metavar="N", help="epochs between validations")
    add("--checkpoint-every", type=int, default=10, metavar="N", help="epochs between checkpoints")
    add("--name", metavar="RUN", help="name of the run (default: made of the options)")
    add("-o", dest="output", type=Path, metavar="DIR", help="run folder (default: $nnUNet_results/classification/RUN)")
    add("--c", dest="resume", action="store_true", help="continue from the last checkpoint")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help="run folder of classify train")
    add("-p", dest="plans", metavar="PLANS", help="plans of the images (default: those of the run)")
    add("-c", dest="configuration", metavar="CONFIG", help="configuration of those plans (default: that of the run)")
    add("--model", choices=["best", "last"], help="which weights (default: best where there is one)")
    add("--labels", type=Path, metavar="CSV", help="columns case,label; for metrics only")
    add("-o", dest="output", type=Path, metavar="CSV", help="default: predictions_DATASETS.csv in the run folder")


def _train(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.classification.request import build_task, run_name
    from nnunetv2_hiendmae.classification.train import train
    from nnunetv2_hiendmae.environment import nnunet_folder
    from nnunetv2_hiendmae.pretraining.launch import Execution

    execution = Execution(args.device, args.workers)
    task = build_task(args)
    run_dir = args.output or nnunet_folder("nnUNet_results") / "classification" / (
        args.name or run_name(args, task.settings)
    )
    metrics = train(task, run_dir, execution, args.resume)
    print(f"metrics: {metrics}\nnext: hiendmae classify predict -d DATASET -m {run_dir}")


def _predict(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.classification.predict import predict
    from nnunetv2_hiendmae.pretraining.launch import Execution

    table = predict(
        args.run_dir,
        args.datasets,
        Execution(args.device, args.workers),
        plans_name=args.plans,
        configuration=args.configuration,
        model=args.model,
        labels_file=args.labels,
        output=args.output,
        precision=args.precision,
    )
    print(f"predictions: {table}")
