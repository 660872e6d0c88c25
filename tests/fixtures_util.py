"""Reading the recorded fixtures: numbers of the authors' programs, stored by tests/fixtures/*/meta.json's rules.

The files are xz-compressed, and three things of the original recording are left out for the sake of size; `meta` says
which: voxels or columns of large outputs (`kept_steps`), tensors of the fine-tuning network that equal those of the
checkpoint (`finetune_from_checkpoint`), and the teacher of `glmae_unetr`.
"""

import argparse
import io
import json
import lzma
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


class Fixture:
    """One folder of tests/fixtures: `meta`, the recorded `tensors`, and the authors' checkpoint."""

    def __init__(self, name: str):
        self.path = FIXTURES / name
        self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        self.tensors: dict[str, Tensor] = load(self._read("io.safetensors"))

    def _read(self, name: str) -> bytes:
        return lzma.decompress((self.path / f"{name}.xz").read_bytes())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def image(self) -> Tensor:
        """The input (B, C, D, H, W), decoded as `input_rule` says."""
        if "x_u8" in self.tensors:
            return self["x_u8"].float() / 255
        coarse, fine = self["x_a_u8"], self["x_b_u8"]
        for axis in (2, 3, 4):
            coarse = coarse.repeat_interleave(4, dim=axis)
        return (coarse.float() + fine.repeat(1, 1, 4, 4, 4).float()) / 510

    def write_checkpoint(self, path: Path) -> Path:
        """Writes checkpoint.pth as the authors wrote it, and gives its path back."""
        path.write_bytes(self._read("checkpoint.pth"))
        return path

    def checkpoint(self) -> dict[str, Any]:
        """Content of checkpoint.pth; MiM's pickles an argparse.Namespace."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(self._read("checkpoint.pth")), map_location="cpu", weights_only=True)

    def finetune_state(self) -> dict[str, Tensor]:
        """The authors' whole fine-tuning network, float32, under their names."""
        state = {k: v.float() for k, v in load(self._read("finetune.safetensors")).items()}
        weights = self.state_dict()
        return {**state, **{k: weights[source] for k, source in self.meta["finetune_from_checkpoint"].items()}}

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The model's tensors, those under `prefix` with the prefix taken off."""
        content = self.checkpoint()
        weights = next(content[key] for key in ("state_dict", "model", "student") if key in content)
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def tolerance(self, name: str) -> float:
        """Largest allowed |difference|: float32 rounding relative to the tensor, or five times the noise that was
        measured between the authors' float32 and float64 results."""
        noise = self.meta["noise"].get(name, {}).get("max_abs_err", 0.0)
        return max(1e-5 + 1e-5 * self[name].abs().max().item(), 5 * noise)

    def check(self, name: str, ours: Tensor, recorded: Tensor | None = None) -> None:
        """Asserts that `ours` equals the recorded tensor (or the given part of it) within the tolerance."""
        recorded = self[name] if recorded is None else recorded
        steps = self.meta.get("kept_steps", {}).get(name, ())
        ours = ours[(..., *(slice(None, None, step) for step in steps))]
        assert ours.shape == recorded.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(recorded.shape)}"
        error = (ours.detach() - recorded).abs().max().item()
        assert error <= self.tolerance(name), f"{name}: off by {error:.2e}, tolerance {self.tolerance(name):.2e}"
