"""Depth-wise convolution whose gradients are as fast as itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# slices of the map whose share of the weight's gradient is taken at once: fewest lost bits, and the fastest
SLAB = 4


class DepthwiseConv3d(nn.Conv3d):
    """Convolution (B, C, D, H, W) → the same, each channel with a kernel of its own, odd and padded to "same".

    On a CPU the forward pass of PyTorch (oneDNN) is 10 to 30 times as fast as either of its gradients, which were a
    quarter of MiM's step. Both are such convolutions themselves: the gradient's with the flipped kernel, and the
    input's with the gradient as kernel. Other devices and precisions compute as PyTorch does.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        # a plain convolution where there is no such gap, and for the compiler, which knows its gradients
        plain = torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available() or x.device.type != "cpu"
        if plain or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.bias)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _convolve(grad, weight.flip(2, 3, 4)) if need_x else None,
            _weight_gradient(x, grad, weight) if need_weight else None,
            grad.sum((0, 2, 3, 4)) if need_bias else None,
        )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=len(weight))


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    channels, (edge, *rest) = len(weight), [k // 2 for k in weight.shape[2:]]
    x, total = F.pad(x, (0, 0, 0, 0, edge, edge)), torch.zeros_like(weight)
    for image, of_image in zip(x, grad, strict=True):
        for start, slab in zip(range(0, grad.shape[2], SLAB), of_image.split(SLAB, dim=1), strict=True):
            window = image[None, :, start : start + slab.shape[1] + 2 * edge]
            total += F.conv3d(window, slab[:, None], padding=(0, *rest), groups=channels).transpose(0, 1)
    return total
