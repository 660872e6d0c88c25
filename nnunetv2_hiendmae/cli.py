"""The `hiendmae` command. Commands import torch and nnU-Net themselves: `hiendmae env` runs in every shell."""

import argparse
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, enable_discovery, nnunet_folder, with_discovery
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.plans_section import PRETRAIN_PLANS


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 2 the user must change something; a bug keeps its traceback (1)."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("nnunetv2_hiendmae").setLevel(logging.INFO)
    # raised by libraries we import, on torch's account; nothing a user can act on
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
    try:
        return args.run(args) or 0
    except UserError as e:
        print(f"hiendmae {args.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hiendmae {args.command}: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="hiendmae", description="Masked-autoencoder pretraining of 3D vision transformers for nnU-Net v2."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    command("env", _env, 'print the line that lets nnU-Net find our trainers; use: eval "$(hiendmae env)"')
    telling = (
        command("doctor", _doctor, "check nnU-Net's variables, versions, trainer discovery, device and disk"),
        command("methods", _methods, "list pretraining methods with their defaults and sources"),
        command("presets", _presets, "list encoder presets with their parameter counts"),
        command("inspect", _inspect, "say what an encoder file, a run checkpoint or a run folder is"),
    )
    for sub in telling:
        sub.add_argument("--json", action="store_true", help="print JSON")
    telling[-1].add_argument("file", type=Path, metavar="FILE")
    _add_preprocess(
        command("preprocess", _preprocess, "fingerprint, plan and preprocess images; labels are not needed")
    )
    _add_pretrain(command("pretrain", _pretrain, "pretrain an encoder on preprocessed images"))
    _add_plan(command("plan", _plan, "write nnU-Net plans that fine-tune an encoder"))
    _add_demo(command("demo", _demo, "the whole road on the embedded CT data: pretrain, fine-tune, predict, Dice"))
    return parser


def _datasets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="datasets", nargs="+", required=True, metavar="ID", help="dataset ids or names")


def _add_preprocess(parser: argparse.ArgumentParser) -> None:
    _datasets(parser)
    parser.add_argument("-p", dest="plans", default=PRETRAIN_PLANS, metavar="PLANS", help="name of the plans")
    parser.add_argument("--like", metavar="METHOD|FILE", help="method or encoder file whose spacing and window to use")
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="target spacing in mm")
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("LO", "HI"), help="CT window in HU that becomes [0, 1]"
    )
    parser.add_argument("-np", dest="processes", type=int, default=4, metavar="N", help="processes")


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    _datasets(parser)
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
    add("--encoder", default="vit_base_p16", metavar="PRESET", help="see: hiendmae presets")
    add("--crop-size", type=int, nargs=3, metavar=("D", "H", "W"), help="crop in voxels (default: the preset's)")
    add("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="ViT patch in voxels (default: the preset's)")
    add("--epochs", type=int, metavar="N", help="epochs (default: the method's)")
    add("--steps-per-epoch", type=int, metavar="N", help="optimizer steps per epoch (default: the method's)")
    add("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up (default: the method's, 10%% at most)")
    add(
        "--batch-size",
        type=int,
        metavar="B",
        help="crops per optimizer step over all processes (default: the method's)",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches per optimizer step; less memory, same result",
    )
    add("--lr", type=float, help="peak learning rate (default: the method's)")
    add("--weight-decay", type=float, help="AdamW weight decay (default: the method's)")
    add("--set", dest="options", nargs="+", default=[], metavar="KEY=VALUE", help="options of the method")
    add("--seed", type=int, default=0, help="decides initial weights, crops, augmentation and masks")
    add("--workers", type=int, default=4, metavar="N", help="loader processes per process; does not change the losses")
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


def _add_plan(parser: argparse.ArgumentParser) -> None:
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
    add("--decoder-width", type=int, metavar="W", help="channels of the decoder at full resolution (default: recipe)")
    add("-np", dest="processes", type=int, default=4, metavar="N", help="processes of the fingerprint extraction")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", dest="output", type=Path, default=Path("demo_output"), metavar="DIR", help="new folder for everything")
    add("--data", type=Path, metavar="DIR", help="folder with two nnU-Net datasets, one of them with labels")
    add("--method", default="hiendmae", metavar="M", help="see: hiendmae methods")
    add("--pretrain-epochs", type=int, metavar="N", help="pretraining epochs")
    add("--steps-per-epoch", type=int, metavar="N", help="pretraining steps per epoch")
    add("--epochs", type=int, metavar="N", help="fine-tuning epochs")
    add("--iterations-per-epoch", type=int, metavar="N", help="fine-tuning batches per epoch")
    add("--seed", type=int, default=0)
    add("-np", dest="processes", type=int, default=2, metavar="N", help="processes")
    add("-device", default="cpu", choices=["cuda", "cpu"], help="device")


def _env(_: argparse.Namespace) -> None:
    value = with_discovery(os.environ.get(EXT_TRAINER_VARIABLE))
    print(f"export {EXT_TRAINER_VARIABLE}={shlex.quote(value)}")


def _doctor(args: argparse.Namespace) -> int:
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


def _methods(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import list_methods

    print(list_methods(as_json=args.json))


def _presets(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import list_presets

    print(list_presets(as_json=args.json))


def _inspect(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.listing import describe_file

    print(describe_file(args.file, as_json=args.json))


def _preprocess(args: argparse.Namespace) -> int:
    from nnunetv2_hiendmae.pretraining.preprocess import preprocess_datasets

    summary = preprocess_datasets(
        args.datasets,
        plans_name=args.plans,
        like=args.like,
        spacing_mm=args.spacing,
        window_hu=args.window,
        num_processes=args.processes,
    )
    print(
        f"{summary.done} cases preprocessed, {summary.skipped} were finished before, {len(summary.broken)} are broken"
    )
    for dataset, case, reason in summary.broken:
        print(f"broken: {dataset}/{case}: {reason}", file=sys.stderr)
    if summary.broken:
        return 2
    print(f"next: hiendmae pretrain -d {' '.join(args.datasets)} -p {args.plans}")
    return 0


def _pretrain(args: argparse.Namespace) -> None:
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


def _plan(args: argparse.Namespace) -> None:
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
        num_processes=args.processes,
    )
    print("\n".join([f"plans: {planned.path}", *planned.messages, "next:"]))
    print("\n".join(f"  {line}" for line in ('eval "$(hiendmae env)"', *planned.next_commands)))


def _demo(args: argparse.Namespace) -> None:
    from nnunetv2_hiendmae.demo.run import run_demo

    enable_discovery()
    budget = {
        "pretrain_epochs": args.pretrain_epochs,
        "steps_per_epoch": args.steps_per_epoch,
        "finetune_epochs": args.epochs,
        "iterations_per_epoch": args.iterations_per_epoch,
    }
    run_demo(
        args.output,
        data=args.data,
        method=args.method,
        seed=args.seed,
        num_processes=args.processes,
        device=args.device,
        **{k: v for k, v in budget.items() if v is not None},
    )


if __name__ == "__main__":
    sys.exit(main())
