"""Attention weights of transformer blocks, computed from the blocks' own weights and inputs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.tokens import split_shuffle
from nnunetv2_hiendmae.pretraining.hiendmae import CrossAttention, HiEndMAE


def self_attention(layer: nn.Module, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d + bias) of one of timm's attention layers, whether or not it runs fused.

    Args:
        tokens: (B, N, E), what the layer is given: after the block's norm.
        bias: added to the logits (relative positions), broadcast to (B, heads, N, N).

    Returns:
        (B, heads, N, N) float32: row i is what token i attends to, its sum is one.
    """
    q, k, _ = layer.qkv(tokens).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return _weights(layer.q_norm(q), layer.k_norm(k), bias)


def cross_attention(layer: CrossAttention, queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d) of a cross-attention layer: queries (B, N, F), keys (B, M, F) → (B, heads, N, M) float32."""
    q = layer.q(queries).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    k, _ = layer.kv(keys).unflatten(2, (2, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return _weights(q, k)


@torch.no_grad()
def encoder_attention(encoder: nn.Module, image: Tensor, blocks: Sequence[int], query: int | None) -> list[Tensor]:
    """Self-attention of one token in some of an encoder's blocks, all tokens visible.

    Args:
        image: (1, C, D, H, W) of any size the encoder takes.
        blocks: 0-based.
        query: token in raster numbering; None: the CLS token.

    Returns:
        Per block (heads, [1+]N), CLS first if there is one; every row sums to one.
    """
    row = 0 if query is None else encoder.num_prefix_tokens + query
    layers = [encoder.blocks[i].attn for i in blocks]
    with _recording(layers) as calls:
        # what fine-tuning runs: it works for every kind of encoder
        encoder.feature_maps(image)
    return [self_attention(layer, *calls[layer])[0, :, row] for layer in layers]


@torch.no_grad()
def decoder_cross_attention(
    method: HiEndMAE, image: Tensor, ids_shuffle: Tensor, blocks: Sequence[int], query: int | None
) -> list[Tensor]:
    """What a token of Hi-End-MAE's decoder attends to in the encoder's layers.

    Args:
        image: (1, C, D, H, W) of the encoder's size.
        ids_shuffle: (1, N) token permutation, visible tokens first.
        blocks: 0-based cross blocks; block i reads tap −1−i, the deepest first.
        query: token in raster numbering, visible or masked; None: the CLS token.

    Returns:
        Per block (heads, [1+]N) in raster order, CLS first if there is one: zero at masked tokens, which the encoder
        has not seen; every row sums to one.
    """
    prefix = method.encoder.num_prefix_tokens
    keep, _ = split_shuffle(ids_shuffle, method.visible)
    row = 0 if query is None else prefix + int((ids_shuffle[0] == query).nonzero())
    layers = [method.cross_blocks[i].cross_attn for i in blocks]
    with _recording(layers) as calls:
        method.predict(image, ids_shuffle)
    rows = []
    for layer in layers:
        weights = cross_attention(layer, *calls[layer])[0, :, row]
        spread = weights.new_zeros(len(weights), prefix + ids_shuffle.shape[1])
        spread[:, :prefix] = weights[:, :prefix]
        spread[:, prefix + keep[0]] = weights[:, prefix:]
        rows.append(spread)
    return rows


def _weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5
    return (logits if bias is None else logits + bias).softmax(dim=-1)


@contextmanager
def _recording(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, ...]]]:
    """Arguments of each layer's last call, in order; keyword arguments that are not None come last."""
    calls: dict[nn.Module, tuple[Any, ...]] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = (*args, *(v for v in kwargs.values() if v is not None))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
