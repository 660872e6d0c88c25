"""For tests/test_fuzz.py: damaged variants of a file, and commands on them in a child that says what they took."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from forked import work_little
from matplotlib.figure import Figure
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

from nnunetv2_hiendmae import cli

# values that stand where another kind, or another size, is needed
WRONG = (None, True, "", "x", "CT", -1, 0, 1, 0.5, 96.0, 10**7, 2**40, 1e39, math.nan, math.inf, -math.inf)
WRONG += ([], [1, 2], {})
WRONG += ({"a": None}, "\x1b[31m", "../x", "a" * 5000)


def json_variant(content: Any, rng: np.random.Generator) -> Any:
    """A copy in which one or two places are lost, doubled, renamed, or hold something else."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.integers(1, 3)):
        holder, key = _place(content, rng)
        if holder is None:
            return WRONG[rng.integers(len(WRONG))]
        action = rng.integers(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        elif action == 1:
            holder += holder
        else:
            holder[key] = WRONG[rng.integers(len(WRONG))]
    return content


def _place(content: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A container inside and one of its keys, at a depth of chance; (None, None): there is none."""
    places = []
    pending = [content]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else []
        places += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys]
    return places[rng.integers(len(places))] if places else (None, None)


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, emptied, a byte changed, a block of zeros, bytes lost or added."""
    at, size = int(rng.integers(max(1, len(data)))), int(rng.integers(1, 64))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: b"",
        lambda: data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :],
        lambda: data[:at] + bytes(size) + data[at + size :],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + rng.bytes(size) + data[at:],
        lambda: b"\xef\xbb\xbf" + data,
    )
    return kinds[rng.choice(len(kinds), p=(0.15, 0.05, 0.4, 0.15, 0.1, 0.1, 0.05))]()


def with_header(data: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with another header, or with another description of its encoder or tensors in it."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.7:
        about = json.loads(header["__metadata__"]["hiendmae"])
        header["__metadata__"]["hiendmae"] = json.dumps(json_variant(about, rng))
    else:
        header = json_variant(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def run_commands(
    commands: list[list[str]], folder: str, environment: dict[str, str], told: str, drawn: str = ""
) -> None:
    """In a child: the commands one after the other, and what each said, took and ended with, as JSON in `told`. Of
    their pictures, which would take most of it, only `drawn` is more than an empty file."""
    os.environ.update(environment)
    os.chdir(folder)
    work_little()
    save = Figure.savefig
    Figure.savefig = lambda *at, **how: save(*at, **how) if drawn and drawn in at[1].name else at[1].touch()
    # where a fingerprint is made again: nnU-Net would be imported once more for each
    fingerprint_extractor.multiprocessing = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = []
    for command in commands:
        out, err, start = io.StringIO(), io.StringIO(), time.process_time()
        before = _peak_gb(reset=True)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(command)
        except SystemExit as e:
            code = e.code
        except BaseException:
            code = 1
            err.write(traceback.format_exc())
        took = {"seconds": time.process_time() - start, "gb": _peak_gb() - before}
        lines.append({"command": command, "code": code, "out": out.getvalue(), "err": err.getvalue(), **took})
    Path(told).write_text(json.dumps(lines), encoding="utf-8")


def _peak_gb(reset: bool = False) -> float:
    """Largest resident memory so far; on Linux since the last reset, and a child begins with that of its server."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
