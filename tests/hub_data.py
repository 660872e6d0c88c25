"""The cache of huggingface_hub as it lays it out, filled without a network."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """A cache of one test; within the test huggingface_hub uses it, offline."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch):
        self.home, self.folder = home, home / "hub"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.folder))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that uses it."""
        return {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}

    def add(self, repo: str, file: str, content: bytes, *, commit: str = COMMIT, ref: str = "main") -> Path:
        """Puts a file there, as downloaded; its path in the snapshot."""
        root = self.folder / f"models--{repo.replace('/', '--')}"
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        snapshot, reference = root / "snapshots" / commit / file, root / "refs" / ref
        for path in (blob, snapshot, reference):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        snapshot.symlink_to(blob)
        reference.write_text(commit)
        return snapshot
