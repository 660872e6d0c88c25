"""`hiendmae plan`."""

import argparse
from pathlib import Path

HELP = "write nnU-Net plans that fine-tune an encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="labelled dataset to fine-tune on")
    add("-w", dest="encoder_file", type=Path, required=True, metavar="FILE", help="encoder file (encoder.safetensors)")
    add("--name", metavar="PLANS", help="name of the plans (default: nnUNetPlans_METHOD)")
    add("--from-scratch", action="store_true", help="same network and data, but no pretrained weights: the baseline")
    add("--epochs", type=int, metavar="N", help="epochs (default: the method's recipe)")
    add("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up (default: 10%% of the epochs)")
    add("--iterations-per-epoch", type=int, metavar="N", help="training batches per epoch (default: nnU-Net's 250)")
    add(
        "--val-iterations-per-epoch", type=int, metavar="N", help="validation batches per epoch (default: nnU-Net's 50)"
    )
    add("--lr", type=float, help="peak learning rate (default: the method's recipe)")
    add("--weight-decay", type=float, help="AdamW weight decay (default: the method's recipe)")
    add("--batch-size", type=int, metavar="B", help="crops per batch (default: the method's recipe)")
    add("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="crop in voxels (default: that of the file)")
    add(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("D", "H", "W"),
        help="target spacing in mm (default: that of the file)",
    )
    add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="CT window in HU (default: that of the file)")
    add(
        "--reader",
        metavar="NAME",
        help="nnU-Net image reader, it decides the orientation; auto: nnU-Net's choice (default: that of the file)",
    )
    add("--freeze-encoder", action="store_true", help='train the decoder alone ("linear" in the papers)')
    add("--layer-decay", type=float, metavar="F", help="factor of the learning rate per encoder layer (default: 1)")
    add("--drop-path", type=float, metavar="RATE", help="stochastic depth of the encoder (default: recipe)")
    add("--grad-clip", type=float, metavar="NORM", help="largest gradient norm, at most nnU-Net's 12 (default: recipe)")
    add("--decoder-width", type=int, metavar="W", help="channels of the decoder at full resolution (default: recipe)")
    add("-np", dest="processes", type=int, default=4, metavar="N", help="processes of the fingerprint extraction")


def run(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.planning.finetune import plan_finetuning

    planned = plan_finetuning(
        args.dataset,
        args.encoder_file,
        plans_name=args.name,
        from_scratch=args.from_scratch,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        lr=args.lr,
        weight_decay=args.weight_decay,
        batch_size=args.batch_size,
        patch_size=args.patch_size,
        spacing_mm=args.spacing,
        window_hu=args.window,
        iterations_per_epoch=args.iterations_per_epoch,
        val_iterations_per_epoch=args.val_iterations_per_epoch,
        decoder_width=args.decoder_width,
        reader=args.reader,
        freeze_encoder=args.freeze_encoder,
        layer_decay=args.layer_decay,
        drop_path_rate=args.drop_path,
        grad_clip=args.grad_clip,
        num_processes=args.processes,
    )
    print("\n".join([f"plans: {planned.path}", *planned.messages, "next:"]))
    print("\n".join(f"  {line}" for line in ('eval "$(hiendmae env)"', *planned.next_commands)))
