"""Fixtures for all tests; also lets tests in sub-folders import the helper modules beside this file."""

import os
import sys
from collections import Counter
from pathlib import Path

# before torch is imported, and for every process that a test starts: the tests' tensors are tiny, and threads that
# spin while they wait for each other on busy cores are many times slower than one. nnUNetv2_train asks for all cores
# again, hence the passive waiting; OMP_THREAD_LIMIT would stop that, but makes torch's convolutions wait for ever
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
# nnU-Net reads this when it is imported: one process for each of its pools that is not told otherwise
os.environ.update(nnUNet_def_n_proc="1")
# huggingface_hub reads this when it is imported: no test asks the network
os.environ.update(HF_HUB_OFFLINE="1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import forked
import torch
from matplotlib.figure import Figure
from nnunet_data import Folders, make_folders


def pytest_collection_modifyitems(items):
    """Files with slow tests first: they are given to processes as a whole, and what comes last should be short."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="session")
def quick_nnunet():
    forked.quicken_nnunet()


@pytest.fixture(autouse=True)
def one_thread():
    """nnU-Net's resampling and export set torch's threads, and an error leaves them so."""
    torch.set_num_threads(1)


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> Folders:
    """nnU-Net's three folders, empty, with its variables pointing at them."""
    folders = make_folders(tmp_path / "nnunet")
    for variable, path in folders.environment.items():
        monkeypatch.setenv(variable, path)
    return folders


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that a test has saved, in order; their files stay empty."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    return figures
