"""Checkpoints as other programs write them, made from random encoders of ours: any size, no fixture needed."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from primus_util import PrimusFixture
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder

VIT = EncoderSpec((8, 8, 8), (4, 4, 4), embed_dim=12, depth=2, num_heads=2)
CONVVIT = EncoderSpec(
    (32, 32, 32),
    (16, 16, 16),
    embed_dim=12,
    depth=2,
    num_heads=2,
    kind="convvit",
    stem_dims=(2, 4, 6),
    stem_depths=(1, 1, 1),
)
PRIMUS = EncoderSpec(
    *((16, 16, 16), (8, 8, 8), 24, 2, 2),
    kind="primus",
    mlp_ratio=8 / 3,
    pos_embed="learned",
    norm_eps=1e-5,
    layer_scale=0.1,
    inner_norm=True,
)
SPECS = {"hiendmae": VIT, "mim": CONVVIT, "glmae": VIT, "mae3d": VIT, "timm": VIT, "monai": VIT, "nnssl": PRIMUS}
# those whose crop only tensors and options tell
WITHOUT_PLAN = [kind for kind in SPECS if kind != "nnssl"]
_MIM_BLOCK = {"pw1": "conv1", "dw": "attn", "pw2": "conv2"}
_MONAI = (("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.linear1"), ("mlp.fc2", "mlp.linear2"))


def random_state(spec: EncoderSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the encoder, normally distributed; built without building the encoder."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build_encoder(spec).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.empty(s, dtype=dtype).normal_(generator=generator) for k, s in shapes.items()}


def authors_name(kind: str, name: str) -> str:
    """Our name of an encoder's tensor → theirs."""
    if kind == "hiendmae":
        return "module.encoder_pos_embed" if name == "pos_embed" else f"module.encoder.{name}"
    if kind == "glmae":
        return f"module.backbone.{name}"
    if kind == "mim":
        return _mim_name(name)
    if kind == "nnssl":
        stem = name.startswith("patch_embed.")
        return name.replace("patch_embed", "down_projection") if stem else f"eva.{name}"
    if kind == "monai":
        for ours, theirs in _MONAI:
            name = name.replace(ours, theirs)
        name = name.replace("patch_embed.proj.", "patch_embedding.patch_embeddings.")
        return name.replace("pos_embed", "patch_embedding.position_embeddings")
    return name


def _mim_name(name: str) -> str:
    if m := re.fullmatch(r"stages\.(\d)\.embed\.(.+)", name):
        return f"patch_embed{int(m[1]) + 1}.{m[2]}"
    if m := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        rest = ".".join(_MIM_BLOCK.get(p, p) for p in m[3].split("."))
        return f"blocks{int(m[1]) + 1}.{m[2]}.{rest}"
    if m := re.fullmatch(r"fusions\.(\d)\.proj\.(.+)", name):
        return f"stage{int(m[1]) + 1}_output_decode.{m[2]}"
    for ours, theirs in (("embed.", "patch_embed4."), ("embed_linear.", "patch_embed5."), ("blocks.", "blocks4.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def authors_state(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors under their names and in their shapes, with some of a decoder."""
    theirs = {}
    for name, tensor in state.items():
        if kind in ("glmae", "mae3d", "timm") and name == "pos_embed" and "cls_token" in state:
            tensor = torch.cat([torch.full_like(tensor[:, :1], 0.5), tensor], dim=1)
        if kind == "mim" and re.search(r"stages\.\d\.blocks\.\d+\.(pw|mlp)", name) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None, None]
        theirs[authors_name(kind, name)] = tensor
    extra = {
        "hiendmae": ["module.mask_token", "module.decoder.norm.weight", "module.encoder_to_decoder.0.bias"],
        "mim": ["mask_token", "decoder_embed.bias", "aggregate_mid.fc1.bias"],
        "glmae": ["module.backbone.mask_token", "module.backbone.decoder_embed.bias", "module.head.mlp.0.bias"],
        "mae3d": ["mask_token", "decoder_embed.bias"],
        "timm": ["head.weight"],
        "nnssl": ["mask_token", "decoder.norm.weight", "up_projection.decode.0.0.weight"],
        "monai": ["blocks.0.norm_cross_attn.weight", *["classification_head.0.bias"] * ("cls_token" in state)],
    }
    # of a shape that no tensor of an encoder has: under the name of one it must be noticed
    return {**theirs, **{name: torch.zeros(5, 7, dtype=tensor.dtype) for name in extra[kind]}}


def container(kind: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """The whole content of such a file."""
    if kind == "hiendmae":
        return {"epoch": 1000, "state_dict": state}
    if kind == "glmae":
        return {"student": state, "epoch": 1599, "args": argparse.Namespace(arch="vit_base")}
    if kind == "nnssl":
        return {"network_weights": state, "nnssl_adaptation_plan": nnssl_plan(), "trainer_name": "BaseEvaMAETrainer"}
    if kind in ("mim", "mae3d"):
        return {"model": state, "epoch": 799, "args": argparse.Namespace(batch_size=1)}
    return state


def nnssl_plan(crop: tuple[int, int, int] = (16, 16, 16)) -> dict[str, Any]:
    """OpenMind's adaptation plan, for another crop."""
    plan = PrimusFixture("nnssl_evamae").content()["nnssl_adaptation_plan"]
    plan["pretrain_plan"]["configurations"]["onemmiso"]["patch_size"] = crop
    return {**plan, "recommended_downstream_patchsize": crop}


def write_checkpoint(path: Path, kind: str, spec: EncoderSpec | None = None, dtype=torch.float32, **save) -> Path:
    """A file of that kind with random numbers."""
    torch.save(container(kind, authors_state(kind, random_state(spec or SPECS[kind], dtype))), path, **save)
    return path


def write_run(folder: Path, spec: EncoderSpec = VIT, *, teacher: bool = False) -> Path:
    """checkpoint_latest.pth and run.json, as `hiendmae pretrain` leaves them."""
    state = {f"encoder.{k}": v for k, v in random_state(spec).items()} | {"head.weight": torch.zeros(3, 3)}
    if teacher:
        state |= {f"teacher_encoder.{k}": v for k, v in random_state(spec, seed=1).items()}
    folder.mkdir()
    path = folder / "checkpoint_latest.pth"
    torch.save({"step": 5, "method": state, "optimizer": {"state": {0: torch.zeros(2)}}}, path)
    settings = {"method": "glmae" if teacher else "mae3d", "spec": spec.to_dict(), "epochs": 3}
    (folder / "run.json").write_text(json.dumps(settings))
    return path
