"""How fast `hiendmae pretrain` trains a small encoder on a CPU that is quiet, and on one whose cores are busy with
other work: this checkout against another commit.

The commands run as a user runs them, on the demo's images. Samples per second are those of the run's own log, without
its first steps. Run it while nothing else works: it makes its own work, a process per core.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import HERE, cpu_model, worktree

DEMO = HERE / "nnunetv2_hiendmae" / "demo" / "data" / "ct"
BATCH, FIRST, STEPS = 8, 10, 160
BUSY = "while True: sum(range(10**6))"


@contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """Other work, a process for each core."""
    working = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in working:
            process.kill()
            process.wait()


def command(tree: Path, root: Path, *arguments: object) -> None:
    """Runs a command of the package in that tree."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    environment = {**plain, **folders, "PYTHONPATH": str(tree)}
    line = [sys.executable, "-W", "ignore", "-m", "nnunetv2_hiendmae.cli", *map(str, arguments)]
    # elsewhere: `python -m` looks into the current folder first
    done = subprocess.run(line, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr}")


def prepare(tree: Path, root: Path) -> None:
    """Arrays of the demo's unlabelled images, by that tree."""
    shutil.copytree(DEMO, root / "raw")
    for name in ("preprocessed", "results"):
        (root / name).mkdir()
    command(tree, root, "preprocess", "-d", 901, "--spacing", 3, 3, 3, "-np", 2)


def samples_per_second(tree: Path, root: Path) -> float:
    """Of pretraining `vit_nano_p8` on 48³ crops."""
    run = root / "run"
    size = ("--encoder", "vit_nano_p8", "--crop-size", 48, 48, 48, "--batch-size", BATCH, "--workers", 1)
    length = ("--epochs", 1, "--steps-per-epoch", STEPS, "--warmup-epochs", 0, "--precision", "fp32")
    command(tree, root, "pretrain", "-d", 901, *size, *length, "-device", "cpu", "-o", run)
    rates = [json.loads(line)["samples_per_second"] for line in (run / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return statistics.harmonic_mean(rates[FIRST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--against", metavar="REV", default="3770f85", help="a commit of ours")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cpu_model()}, {cores} cores, {cores} busy processes; {args.repeats} rounds; samples per second\n")
    with TemporaryDirectory() as folder, worktree(args.against, Path(folder) / "tree") as then:
        trees = {"this": HERE, args.against: then}
        for name, tree in trees.items():
            prepare(tree, Path(folder) / name)
        rates = {(name, state): [] for name in trees for state in ("quiet", "busy")}
        for _ in range(args.repeats):
            for name, tree in trees.items():
                rates[name, "quiet"].append(samples_per_second(tree, Path(folder) / name))
                with busy_cores(cores):
                    rates[name, "busy"].append(samples_per_second(tree, Path(folder) / name))
    print("| build | quiet | busy | busy / quiet |\n|---|---|---|---|")
    for name in trees:
        quiet, busy = (rates[name, state] for state in ("quiet", "busy"))
        ratios = [b / q for b, q in zip(busy, quiet, strict=True)]
        print(f"| {name} | {' | '.join(f'{statistics.median(v):.2f}' for v in (quiet, busy, ratios))} |")


if __name__ == "__main__":
    main()
