"""Full-size checkpoints convert without a second copy of the weights, measured in a process of its own."""

import subprocess
import sys

import pytest
import torch
from foreign_files import write_checkpoint
from safetensors import safe_open

from nnunetv2_hiendmae.architectures import PRESETS

# VmHWM counts the pages of the mapped source as well, each once; ru_maxrss would begin with that of the parent
SCRIPT = """
import sys
from pathlib import Path
import nnunetv2_hiendmae.architectures
from nnunetv2_hiendmae.weights import convert_checkpoint

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
print(before, peak())
"""
GIB = 2**30
# of the released widths, so the heads are known
SIZES = [("hiendmae", "vit_hiend_p12"), ("mim", "convvit_base"), ("glmae", "vit_base_p16")]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "preset"), SIZES)
def test_full_size_in_the_memory_of_one_copy(tmp_path, kind, preset):
    spec = PRESETS[preset]
    source = write_checkpoint(tmp_path / "c.pth", kind, spec, torch.float16)
    weights = source.stat().st_size
    output = tmp_path / "e.safetensors"
    try:
        command = [sys.executable, "-c", SCRIPT, str(source), str(output)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        before, peak = map(int, done.stdout.split())
        assert peak < 4 * GIB
        # the file once, and what one tensor needs; a second copy would make it twice
        assert peak - before < 1.3 * weights + 100e6
        with safe_open(output, "pt") as f:
            names = set(f.keys())
            assert f.get_slice("blocks.0.mlp.fc1.weight").get_dtype() == "F16"
        assert len(names) > 100
    finally:
        source.unlink()
        output.unlink(missing_ok=True)
