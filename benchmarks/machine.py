"""What the benchmarks share: clocks, the name of the machine, and files of other commits."""

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

# elapsed time, or for a machine that is busy with other work the time that the processor gave to this process
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def cpu_model() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a folder, which is gone afterwards."""
    git = ["git", "-C", str(HERE), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)
