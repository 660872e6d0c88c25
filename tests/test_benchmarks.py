"""Benchmarks that run unattended, on machines that nobody has seen."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    """benchmarks/all.py as a module; its helpers lie beside it."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_table", FOLDER / "all.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_what_does_not_fit_is_told_and_what_follows_is_measured(table, monkeypatch):
    """Also where the memory is full while operations are counted, before any way is measured."""
    method = table.METHODS["hiendmae"]
    forward = method.forward

    def fills_memory(self, *args):
        # of a block that is carried out as it stands
        if not hasattr(self.self_blocks[0].forward, "func"):
            raise torch.OutOfMemoryError
        return forward(self, *args)

    monkeypatch.setattr(method, "forward", fills_memory)
    bench = table.Bench(Namespace(device="cpu", repeats=2, output=None, tiny=True, precisions=("fp32",)))
    ways = [table.Way("fp32"), table.Way("fp32", checkpointed=True)]
    table.pretraining(bench, "hiendmae", "vit_nano_p8", 1, ways)
    failed, measured = bench.lines
    assert "| fp32 | OutOfMemoryError |" in failed
    assert "| fp32, checkpointed | 0." in measured and "%" not in measured
