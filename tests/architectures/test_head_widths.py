"""Attention with heads of any width: padded where a fused kernel needs it."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnunetv2_hiendmae.architectures import layers

HEADS = 2
widths = pytest.mark.parametrize("width", [8, 12, 33])
masked = pytest.mark.parametrize("with_mask", [False, True])


def inputs(width: int, with_mask: bool, **where) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, n, width, requires_grad=True, **where) for n in (9, 7, 7))
    return [q, k, v], torch.randn(1, HEADS, 9, 7, **where) if with_mask else None


@pytest.fixture
def padded(monkeypatch):
    """As on a device whose kernels want multiples of 8; the widths that the kernel got."""
    got, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(layers, "ANY_WIDTH_DEVICES", ())
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: got.append(q.shape[-1]) or kernel(q, *a, **k)
    )
    return got


@widths
@masked
def test_padding_changes_nothing(padded, width, with_mask):
    qkv, mask = inputs(width, with_mask)
    expected = (qkv[0] @ qkv[1].mT / width**0.5 + (0 if mask is None else mask)).softmax(-1) @ qkv[2]
    ours, values = layers.attend(*qkv, mask), torch.randn(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(out, qkv, values) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert padded == [width + -width % 8]


@widths
@masked
def test_self_attention_is_timms(padded, monkeypatch, width, with_mask):
    torch.manual_seed(0)
    stock = Attention(HEADS * width, HEADS, qkv_bias=True)
    ours, x = layers.FusedAttention.of(stock), torch.randn(2, 9, HEADS * width)
    mask = {"attn_mask": torch.randn(1, HEADS, 9, 9)} if with_mask else {}
    assert list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(ours(x, **mask), stock(x, **mask), rtol=1e-6, atol=1e-6)
    assert padded == [width + -width % 8, width]
    # on the CPU to the bit
    monkeypatch.undo()
    assert torch.equal(ours(x, **mask), stock(x, **mask))


def test_blocks_are_initialised_as_timms():
    """The same random numbers: a seed gives the weights that it gave before."""
    torch.manual_seed(0)
    ours = layers.transformer_block(24, HEADS, 4.0, 1e-6)
    torch.manual_seed(0)
    stock = layers.Block(24, HEADS, 4.0, qkv_bias=True, norm_layer=nn.LayerNorm)
    assert isinstance(ours.attn, layers.FusedAttention)
    for (name, a), (other, b) in zip(ours.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@widths
@masked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_a_fused_kernel(width, with_mask, dtype):
    qkv, mask = inputs(width, with_mask, device="cuda", dtype=dtype)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        layers.attend(*qkv, mask).sum().backward()
