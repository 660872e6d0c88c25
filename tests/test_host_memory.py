"""Freed memory is kept, or given back."""

import os
import platform
import subprocess
import sys

import pytest

from nnunetv2_hiendmae.host_memory import CHOSEN_BY_USER

CODE = """
import resource, sys
import numpy as np
from nnunetv2_hiendmae.host_memory import set_freed_memory

EDGE = 1 << 19  # float32: 2 MB, 512 pages
def step():
    return [np.ones(EDGE, np.float32) for _ in range(20)] and None
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for keep in map(int, sys.argv[1]):
    done = set_freed_memory(bool(keep))
    step()
    before = pages()
    for _ in range(5):
        step()
    print(done, pages() - before)
"""


def pages(keep: str, **environment: str) -> list[tuple[bool, int]]:
    """For every digit of `keep` whether it was set, and new pages of five equal steps of 10,240 each after a first."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(CHOSEN_BY_USER)}
    command = [sys.executable, "-c", CODE, keep]
    done = subprocess.run(command, env={**plain, **environment}, capture_output=True, encoding="utf-8", check=True)
    return [(told == "True", int(new)) for told, new in (line.split() for line in done.stdout.splitlines())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_or_given_back_and_both_can_be_changed():
    for keep in ("10", "01"):
        for digit, (done, new) in zip(keep, pages(keep), strict=True):
            # a page here and there is Python's own; given back, every array's pages are new (fewer where they are huge)
            assert done and (new < 100 if digit == "1" else new > 1000), (keep, digit, new)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(name):
    [(done, _)] = pages("1", **{name: "131072" if name.startswith("MALLOC") else "glibc.malloc.trim_threshold=131072"})
    assert not done
