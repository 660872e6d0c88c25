"""What the benchmarks share: clocks, and the name of the machine."""

import platform
import time
from pathlib import Path

# elapsed time, or for a machine that is busy with other work the time that the processor gave to this process
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def cpu_model() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
