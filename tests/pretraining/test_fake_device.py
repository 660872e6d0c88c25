"""What would fail on a GPU where there is none: tensors that hold no numbers, but say that they lie on "cuda", and that
no operation mixes with others (torch's FakeTensorMode)."""

from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from run_data import TINY_SPEC
from test_methods import NoiseVolume, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import ENCODERS, PRESETS
from nnunetv2_hiendmae.optim import adamw, parameter_groups
from nnunetv2_hiendmae.pretraining import METHODS, masked, swinpretexts
from nnunetv2_hiendmae.training.batches import Boxes, collate
from nnunetv2_hiendmae.training.views import unresized

GPU = torch.device("cuda", 0)
SPECS = {
    "vit": TINY_SPEC,
    "convvit": PRESETS["convvit_tiny"].with_(depth=1, stem_depths=(1, 1, 1)),
    "primus": PRESETS["primus_nano"],
}
SPECS = {kind: spec.with_(img_size=(32,) * 3) for kind, spec in SPECS.items()}
# each kind of encoder once: of these methods, the others have a plain one
KINDS = {"mim": "convvit", "glmae": "primus"}


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors may lie on "cuda", with its half precision."""
    # which kernel of attention, torch asks the GPU itself; turns are numbers
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    monkeypatch.setattr(swinpretexts, "turn", lambda images, turns: images)
    monkeypatch.setattr(NoiseVolume, "shape", (64,) * 3)
    monkeypatch.setattr(NoiseVolume, "read_stored", lambda *args: torch.from_numpy(NoiseVolume.read(*args)), False)
    masked._fixed_positions.cache_clear()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield FakeTensorMode()
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()
    masked._fixed_positions.cache_clear()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    weights = q @ k.mT
    return (weights if attn_mask is None else weights + attn_mask).softmax(-1).to(v.dtype) @ v


def move(network: nn.Module, to_gpu: Callable[[Tensor], Tensor]) -> None:
    """What `to` moves: parameters and buffers, no other tensors."""
    for module in network.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(to_gpu(tensor).detach(), tensor.requires_grad)
        for name, tensor in module._buffers.items():
            module._buffers[name] = None if tensor is None else to_gpu(tensor)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_mixes_no_devices(gpu, name):
    method = build(name, SPECS[KINDS.get(name, "vit")])
    views = unresized(method.views())
    drawn = collate([views.draw(NoiseVolume(1, seed), np.random.default_rng(seed)) for seed in range(2)])

    def to_gpu(tensor: Tensor) -> Tensor:
        with gpu:
            return gpu.from_tensor(tensor).to(GPU)

    # outside: arrays that share memory are real until they move
    batch = {k: v._each(to_gpu) if isinstance(v, Boxes) else to_gpu(v) for k, v in drawn.items()}
    with gpu:
        move(method, to_gpu)
        for part in range(method.num_parts):
            losses = method(batch, part)
            assert {v.device for v in losses.values()} == {GPU}
        method.synchronize(torch.clone)
        method.after_step(0.5)


@pytest.mark.parametrize("kind", SPECS)
def test_segmentation_networks_mix_no_devices(gpu, kind):
    encoder = ENCODERS[kind]
    fields = SPECS[kind].with_(img_size=(64,) * 3, **encoder.finetuning).to_dict()
    channels, image = fields.pop("in_channels"), torch.zeros(2, 1, 64, 64, 64)
    for name in (encoder.network, *encoder.own_networks.values()):
        network = resolve_name(name)(channels, 3, **fields)
        with gpu:
            move(network, lambda tensor: gpu.from_tensor(tensor).to(GPU))
            logits = network(gpu.from_tensor(image).to(GPU))
            assert logits.device == GPU and logits.shape == (2, 3, 64, 64, 64)
            # backward passes want a GPU that is there, an optimizer does not
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            adamw(parameter_groups(network, 0.05), 1e-3).step()
