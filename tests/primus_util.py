"""Fixtures of Primus: recorded from nnssl and dynamic-network-architectures (tests/fixtures/primus/*/meta.json)."""

from pathlib import Path
from typing import Any

import torch
from fixtures_util import Fixture
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.kinds import MLP_RATIO, NORM_EPS

TINY_PRIMUS = EncoderSpec(
    *((16, 16, 16), (8, 8, 8), 24, 4, 2), kind="primus", mlp_ratio=MLP_RATIO, pos_embed="learned", norm_eps=NORM_EPS
)
FULL_PRIMUS = TINY_PRIMUS.with_(layer_scale=0.1, inner_norm=True, register_tokens=2)


class PrimusFixture(Fixture):
    """One folder of tests/fixtures/primus. `tag`: the part of it that is meant, where it has several."""

    def __init__(self, name: str, tag: str = ""):
        super().__init__(f"primus/{name}")
        self.tag = f"{tag}/" if tag else ""
        self.config: dict[str, Any] = self.meta["config"][tag] if tag else self.meta["config"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors.get(f"{self.tag}{name}", self.tensors.get(name))

    def tolerance(self, name: str) -> float:
        noise = self.meta["noise"]
        noise = noise.get(f"{self.tag}{name}", noise.get(name, {})).get("max_abs_err", 0.0)
        return max(1e-5 + 1e-5 * self[name].abs().max().item(), 5 * noise)

    @property
    def image(self) -> Tensor:
        return self.image_of("x_u8")

    def image_of(self, name: str) -> Tensor:
        """An input (B, C, D, H, W), decoded as `input_rule` says."""
        return (self[name].float() - 128) / 64

    def write(self, path: Path, name: str = "checkpoint.pth") -> Path:
        """Writes one of its checkpoints as its program wrote it."""
        path.write_bytes(self._read(name))
        return path

    def content(self, name: str = "checkpoint.pth") -> dict[str, Any]:
        """What a checkpoint holds."""
        import io

        return torch.load(io.BytesIO(self._read(name)), map_location="cpu", weights_only=True)

    @property
    def spec(self) -> EncoderSpec:
        """What the recorded network is."""
        config = self.config
        return EncoderSpec(
            tuple(config["input_shape"]),
            tuple(config["patch_embed_size"]),
            config["embed_dim"],
            config.get("encoder_eva_depth", config.get("eva_depth")),
            config.get("encoder_eva_numheads", config.get("eva_numheads")),
            kind="primus",
            in_channels=config["input_channels"],
            mlp_ratio=MLP_RATIO,
            pos_embed="learned",
            norm_eps=NORM_EPS,
            register_tokens=config.get("num_register_tokens", 0),
            layer_scale=config["init_values"],
            inner_norm=config["scale_attn_inner"],
        )
