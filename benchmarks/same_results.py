"""Proof that a redesign changed nothing: one fixed programme, in this checkout and in another commit, file by file.

    python benchmarks/same_results.py --against 3770f85

`fixed_programme.py` preprocesses, pretrains with every method, converts every checkpoint of the tests, plans,
fine-tunes, predicts, compares, classifies and draws, on tiny data that it makes from a seed. Whatever it leaves must be
the same to the bit: arrays, tensors, JSON, tables, pixels; encoder files byte for byte. The two run one after the other
in a folder of the same name, so that paths in files are the same too. What cannot be the same stands in NOT_COMPARED
and TIMES with the reason. What commands print for people (and not as JSON) may be reworded: that is listed, but is no
failure. Takes six minutes of one core.

Exit code 1: something differs.
"""

import argparse
import csv
import hashlib
import json
import lzma
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import blosc2
import nibabel
import numpy as np
import torch
from machine import HERE, worktree
from matplotlib.image import imread
from safetensors import safe_open

NOW, THEN = "now", "then"
NOT_COMPARED = {
    "*/progress.png": "shows speeds and times",
    "*/training_log_*.txt": "nnU-Net's log with time stamps; what it tells is in checkpoint_final.pth",
    "*/debug.json": "nnU-Net's dump of its trainer, with addresses of objects",
    "*/.*": "locks, without content",
    "logs/*.err": "progress with speeds",
    "*/hiendmae_labels.sha256": "of the times at which label files were written",
    "nnUNet_raw/*": "made by the programme itself",
    "nnUNet_results/Dataset004_Results/*": "made by the programme itself",
    "logs/*_nnUNetv2_*": "nnU-Net's words, with time stamps",
}
# what commands say to people
WORDS = "logs/*"
# keys of JSON files and of nnU-Net's checkpoints
TIMES = {"samples_per_second", "epoch_start_timestamps", "epoch_end_timestamps"}
LISTED = 5


# ---- running --------------------------------------------------------------------------------------------------------


def run_programme(tree: Path, folder: Path, checkpoints: Path) -> float:
    """Runs the programme by the package in `tree`, in a new folder; seconds."""
    folder.mkdir()
    environment = {
        **os.environ,
        **{v: str(folder / v) for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_def_n_proc"), "1"),
        "nnUNet_n_proc_DA": "0",
        "MPLBACKEND": "agg",
        "COLUMNS": "100",
        "PYTHONWARNINGS": "ignore",
        # before an editable installation of another checkout
        "PYTHONPATH": str(tree),
    }
    where = "import nnunetv2_hiendmae; print(nnunetv2_hiendmae.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], env=environment, cwd=folder, text=True).strip()
    if not Path(found).is_relative_to(tree):
        sys.exit(f"python imports {found} and not the package in {tree}")
    command = [sys.executable, "-m", "nnunetv2_hiendmae.cli", "env"]
    line = subprocess.check_output(command, env=environment, cwd=folder, text=True)
    variable, value = shlex.split(line)[1].split("=", 1)
    start = time.perf_counter()
    script = [sys.executable, str(HERE / "benchmarks" / "fixed_programme.py"), str(checkpoints)]
    if code := subprocess.run(script, env={**environment, variable: value}, cwd=folder).returncode:
        sys.exit(f"the programme ended with {code} by the package in {tree}, see above")
    return time.perf_counter() - start


def unpack_checkpoints(folder: Path) -> None:
    """The authors' checkpoints among the fixtures of this checkout, each with the description beside it."""
    folder.mkdir()
    for packed in sorted((HERE / "tests" / "fixtures").glob("*/checkpoint.pth.xz")):
        (folder / f"{packed.parent.name}.pth").write_bytes(lzma.decompress(packed.read_bytes()))
        shutil.copy(packed.with_name("meta.json"), folder / f"{packed.parent.name}.json")


# ---- comparing ------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Any]:
    """All that the file says, and the digest of its bytes, which also tells of another order or padding."""
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        # sorted: the library gives them in an order of its own
        header = {k: json.loads(v) if v.startswith("{") else v for k, v in sorted((f.metadata() or {}).items())}
    return {"tensors": tensors, "header": header, "bytes": hashlib.sha256(path.read_bytes()).hexdigest()}


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def read_nifti(path: Path) -> dict[str, np.ndarray]:
    """Voxels and place; the file's own bytes hold the time of its compression."""
    image = nibabel.load(path)
    return {"voxels": np.asanyarray(image.dataobj), "affine": image.affine}


READERS: dict[str, Callable[[Path], Any]] = {
    ".b2nd": lambda path: blosc2.open(str(path), mode="r")[:],
    ".pkl": lambda path: pickle.loads(path.read_bytes()),
    ".npz": lambda path: dict(np.load(path)),
    ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=False),
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": lambda path: [json.loads(line) for line in read_lines(path)],
    ".csv": lambda path: list(csv.reader(path.open(encoding="utf-8", newline=""))),
    ".safetensors": read_safetensors,
    ".gz": read_nifti,
    ".png": imread,
}


def differences(now: Any, then: Any, where: str = "content") -> Iterator[tuple[str, float]]:
    """Places where two nested values differ, with the largest difference; NaN where it is none of numbers."""
    if isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor):
        now, then = now.detach().numpy(), then.detach().numpy()
    if type(now) is not type(then):
        yield f"{where}: {type(now).__name__} instead of {type(then).__name__}", math.nan
    elif isinstance(now, dict):
        for key in sorted({*now, *then} - TIMES, key=str):
            place = f"{where}.{key}"
            if key in now and key in then:
                yield from differences(now[key], then[key], place)
            else:
                yield f"{place}: only {NOW if key in now else THEN}", math.nan
        if list(now) != list(then) and now.keys() == then.keys():
            yield f"{where}: order of the keys", math.nan
    elif isinstance(now, list | tuple):
        if len(now) != len(then):
            yield f"{where}: {len(now)} entries instead of {len(then)}", math.nan
        for i, pair in enumerate(zip(now, then, strict=False)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(now, np.ndarray):
        yield from differing_arrays(now, then, where)
    elif now != then and not (now != now and then != then):
        number = isinstance(now, float | int)
        yield f"{where}: {now!r:.80} instead of {then!r:.80}", abs(now - then) if number else math.nan


def differing_arrays(now: np.ndarray, then: np.ndarray, where: str) -> Iterator[tuple[str, float]]:
    """As `differences`, to the bit: the same NaN is no difference, 0.0 and -0.0 are one."""
    if (now.dtype, now.shape) != (then.dtype, then.shape):
        yield f"{where}: {now.dtype} {now.shape} instead of {then.dtype} {then.shape}", math.nan
    elif now.tobytes() != then.tobytes():
        bits = [np.frombuffer(a.tobytes(), f"V{a.itemsize}") for a in (now, then)]
        changed = np.flatnonzero(bits[0] != bits[1])
        numbers = [a.reshape(-1)[changed].astype(float) for a in (now, then)]
        yield f"{where}: {changed.size} of {now.size} values", float(np.abs(numbers[0] - numbers[1]).max())


def compare_file(name: str, now: Path, then: Path) -> list[str]:
    """What differs in one file of both results, a line each, worst first."""
    there = [side for side, root in ((NOW, now), (THEN, then)) if (root / name).is_file()]
    if len(there) == 1:
        return [f"only {there[0]}"]
    read = READERS.get((now / name).suffix, read_lines)
    found = sorted(differences(read(now / name), read(then / name)), key=lambda d: -math.inf if d[1] != d[1] else -d[1])
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return [where + ("" if apart != apart else f", off by {apart:.3g}") for where, apart in found[:LISTED]] + more


def compare(now: Path, then: Path) -> tuple[list[str], bool]:
    """Report, a line for every folder and kind of file with what differs in it; whether all results are the same."""
    names = {p.relative_to(root).as_posix() for root in (now, then) for p in root.rglob("*") if p.is_file()}
    items = defaultdict(list)
    for name in sorted(names):
        if not any(fnmatch(name, pattern) for pattern in NOT_COMPARED):
            items[f"{Path(name).parent}/*{Path(name).suffix}"].append(name)
    lines, failing = [], 0
    for pattern, files in items.items():
        found = {name: told for name in files if (told := compare_file(name, now, then))}
        words = fnmatch(files[0], WORDS)
        failing += 0 if words else len(found)
        status = "same" if not found else "reworded" if words else "DIFFERS"
        shown = files[0] if len(files) == 1 else f"{pattern}, {len(files)} files"
        lines.append(f"{status:8} {shown}")
        lines += [f"         {name}: {line}" for name, told in found.items() for line in told]
    total = sum(map(len, items.values()))
    return [*lines, f"{total} files, " + (f"{failing} DIFFER" if failing else "all the same to the bit")], not failing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="commit to compare this checkout with")
    parser.add_argument("-o", dest="output", type=Path, metavar="DIR", help="new folder that keeps both results")
    args = parser.parse_args()
    if args.output and args.output.exists():
        parser.error(f"{args.output} exists already")
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        results = args.output or root / "results"
        results.mkdir(parents=True)
        unpack_checkpoints(root / "checkpoints")
        with worktree(args.against, root / "tree") as other:
            for name, tree in ((THEN, other), (NOW, HERE)):
                seconds = run_programme(tree, root / "run", root / "checkpoints")
                shutil.move(root / "run", results / name)
                print(f"{name}: {seconds:.0f} s")
        lines, same = compare(results / NOW, results / THEN)
        (results / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
