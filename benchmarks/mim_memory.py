"""Time and peak memory of one MiM step, forward and backward, per view of the encoder's crop.

Ours gives its loss in parts and goes backward after each. The peer runs the same encoder and decoder over the same
views, as many at a time, and lets autograd hold everything until one backward at the end; losses and gradients are the
same (a test says so). Each measurement is a process of its own, ours and the peer take turns. Memory is what the
process needs at its peak on top of the imported libraries: weights, gradients, the batch and activations; on a GPU what
PyTorch allocated. Prints a markdown table: medians, and in brackets the smallest and largest value.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import torch
from machine import CLOCKS, cpu_model

from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.pretraining import MiM

GB = 1e9
SIDES = ("parts", "held")


class NoiseVolume:
    spacing_mm = (1.0, 1.0, 1.0)

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def read(self, lower, size):
        return np.random.default_rng(0).random((1, *size), dtype=np.float32)

    def is_foreground(self, voxel):
        return True


def host_peak() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side in this process: seconds and bytes of a step."""
    cuda, clock, before = args.device == "cuda", CLOCKS[args.clock], host_peak()
    torch.manual_seed(0)
    spec = PRESETS[args.encoder].with_(img_size=(args.crop,) * 3)
    crops2, crops3 = args.crops
    method = MiM(spec, crops_level2=crops2, crops_level3=crops3, views_per_part=args.views_per_part).to(args.device)
    views = method.views()
    sample = views.draw(NoiseVolume(views.padded_below), np.random.default_rng(0))
    batch = {k: torch.stack([v] * args.volumes).to(args.device) for k, v in sample.items()}
    autocast = torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()

    def step() -> float:
        start = clock()
        held = []
        for part in range(method.num_parts):
            with autocast:
                loss = method(batch, part)["loss"]
            if args.side == "parts":
                loss.backward()
            else:
                held.append(loss)
        if held:
            sum(held).backward()
        if cuda:
            torch.cuda.synchronize()
        seconds = clock() - start
        method.zero_grad()
        return seconds

    seconds = [step() for _ in range(1 + args.steps)][1:]
    memory = torch.cuda.max_memory_allocated() if cuda else host_peak() - before
    weights = sum(p.numel() * p.element_size() for p in method.parameters())
    return {"seconds": statistics.median(seconds), "bytes": memory, "weights": weights}


def in_a_process(side: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--side", side]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def spread(values: list[float], digits: int) -> str:
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="convvit_base", choices=list(PRESETS))
    parser.add_argument("--crop", type=int, default=96, help="edge of the encoder's crop in voxels")
    parser.add_argument(
        "--crops", type=int, nargs=2, default=(4, 4), help="crops_level2 crops_level3; 4 4 are 21 views"
    )
    parser.add_argument("--volumes", type=int, default=1, help="volumes in the batch")
    parser.add_argument("--views-per-part", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a machine busy with other work")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process, after one to warm up")
    parser.add_argument("--repeats", type=int, default=5, help="processes per side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    runs = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        # a machine that slows down or speeds up must not favour one side
        for side in SIDES if repeat % 2 else reversed(SIDES):
            runs[side].append(in_a_process(side))
    views = args.volumes * (1 + args.crops[0] * (1 + args.crops[1]))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_model()}, {os.cpu_count()} cores"
    print(
        f"{device}; torch {torch.__version__}, {args.precision}, {torch.get_num_threads()} threads, {args.clock} clock"
    )
    print(f"{args.encoder}, crop {args.crop}³, {views} views, {args.views_per_part} of a volume per part; ", end="")
    print(f"weights {runs['parts'][0]['weights'] / GB:.2f} GB, gradients the same\n")
    print("| | s / view | peak, GB | peak without weights and gradients, MB / view |\n|---|---|---|---|")
    columns = {
        "seconds": lambda run: run["seconds"] / views,
        "peak": lambda run: run["bytes"] / GB,
        "activations": lambda run: (run["bytes"] - 2 * run["weights"]) / views / 1e6,
    }
    table = {side: {name: [of(run) for run in runs[side]] for name, of in columns.items()} for side in SIDES}
    table["ratio"] = {
        name: [a / b for a, b in zip(table["parts"][name], table["held"][name], strict=True)] for name in columns
    }
    for side, row in table.items():
        digits = (2, 2, 2) if side == "ratio" else (3, 2, 0)
        cells = [spread(values, d) for values, d in zip(row.values(), digits, strict=True)]
        print(f"| {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
