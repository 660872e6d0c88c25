"""What holds for every segmentation network."""

import pytest
import torch
from torch import Tensor, nn

cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", cuda])


def check_channels_last(network: nn.Module, x: Tensor) -> None:
    network.eval()
    with torch.no_grad():
        expected = network(x)
        network = network.to(memory_format=torch.channels_last_3d)
        ours = network(x.to(memory_format=torch.channels_last_3d))
    # other kernels, other summation order: float32 rounding through some twenty layers
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def check_bfloat16(network: nn.Module, x: Tensor) -> None:
    expected = network(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        logits = network(x)
    # bfloat16 has 8 bits of mantissa; on average over the volume a few roundings remain
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def without_gradient(network: nn.Module) -> list[str]:
    """Trainable tensors whose gradient is missing, zero or not finite."""
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return [name for name, grad in trained.items() if grad is None or not grad.isfinite().all() or not grad.any()]
