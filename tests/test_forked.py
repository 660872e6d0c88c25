"""What the other tests rely on when their commands are forked instead of spawned."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from nnunet_data import make_folders
from workplace import make_workplace

# what a command sees, and what the processes of its pools see
PROBE = """
import multiprocessing, os, sys
from nnunetv2.utilities.dataset_name_id_conversion import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

def folders():
    return [os.environ["nnUNet_raw"], str(nnUNet_raw), str(nnUNet_preprocessed), str(nnUNet_results)]

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*folders(), *pool.apply(folders), os.environ.get("ONLY_HERE"), *sys.argv[1:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("forked") / "nnunet")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(code) → arguments of Python that run it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> list[str]:
        (tmp_path / "probe.py").write_text(code)
        return [Path(sys.executable).name, "-m", "probe"]

    return write


def test_a_command_and_its_pools_have_its_own_variables_and_arguments(place, module, tmp_path):
    command = module(PROBE)
    other = make_folders(tmp_path / "other")
    elsewhere = replace(place, folders=other, environment={**place.environment, **other.environment, "ONLY_HERE": "x"})
    for somewhere, own in ((elsewhere, "x"), (place, "None")):
        folders = [getattr(somewhere.folders, name) for name in ("raw", "raw", "preprocessed", "results")]
        expected = [*map(str, folders * 2), own, "one", "two"]
        assert somewhere.run(*command, "one", "two").splitlines()[-1].split() == expected


def test_a_command_begins_with_its_modules_and_without_threads(place, module):
    absent = "import os, sys, forked\nprint(*set(forked.PRELOADED) - set(sys.modules))\n"
    assert place.run(*module(absent)) == "\n"
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads as Linux does")
    threads = "import os, torch\ntorch.set_num_threads(4)\nprint(len(os.listdir('/proc/self/task')))\n"
    assert place.run(*module(threads)) == "1\n"


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [("pass", 0, "out"), ("sys.exit(3)", 3, "out"), ("sys.exit('no')", 1, "no"), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_how_a_command_ends(place, module, end, code, last):
    command = module(f"import sys\nprint('err', file=sys.stderr)\nprint('out')\n{end}\n")
    if code:
        with pytest.raises(AssertionError, match=f"→ {code}\nerr\nout\n"):
            place.run(*command)
    said = place.run(*command, fails=code != 0)
    assert said.startswith("err\nout\n") and last in said.splitlines()[-1]
    with pytest.raises(AssertionError, match=f"→ {code}\n"):
        place.run(*command, fails=code == 0)


def test_a_command_that_hangs_is_killed_with_all_that_it_started(place, module, monkeypatch):
    monkeypatch.setattr(forked, "TIMEOUT_S", 2)
    hanging = "import os, time\npid = os.fork()\nif pid: print('child', pid, flush=True)\ntime.sleep(600)\n"
    with pytest.raises(AssertionError, match="still running after 2 s\nchild ") as told:
        place.run(*module(hanging))
    child = int(str(told.value).split("child ")[1].split()[0])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
