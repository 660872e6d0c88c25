"""The depth-wise convolution: PyTorch's outputs to the bit, its gradients but for rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.depthwise import SLAB, DepthwiseConv3d

CHANNELS, KERNEL = 6, 5


def gradients(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, compute) -> list[torch.Tensor]:
    """Output, and gradients of x, weight and bias for one that differs from voxel to voxel."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = compute(*leaves)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape))]


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    layer = DepthwiseConv3d(CHANNELS, KERNEL)
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)


def stock(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv3d(x, weight, bias, padding=KERNEL // 2, groups=CHANNELS)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 7, 5), (SLAB, 4, 4), (2 * SLAB + 1, 3, 2), (1, 1, 1)])
def test_gradients_are_those_of_pytorch(size, batch, channels_last):
    torch.manual_seed(0)
    x = torch.randn(batch, *size, CHANNELS).movedim(-1, 1)
    values = x if channels_last else x.contiguous(), torch.randn(CHANNELS, 1, *3 * [KERNEL]), torch.randn(CHANNELS)
    (out, *found), (expected, *known) = gradients(*values, ours), gradients(*values, stock)
    assert torch.equal(out, expected)
    for ours_, theirs in zip(found, known, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)


def test_frozen_and_inputs_without_gradient():
    layer = DepthwiseConv3d(CHANNELS, KERNEL)
    out = layer(torch.randn(1, CHANNELS, 6, 6, 6))
    # where PyTorch has such kernels at all
    assert ("Depthwise" in out.grad_fn.name()) == torch.backends.mkldnn.is_available()
    out.sum().backward()
    assert layer.weight.grad is not None
    x = torch.randn(1, CHANNELS, 6, 6, 6, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_pytorchs(dtype):
    layer = DepthwiseConv3d(CHANNELS, KERNEL).to(dtype)
    x = torch.randn(1, CHANNELS, 6, 6, 6).to(dtype)
    plain = nn.Conv3d.forward(layer, x)
    assert torch.equal(layer(x), plain) and plain.grad_fn.name() == layer(x).grad_fn.name()


def test_autocast_computes_in_its_precision():
    layer, x = DepthwiseConv3d(CHANNELS, KERNEL), torch.randn(1, CHANNELS, 6, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
