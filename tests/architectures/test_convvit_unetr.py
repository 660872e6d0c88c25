"""ConvViTUNETR: parity with MiM's fine-tuning network, crops, nnU-Net's way of building it."""

import json

import pytest
import torch
from authors_names import CONVVIT_UNETR_STAGES, convvit_unetr_state, mim_sizes, outputs, statistics
from fixtures_util import Fixture
from network_checks import check_bfloat16, check_channels_last, devices, without_gradient
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_hiendmae.architectures import PRESETS, ConvViTUNETR
from nnunetv2_hiendmae.optim import parameter_groups

CLASS_NAME = "nnunetv2_hiendmae.architectures.convvit_unetr.ConvViTUNETR"
TINY = {
    "kind": "convvit",
    "img_size": (32, 32, 64),
    "patch_size": (16, 16, 16),
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "stem_dims": (2, 4, 6),
    "stem_depths": (1, 1, 1),
    "pos_embed": "learned",
}


def tiny(channels=1, **changes):
    torch.manual_seed(0)
    return ConvViTUNETR(channels, 3, **{"decoder_width": 3, **TINY, **changes})


# ---- parity -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mim_finetune", "mim_finetune_interp"])
def finetune(request):
    """The fixture, our network with its weights, and what every stage of ours puts out."""
    fixture = Fixture(request.param)
    config = fixture.meta["config"]
    sizes = mim_sizes(config)
    network = ConvViTUNETR(1, config["out_channels"], decoder_width=config["feature_size"], **sizes).eval()
    network.load_state_dict(convvit_unetr_state(fixture.finetune_state()))
    return fixture, network, outputs(network, fixture.image, CONVVIT_UNETR_STAGES)


def thinned(x):
    """Every fourth voxel of what is recorded only in part."""
    return x[..., ::4, ::4, ::4] if x.numel() > 40_000 else x


def test_feature_maps_equal_the_authors(finetune):
    fixture, network, _ = finetune
    with torch.no_grad():
        normed = network.normed_maps(fixture.image)
        raw = network.encoder.feature_maps(fixture.image)
        raw.append(network.bottleneck(raw[-1]))
    assert len(normed) == len(raw) == 5
    for i, ours in enumerate(normed):
        fixture.check(f"feat{i}_stats", statistics(ours))
        fixture.check(f"feat{i}", thinned(ours))
    for i in range(3):
        fixture.check(f"raw_feat{i}_stats", statistics(raw[i]))
    for i in (3, 4):
        fixture.check(f"raw_feat{i}", raw[i])


@pytest.mark.parametrize("stage", CONVVIT_UNETR_STAGES)
def test_every_decoder_stage_equals_the_authors(finetune, stage):
    fixture, _, seen = finetune
    fixture.check(f"{stage}_stats", statistics(seen[stage]))


def test_logits_equal_the_authors(finetune):
    fixture, _, seen = finetune
    logits = seen["logits"]
    fixture.check("logits_sub4", logits[..., ::4, ::4, ::4])
    fixture.check("logits_mid_plane", logits[:, :, logits.shape[2] // 2])
    fixture.check("logits_stats", statistics(logits))


# ---- behaviour --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_width", [2, 3])
def test_gradient_reaches_every_parameter(decoder_width):
    """Decoder as wide as the stages (no projections) and not."""
    network = tiny(channels=2, decoder_width=decoder_width)
    logits = network(torch.randn(2, 2, 32, 32, 64))
    assert logits.shape == (2, 3, 32, 32, 64)
    logits.square().mean().backward()
    # a batch norm follows, which takes any constant out
    assert without_gradient(network) in ([], ["bottleneck.0.bias"])


def test_another_crop_than_the_specs():
    network = tiny().eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 64, 32, 32)).shape == (1, 3, 64, 32, 32)
        with pytest.raises(ValueError, match=r"crop \(64, 48, 32\): every axis must be a multiple of 32"):
            network(torch.randn(1, 1, 64, 48, 32))
        with pytest.raises(ValueError, match="one voxel at the bottleneck"):
            network(torch.randn(1, 1, 32, 32, 32))


def test_the_default_decoder_is_as_wide_as_the_base_encoder():
    spec = PRESETS["convvit_base"].to_dict()
    del spec["in_channels"]
    with torch.device("meta"):
        network = ConvViTUNETR(1, 3, **spec)
    assert network.head.in_channels == 48
    assert not [name for name in network.skips.state_dict() if ".skip." in name]  # nothing to project


# ---- nnU-Net's way of building it -------------------------------------------------------------------------------


def build_from_plans(channels=1, deep_supervision=False, **changes):
    # plans are JSON: tuples arrive as lists
    arch_kwargs = json.loads(json.dumps({"decoder_width": 3, **TINY, **changes}))
    return get_network_from_plans(CLASS_NAME, arch_kwargs, [], channels, 3, True, deep_supervision)


def test_nnunet_builds_it_from_plans():
    network = build_from_plans(channels=2, drop_path_rate=0.2)
    assert isinstance(network, ConvViTUNETR)
    assert network.spec.dense
    assert network.spec.in_channels == 2
    assert network.spec.stem_dims == (2, 4, 6)
    assert network.encoder.spec is network.spec
    assert network.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_described_encoder_of_pretraining_becomes_dense():
    assert build_from_plans(dense=False).spec.dense


def test_the_bottleneck_is_synchronised_as_nnunet_does_it():
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(tiny())
    assert isinstance(network.bottleneck[1], torch.nn.SyncBatchNorm)


def test_refuses_what_it_is_not():
    with pytest.raises(ValueError, match=r"one output.*-tr nnUNetTrainer_MiM"):
        build_from_plans(deep_supervision=True)
    with pytest.raises(ValueError, match="kind 'convvit', got 'vit'"):
        build_from_plans(kind="vit", stem_dims=(), stem_depths=())
    with pytest.raises(ValueError, match=r"crop \(32, 48, 64\): every axis must be a multiple of 32"):
        build_from_plans(img_size=(32, 48, 64))
    with pytest.raises(ValueError, match=r"feature_size.*got 3"):
        build_from_plans(feature_size=3)


# ---- memory format, precision, compilation ----------------------------------------------------------------------


def test_channels_last_changes_nothing():
    check_channels_last(tiny(), torch.randn(1, 1, 32, 32, 64))


@devices
def test_bfloat16_autocast(device):
    # no stage of two slices: PyTorch's gradients of these are wrong on some CPUs, see findings/
    size = (96, 32, 32)
    network = tiny(img_size=size).to(device).eval()
    torch.nn.init.normal_(network.encoder.rel_pos_bias)
    check_bfloat16(network, torch.randn(1, 1, *size, device=device))


def test_layer_decay_spares_what_pretraining_has_not():
    network = tiny()
    groups = parameter_groups(network, 0.05, layer_decay=0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    depth = TINY["depth"]
    for name, parameter in network.named_parameters():
        if name.startswith("encoder.blocks."):
            # the last block is one layer below the decoder
            expected = 0.5 ** (depth - int(name.split(".")[2]))
        elif name.startswith("encoder.") and name != "encoder.rel_pos_bias":
            expected = 0.5 ** (depth + 1)
        else:
            expected = 1.0
        assert scales[id(parameter)] == pytest.approx(expected), name
    assert decays[id(network.encoder.rel_pos_bias)] == decays[id(network.encoder.pos_embed)] == 0


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    network = tiny().eval()
    x = torch.randn(1, 1, 32, 32, 64)
    # inductor takes half a minute for this network; it is tried on ViTUNETR
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), atol=1e-5, rtol=1e-5)
