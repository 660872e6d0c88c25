"""Fixtures for all tests; also lets tests in sub-folders import the helper modules beside this file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from nnunet_data import Folders, make_folders


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> Folders:
    """nnU-Net's three folders, empty, with its variables pointing at them."""
    folders = make_folders(tmp_path / "nnunet")
    for variable, path in folders.environment.items():
        monkeypatch.setenv(variable, path)
    return folders
