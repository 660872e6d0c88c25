"""What pretraining and fine-tuning share of their optimisation."""

import math
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

# docs/methods.md, "Shared building blocks"; timm itself leaves one-dimensional tensors, biases and norms, without decay
NO_DECAY = ("cls_token", "mask_token", "register_tokens", "pos_embed", "rel_pos_bias")


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


def warmup_cosine(position: float, warmup: float, total: float) -> float:
    """Factor of the peak learning rate at `position` (steps or epochs, same unit for all three).

    Rises linearly to 1 at `warmup`, then falls as half a cosine to 0 at `total`.
    """
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (position - warmup) / max(total - warmup, 1e-9))))
