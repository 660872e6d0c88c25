"""The authors' networks under our names, one explicit rule per tensor, and what the fixtures recorded of them."""

import re
from typing import Any

import torch
from torch import Tensor, nn

# their residual blocks: two convolutions and the 1³ one of the skip connection
CONVS = {"conv1": "conv1", "conv2": "conv2", "conv3": "skip.0"}

VIT_NAMES = {
    "patch_embedding.patch_embeddings.1.weight": "patch_embed.proj.weight",
    "patch_embedding.patch_embeddings.1.bias": "patch_embed.proj.bias",
    "patch_embedding.position_embeddings": "pos_embed",
}
VIT_BLOCK_NAMES = {"out_proj": "proj", "linear1": "fc1", "linear2": "fc2"}
# stage of their network -> where ours puts out the same
UNETR_STAGES = {
    "encoder1": "image_block",
    "encoder2": "skips.0",
    "encoder3": "skips.1",
    "encoder4": "skips.2",
    "decoder5": "ups.0",
    "decoder4": "ups.1",
    "decoder3": "ups.2",
    "decoder2": "ups.3",
}
CONVVIT_UNETR_STAGES = {
    "encoder1": "image_block",
    "encoder2": "skips.0",
    "encoder3": "skips.1",
    "encoder4": "skips.2",
    "encoder10": "bottleneck_block",
    "decoder5": "ups.0",
    "decoder4": "ups.1",
    "decoder3": "ups.2",
    "decoder2": "ups.3",
    "decoder1": "ups.4",
}
CONV_BLOCK_NAMES = {"conv1": "pw1", "attn": "dw", "conv2": "pw2", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


def unetr_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their UNETR → `ViTUNETR`; the ViT has MONAI's names (Hi-End-MAE) or timm's (GL-MAE)."""
    state = {}
    for name, tensor in theirs.items():
        part, _, rest = name.partition(".")
        if part == "vit":
            if tensor.ndim == 2 and rest in VIT_NAMES:
                # a matrix over (p_d, p_h, p_w, C) becomes a kernel
                tensor = tensor.unflatten(1, (12, 12, 12, 1)).permute(0, 4, 1, 2, 3)
            ours = ".".join(VIT_BLOCK_NAMES.get(p, p) for p in VIT_NAMES.get(rest, rest).split("."))
            state[f"encoder.{ours}"] = tensor
        else:
            state |= _decoder(name, tensor, UNETR_STAGES)
    return state


def convvit_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """MiM's encoder, in either form → `ConvViTEncoder`. The decoder of pretraining is left out."""
    state, tables = {}, {}
    for name, tensor in theirs.items():
        if name.endswith("relative_position_bias_table"):
            tables[int(name.split(".")[1])] = tensor
        elif ours := _convvit_name(name):
            # 1³ convolutions are linear layers with us
            state[ours] = tensor.flatten(1) if tensor.shape[2:] == (1, 1, 1) else tensor
    if tables:
        state["rel_pos_bias"] = torch.stack([tables[i] for i in range(len(tables))])
    return state


def convvit_unetr_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """MiM's fine-tuning network → `ConvViTUNETR`."""
    backbone = {k.removeprefix("backbone."): v for k, v in theirs.items() if k.startswith("backbone.")}
    state = {f"encoder.{k}": v for k, v in convvit_state(backbone).items()}
    for name, tensor in theirs.items():
        if name.startswith("backbone.fpn."):
            state[name.replace("backbone.fpn", "bottleneck")] = tensor
        elif not name.startswith("backbone."):
            state |= _decoder(name, tensor, CONVVIT_UNETR_STAGES)
    return state


def _convvit_name(name: str) -> str | None:
    if name == "pos_embed" or name.startswith("norm."):
        return name
    if m := re.fullmatch(r"patch_embed([123])\.(.+)", name):
        return f"stages.{int(m[1]) - 1}.embed.{m[2]}"
    if m := re.fullmatch(r"blocks([123])\.(\d+)\.(.+)", name):
        rest = ".".join(CONV_BLOCK_NAMES.get(p, p) for p in m[3].split("."))
        return f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{rest}"
    if m := re.fullmatch(r"stage([123])_output_decode\.(.+)", name):
        return f"fusions.{int(m[1]) - 1}.proj.{m[2]}"
    if m := re.fullmatch(r"blocks4\.(\d+)\.(gamma_[12])", name):
        return f"blocks.{m[1]}.{CONV_BLOCK_NAMES[m[2]]}"
    for theirs, ours in (("patch_embed4.", "embed."), ("patch_embed5.", "embed_linear."), ("blocks4.", "blocks.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def mim_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What an EncoderSpec is made of, from the config of a MiM fixture."""
    (*stem_dims, embed_dim), (*stem_depths, depth) = config["embed"][:4], config["depth"]
    return {
        "kind": "convvit",
        "img_size": config["roi"] if "roi" in config else config["img_size"],
        "patch_size": (16, 16, 16),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": config["heads"],
        "stem_dims": stem_dims,
        "stem_depths": stem_depths,
    }


def _decoder(name: str, tensor: Tensor, stages: dict[str, str]) -> dict[str, Tensor]:
    """dynamic-network-architectures registers every convolution of a block twice, so those get two names."""
    stage, *rest, leaf = name.split(".")
    if stage == "out":
        return {f"head.{leaf}": tensor}
    ours = stages[stage]
    if rest[0] == "transp_conv_init":
        return {f"{ours}.0.{leaf}": tensor}
    if rest[0] in ("transp_conv", "conv3d"):
        return {f"{ours}.up.{leaf}": tensor}
    if rest[0] == "blocks":
        layer = 1 + 2 * int(rest[1]) + int(rest[2])
        if rest[2] == "0":
            return {f"{ours}.{layer}.{leaf}": tensor}
        block, conv = f"{ours}.{layer}", rest[3]
    else:
        block, conv = ours if rest[0] == "layer" else f"{ours}.block", rest[1]
    return {f"{block}.{CONVS[conv]}.{inner}.{leaf}": tensor for inner in ("conv", "all_modules.0")}


def outputs(network: nn.Module, x: Tensor, stages: dict[str, str], *more: Tensor) -> dict[str, Tensor]:
    """What each stage puts out, by the authors' name, and the network's output as "logits"; `more` go in after x."""
    seen = {}
    hooks = [
        network.get_submodule(ours).register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
        for key, ours in stages.items()
    ]
    with torch.no_grad():
        seen["logits"] = network(x, *more)
    for hook in hooks:
        hook.remove()
    return seen


def block_outputs(encoder: nn.Module, x: Tensor, *more: Tensor) -> list[Tensor]:
    """What every transformer block puts out, in order."""
    names = [f"blocks.{i}" for i in range(len(encoder.blocks))]
    seen = outputs(encoder, x, {name: name for name in names}, *more)
    return [seen[name] for name in names]


def statistics(x: Tensor) -> Tensor:
    """(1, C, …) → (C, 4): mean, unbiased standard deviation, minimum, maximum per channel."""
    x = x[0].flatten(1).double()
    return torch.stack([x.mean(1), x.std(1), x.amin(1), x.amax(1)], dim=1).float()
