"""ViTUNETR: parity with the authors' fine-tuning network, any patch, nnU-Net's way of building it."""

import copy
import json
import math

import pytest
import torch
from authors_names import UNETR_STAGES, block_outputs, outputs, statistics, unetr_state
from fixtures_util import Fixture
from network_checks import check_bfloat16, check_channels_last, devices, without_gradient
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_hiendmae.architectures import ViTUNETR, build_encoder
from nnunetv2_hiendmae.architectures.unetr import upsampling_factors

CLASS_NAME = "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"
TINY = {"embed_dim": 12, "depth": 4, "num_heads": 2, "cls_token": False, "pos_embed": "learned"}


def tiny(patch_size, img_size, channels=1, **changes):
    torch.manual_seed(0)
    kwargs = {"decoder_width": 4, "patch_size": patch_size, "img_size": img_size, **TINY, **changes}
    return ViTUNETR(channels, 3, **kwargs)


# ---- parity -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetune():
    """The fixture, our network with its weights, and what every stage of ours puts out."""
    fixture = Fixture("hiendmae_finetune")
    network = ViTUNETR(
        1,
        3,
        decoder_width=4,
        img_size=(96, 96, 96),
        patch_size=(12, 12, 12),
        embed_dim=18,
        depth=12,
        num_heads=3,
        cls_token=False,
        pos_embed="learned",
        norm_eps=1e-5,
    )
    network.load_state_dict(unetr_state(fixture.finetune_state()))
    return fixture, network, outputs(network, fixture.image, UNETR_STAGES)


def test_encoder_equals_the_authors_fine_tuning_vit(finetune):
    fixture, network, _ = finetune
    with torch.no_grad():
        out, taps = network.encoder(fixture.image)
    fixture.check("vit_out", out)
    blocks = block_outputs(network.encoder, fixture.image)
    for recorded, block in zip(fixture["vit_hidden"], blocks, strict=True):
        fixture.check("vit_hidden", block, recorded)
    for layer, tap in zip((3, 6, 9), taps, strict=True):
        fixture.check("vit_hidden", tap, fixture["vit_hidden"][layer])


def test_the_fixture_notices_the_epsilon_of_layer_norm(finetune):
    """Guards the guard: with pretraining's 1e-6 the output leaves the tolerance by far."""
    fixture, network, _ = finetune
    encoder = build_encoder(network.spec.with_(norm_eps=1e-6))
    encoder.load_state_dict(network.encoder.state_dict())
    with torch.no_grad():
        out, _ = encoder(fixture.image)
    assert (out - fixture["vit_out"]).abs().max() > 100 * fixture.tolerance("vit_out")


@pytest.mark.parametrize("stage", UNETR_STAGES)
def test_every_decoder_stage_equals_the_authors(finetune, stage):
    fixture, _, seen = finetune
    out = seen[stage]
    step = out.shape[2] // 8
    fixture.check(f"{stage}_sub", out[..., ::step, ::step, ::step])
    fixture.check(f"{stage}_stats", statistics(out))


def test_logits_equal_the_authors(finetune):
    fixture, _, seen = finetune
    logits = seen["logits"]
    assert logits.shape == (1, 3, 96, 96, 96)
    fixture.check("logits_sub4", logits[..., ::4, ::4, ::4])
    fixture.check("logits_plane47", logits[:, :, 47])
    fixture.check("logits_stats", statistics(logits))


def test_equals_the_authors_glmae_network():
    """Another crop than the checkpoint's, not a cube, and pretraining's epsilon."""
    fixture = Fixture("glmae_unetr")
    config = fixture.meta["config"]
    network = ViTUNETR(
        1,
        config["out_channels"],
        decoder_width=config["feature_size"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed"],
        depth=config["depth"],
        num_heads=config["heads"],
        cls_token=False,
        norm_eps=config["ln_eps"],
    )
    network.load_state_dict(unetr_state(fixture.finetune_state()))
    with torch.no_grad():
        out, taps = network.encoder(fixture.image)
        logits = network(fixture.image)
    fixture.check("vit_out", out)
    fixture.check("vit_skips", torch.stack(taps))
    fixture.check("logits", logits)


# ---- any patch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch_size", "early", "last"),
    [
        ((16, 16, 16), [(2, 2, 2)] * 3, (2, 2, 2)),
        ((4, 8, 8), [(1, 1, 1), (1, 2, 2), (2, 2, 2)], (2, 2, 2)),
        ((1, 2, 4), [(1, 1, 1), (1, 1, 1), (1, 1, 2)], (1, 2, 2)),
        ((16, 32, 64), [(2, 2, 2)] * 3, (2, 4, 8)),
        ((12, 12, 12), [(2, 2, 2)] * 3, None),
        ((6, 16, 1), [(1, 2, 1), (2, 2, 1), (2, 2, 1)], None),
        ((3, 24, 5), [(1, 2, 1), (1, 2, 2), (2, 2, 2)], None),
    ],
)
def test_upsampling_factors(patch_size, early, last):
    assert upsampling_factors(patch_size) == (early, last)


# (patch, crop)
PATCHES = [
    ((16, 16, 16), (32, 16, 32)),
    ((4, 8, 8), (8, 16, 24)),
    ((12, 12, 12), (24, 12, 24)),
    ((1, 8, 8), (3, 16, 16)),
    ((3, 12, 6), (6, 24, 12)),
    ((2, 32, 16), (4, 32, 32)),
]


@pytest.mark.parametrize(("patch_size", "crop"), PATCHES)
def test_any_patch_gives_logits_of_the_crop_and_a_gradient_to_every_parameter(patch_size, crop):
    network = tiny(patch_size, crop, channels=2)
    logits = network(torch.randn(2, 2, *crop))
    assert logits.shape == (2, 3, *crop)
    logits.square().mean().backward()
    assert without_gradient(network) == []


@pytest.mark.parametrize("patch_size", [(8, 8, 8), (12, 12, 6)])
def test_another_crop_than_the_specs(patch_size):
    network = tiny(patch_size, (24, 24, 24))
    crop = tuple(n * p for n, p in zip((2, 1, 3), patch_size, strict=True))
    assert network(torch.randn(1, 1, *crop)).shape == (1, 3, *crop)
    with pytest.raises(ValueError, match=r"crop \(20, 24, 24\)"):
        network(torch.randn(1, 1, 20, 24, 24))


# ---- nnU-Net's way of building it -------------------------------------------------------------------------------


def build_from_plans(channels=1, deep_supervision=False, **changes):
    arch_kwargs = {"patch_size": (4, 8, 8), "img_size": (16, 32, 32), "decoder_width": 4, **TINY, **changes}
    # plans are JSON: tuples arrive as lists
    arch_kwargs = json.loads(json.dumps(arch_kwargs))
    return get_network_from_plans(CLASS_NAME, arch_kwargs, [], channels, 3, True, deep_supervision)


def test_nnunet_builds_it_from_plans():
    network = build_from_plans(channels=2, taps=[0, 1, 3])
    assert isinstance(network, ViTUNETR)
    assert network.spec.in_channels == 2
    assert network.spec.patch_size == (4, 8, 8)
    assert network.spec.taps == (0, 1, 3)
    assert network.encoder.spec is network.spec


def test_nnunet_leaves_the_encoder_as_the_encoder_was_initialised():
    """nnU-Net applies a network's `initialize` to every module, a convolution-shaped patch embedding included."""
    torch.manual_seed(0)
    network = build_from_plans()
    e, p = TINY["embed_dim"], 4 * 8 * 8
    assert network.encoder.patch_embed.proj.weight.abs().max() <= math.sqrt(6 / (e + p))
    torch.manual_seed(0)
    alone = build_encoder(network.spec)
    for (name, a), b in zip(network.encoder.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_refuses_deep_supervision_and_a_wrong_number_of_taps():
    with pytest.raises(ValueError, match=r"one output.*-tr nnUNetTrainer_Pretrained, nnUNetTrainer_HiEndMAE"):
        build_from_plans(deep_supervision=True)
    with pytest.raises(ValueError, match=r"ViTUNETR .*\(1, 2\)"):
        build_from_plans(taps=[1, 2])
    with pytest.raises(ValueError, match=r"feature_size.*got 3"):
        build_from_plans(feature_size=3)


# ---- memory format, precision, compilation ----------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [(8, 8, 8), (12, 12, 12)])
def test_channels_last_changes_nothing(patch_size):
    check_channels_last(tiny(patch_size, (24, 24, 24)), torch.randn(1, 1, 24, 24, 24))


@devices
def test_bfloat16_autocast(device):
    network = tiny((12, 12, 12), (24, 24, 24)).to(device)
    check_bfloat16(network, torch.randn(1, 1, 24, 24, 24, device=device))


@pytest.mark.slow
@pytest.mark.parametrize(("patch_size", "backend"), [((4, 8, 8), "eager"), ((12, 12, 12), "inductor")])
def test_compiles_without_a_graph_break(patch_size, backend):
    network = tiny(patch_size, (24, 24, 24)).eval()
    x = torch.randn(1, 1, 24, 24, 24)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend=backend)
    with torch.no_grad():
        # fused kernels round differently
        torch.testing.assert_close(compiled(x), network(x), atol=1e-4, rtol=1e-4)
