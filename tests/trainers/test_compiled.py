"""What nnU-Net does where `nnUNet_compile` asks for it: torch.compile of the whole network, trained."""

import copy

import pytest
import torch

from nnunetv2_hiendmae.architectures import ConvViTUNETR, ViTUNETR

NETWORKS = {
    ViTUNETR: {"img_size": (16,) * 3, "patch_size": (8,) * 3, "depth": 4},
    ConvViTUNETR: {
        "img_size": (32, 32, 64),
        "patch_size": (16,) * 3,
        "depth": 2,
        "kind": "convvit",
        "cls_token": False,
        "taps": (),
        "stem_dims": (4, 4, 8),
        "stem_depths": (1, 1, 1),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("network", [ViTUNETR, ConvViTUNETR])
def test_a_compiled_network_trains_the_same(network):
    """nnU-Net compiles on GPUs only. Forward and backward are traced as there, but no kernels are made: that takes
    minutes on a CPU."""
    torch.manual_seed(0)
    fields = NETWORKS[network]
    plain = network(1, 3, decoder_width=4, embed_dim=24, num_heads=2, **fields)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager")
    x = torch.rand(2, 1, *fields["img_size"])
    target = torch.randint(3, (2, *fields["img_size"]))
    losses = [torch.nn.functional.cross_entropy(model(x), target) for model in (plain, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-5)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
