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


# the second time is another trace
FROZEN = {ViTUNETR: (True, False), ConvViTUNETR: (False,)}


@pytest.mark.slow
@pytest.mark.parametrize("network", [ViTUNETR, ConvViTUNETR])
def test_a_compiled_network_trains_the_same(network):
    """nnU-Net compiles on GPUs only. Forward and backward are traced as there, but no kernels are made: that takes
    minutes on a CPU. In one case the encoder is frozen at first, and then released."""
    torch.manual_seed(0)
    fields = NETWORKS[network]
    plain = network(1, 3, decoder_width=4, embed_dim=24, num_heads=2, **fields)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager")
    x = torch.rand(2, 1, *fields["img_size"])
    target = torch.randint(3, (2, *fields["img_size"]))
    for frozen in FROZEN[network]:
        for model in (plain, other):
            model.encoder.train(not frozen).requires_grad_(not frozen)
            model.zero_grad()
        losses = [torch.nn.functional.cross_entropy(model(x), target) for model in (plain, compiled)]
        assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-5)
        for loss in losses:
            loss.backward()
        for (name, ours), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            assert not frozen or (theirs.grad is None) == name.startswith("encoder."), name
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
