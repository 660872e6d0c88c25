"""`hiendmae pretrain`."""

import argparse
import os
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_datasets
from nnunetv2_hiendmae.environment import nnunet_folder
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS

HELP = "pretrain an encoder on preprocessed images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_datasets(parser)
    add = parser.add_argument
    add(
        "-p",
        dest="plans",
        default=PRETRAIN_PLANS,
        metavar="PLANS",
        help="plans the images were preprocessed with",
    )
    add("-c", dest="configuration", default="3d_fullres", metavar="CONFIG", help="configuration of those plans")
    add("--method", default="hiendmae", metavar="M", help="see: hiendmae methods")
    add("--encoder", metavar="PRESET", help="see: hiendmae presets (default: the method's)")
    add("--crop-size", type=int, nargs=3, metavar=("D", "H", "W"), help="crop in voxels (default: the preset's)")
    add("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="ViT patch in voxels (default: the preset's)")
    add("--epochs", type=int, metavar="N", help="epochs (default: the method's)")
    add("--steps-per-epoch", type=int, metavar="N", help="optimizer steps per epoch (default: the method's)")
    add("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up (default: the method's, 10%% at most)")
    add(
        "--batch-size",
        type=int,
        metavar="B",
        help="crops (MiM, GL-MAE: volumes) per optimizer step over all processes (default: the method's)",
    )
    add(
        "--accumulate",
        type=int,
        metavar="N",
        help="micro-batches per optimizer step; less memory, same result (default: the method's)",
    )
    add("--lr", type=float, metavar="LR", help="peak learning rate (default: the method's, whatever the batch size)")
    add("--weight-decay", type=float, metavar="WD", help="AdamW weight decay (default: the method's)")
    add(
        "--set",
        dest="options",
        action="extend",
        nargs="+",
        metavar="KEY=VALUE",
        help="options of the method, several at once or one by one; see: hiendmae methods",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="decides initial weights, crops, augmentation and masks (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        # torch warns of more workers than cores
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="loader processes per process; does not change the losses",
    )
    add(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto: bf16 (old GPUs fp16), fp32 on a CPU",
    )
    add("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="device")
    add("--checkpoint-every", type=int, default=10, metavar="N", help="epochs between checkpoints")
    add("--pictures-every", type=int, default=10, metavar="N", help="epochs between reconstruction pictures")
    add("--name", metavar="RUN", help="name of the run (default: METHOD_PRESET_DATASETS)")
    add("-o", dest="output", type=Path, metavar="DIR", help="run folder (default: $nnUNet_results/pretraining/RUN)")
    add("--c", dest="resume", action="store_true", help="continue from the last checkpoint")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.pretraining.launch import Execution
    from nnunetv2_hiendmae.pretraining.loop import pretrain
    from nnunetv2_hiendmae.pretraining.request import build_settings, run_name

    settings, data = build_settings(args)
    execution = Execution(args.device, args.workers)
    root = args.output or nnunet_folder("nnUNet_results") / "pretraining" / (
        args.name or run_name(settings, args.encoder)
    )
    encoder = pretrain(settings, data, root, execution, args.resume)
    if encoder:
        print(f"encoder: {encoder}\nnext: hiendmae plan -d LABELLED_DATASET -w {encoder}")
