"""What pretraining and fine-tuning share of their optimisation."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer

# docs/methods.md, "Shared building blocks"; timm itself leaves one-dimensional tensors, biases and norms, without decay
NO_DECAY = ("cls_token", "mask_token", "register_tokens", "pos_embed", "rel_pos_bias")
# with AdamW in one kernel; PyTorch's default, a loop, takes a third of a step on a CPU
FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: without and with weight decay, per layer where `layer_decay` is not 1.

    Args:
        layer_decay: factor of the learning rate per layer below the top, as "lr_scale" of each group; the module says
            by `group_matcher` (timm) what its layers are.
    """
    exempt = [name for name, _ in module.named_parameters() if name.rpartition(".")[2] in NO_DECAY]
    if layer_decay == 1:
        return param_groups_weight_decay(module, weight_decay, no_weight_decay_list=exempt)
    groups = param_groups_layer_decay(module, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    # the full rate first: nnU-Net logs that of the first group
    return sorted(groups, key=lambda group: -group["lr_scale"])


def split_groups(
    groups: Sequence[dict[str, Any]], inner: Iterable[nn.Parameter], lr_scale: float, start: int
) -> list[dict[str, Any]]:
    """The groups, none of which has both `inner` and other parameters.

    Args:
        lr_scale: factor of the learning rate of inner ones, in "lr_scale" of their groups, over what is there already.
        start: "start" of their groups, the epoch from which they learn.
    """
    inside, split = set(inner), []
    for group in groups:
        others = [p for p in group["params"] if p not in inside]
        own = {"lr_scale": group.get("lr_scale", 1.0) * lr_scale, "start": start}
        split.append({**group, "params": others})
        split.append({**group, **own, "params": [p for p in group["params"] if p in inside]})
    # the full rate first: nnU-Net logs that of the first group
    return sorted(filter(lambda g: g["params"], split), key=lambda g: (-g.get("lr_scale", 1.0), g.get("start", 0)))


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> AdamW:
    """AdamW over parameter groups, in one kernel where the parameters allow it; states that other builds saved load."""
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters)
    optimizer = AdamW(groups, lr=lr, betas=betas, fused=fused)

    def keep_kernel(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # how the step is computed is saved with the hyperparameters, and would come back with them
        return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    return optimizer


def warmup_cosine(position: float, warmup: float, total: float) -> float:
    """Factor of the peak learning rate at `position` (steps or epochs, same unit for all three).

    Rises linearly to 1 at `warmup`, then falls as half a cosine to 0 at `total`.
    """
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (position - warmup) / max(total - warmup, 1e-9))))
