"""The Primus encoder is the network of dynamic-network-architectures and of nnssl, and more: any crop, any mask."""

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.building_blocks.eva import Eva
from primus_util import FULL_PRIMUS, TINY_PRIMUS, PrimusFixture

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec, PrimusNetwork, ViTUNETR, build_encoder
from nnunetv2_hiendmae.architectures.primus import rotary_table
from nnunetv2_hiendmae.optim import parameter_groups
from nnunetv2_hiendmae.weights import permute_axes

ORDERS = [(2, 1, 0), (1, 2, 0), (1, 0, 2)]


def random_encoder(spec, seed=0, std=0.3):
    torch.manual_seed(seed)
    encoder = build_encoder(spec).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return encoder


def dna_state(state, spec):
    """A Primus of DNA's → ours, without its decoder: written down a second time, beside the package's own."""
    registers, ours = spec.register_tokens, {}
    for name, tensor in state.items():
        if name == "eva.pos_embed":
            ours["pos_embed"] = tensor[:, registers:]
        elif name == "register_tokens":
            ours[name] = tensor + state["eva.pos_embed"][:, :registers]
        elif name.startswith("eva."):
            ours[name.removeprefix("eva.")] = tensor
        elif name.startswith("down_projection."):
            ours[name.replace("down_projection", "patch_embed")] = tensor
    return ours


def dna_network(spec, num_classes=2):
    return Primus(
        spec.in_channels,
        spec.embed_dim,
        spec.patch_size,
        num_classes,
        spec.depth,
        spec.num_heads,
        spec.img_size,
        num_register_tokens=spec.register_tokens,
        init_values=spec.layer_scale,
        scale_attn_inner=spec.inner_norm,
    ).eval()


def whole_network(fixture, tag):
    """A recorded network of DNA's, every block a tap."""
    spec = fixture.spec.with_(taps=(0, 1))
    state = fixture.content(f"checkpoint_{tag}.pth")["network_weights"]
    fields = {k: v for k, v in spec.to_dict().items() if k != "in_channels"}
    network = PrimusNetwork(spec.in_channels, fixture.config["num_classes"], **fields).eval()
    network.encoder.load_state_dict(dna_state(state, spec))
    decoder = {k.removeprefix("up_projection."): v for k, v in state.items() if k.startswith("up_projection.")}
    network.up_projection.load_state_dict(decoder)
    return network


@pytest.mark.parametrize("tag", ["plain", "reg"])
def test_dna_itself(tag):
    """Registers, two channels, a grid of three different sides: blocks, output, logits of the whole network."""
    fixture = PrimusFixture("primus_dna", tag)
    network = whole_network(fixture, tag)
    spec, last = network.spec, []
    network.encoder.blocks[-1].register_forward_hook(lambda _, __, tokens: last.append(tokens))
    with torch.no_grad():
        *blocks, features = network.encoder.feature_maps(fixture.image)
        logits = network(fixture.image)
        if spec.register_tokens:
            fixture.check("registers", network.encoder.norm(last[0])[:, : spec.register_tokens])
    for i, block in enumerate(blocks):
        fixture.check(f"block_{i}", block)
    fixture.check("features", features)
    fixture.check("logits", logits if tag == "plain" else logits[:, :, ::2, 1::2, ::2])


def test_another_crop_is_what_a_network_rebuilt_for_it_gives():
    plain, other = PrimusFixture("primus_dna", "plain"), PrimusFixture("primus_dna", "plain_other")
    network = whole_network(plain, "plain")
    with torch.no_grad():
        features = network.encoder.feature_maps(other.image)[-1]
        positions = network.encoder.positions(other.config["grid"])
        logits = network(other.image)
    other.check("features", features)
    other.check("pos_embed", positions)
    other.check("logits", logits[:, :, ::2, 1::2, ::2])


def test_as_many_tokens_in_another_shape_get_their_own_positions():
    """Where DNA's network runs on with those of the other grid."""
    spec = TINY_PRIMUS.with_(img_size=(16, 24, 32))
    encoder, turned = random_encoder(spec), (32, 24, 16)
    rebuilt = build_encoder(spec.with_(img_size=turned)).eval()
    state = {**encoder.state_dict(), "pos_embed": encoder.positions((4, 3, 2))}
    rebuilt.load_state_dict(state)
    x = torch.randn(1, 1, *turned)
    with torch.no_grad():
        assert torch.equal(encoder(x)[0], rebuilt(x)[0])
        encoder.rotary.copy_(rebuilt.rotary)
        assert not torch.equal(encoder(x.permute(0, 1, 4, 3, 2))[0], rebuilt(x)[0])


def test_the_start_and_the_table_are_evas_own():
    spec = FULL_PRIMUS.with_(img_size=(16, 24, 32))
    eva = Eva(embed_dim=24, depth=1, num_heads=2, ref_feat_shape=spec.grid, mlp_ratio=spec.mlp_ratio)
    assert torch.equal(rotary_table(spec.grid, 12), eva.rope.get_embed())
    torch.manual_seed(3)
    encoder = build_encoder(spec)
    assert 0.01 < encoder.pos_embed.std() < 0.03 and encoder.register_tokens.shape == (1, 2, 24)
    assert (encoder.blocks[0].gamma_1 == 0.1).all() and encoder.blocks[0].attn.norm.eps == 1e-5
    assert "rotary" not in encoder.state_dict()
    # timm's own names and shapes, so that nothing of Eva's is lost
    built = Eva(
        embed_dim=24,
        depth=4,
        num_heads=2,
        ref_feat_shape=spec.grid,
        num_reg_tokens=2,
        init_values=0.1,
        scale_attn_inner=True,
    )
    ours = {k: v.shape for k, v in encoder.state_dict().items() if k.startswith(("blocks.", "norm."))}
    assert ours == {k: v.shape for k, v in built.state_dict().items() if k != "pos_embed"}


@pytest.mark.parametrize("spec", [TINY_PRIMUS, FULL_PRIMUS])
def test_a_masked_pass_is_dnas_of_the_kept_tokens(spec):
    """For every sample its own tokens: as one sample alone, in any order, and all of them as without a mask."""
    spec = spec.with_(img_size=(16, 24, 16))
    encoder, x = random_encoder(spec), torch.randn(2, 1, 16, 24, 16)
    keep = torch.stack([torch.randperm(12)[:5] for _ in x])
    with torch.no_grad():
        tokens, taps = encoder(x, keep)
        assert tokens.shape == (2, 5, 24) and all(tap.shape == tokens.shape for tap in taps)
        for i in range(2):
            torch.testing.assert_close(encoder(x[i : i + 1], keep[i : i + 1])[0], tokens[i : i + 1])
        everything = torch.stack([torch.randperm(12) for _ in x])
        masked, whole = encoder(x, everything)[0], encoder(x)[0]
    expected = whole.gather(1, everything[:, :, None].expand_as(whole))
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_as_large_as_the_heads_keeps_its_tables_apart():
    """A table (B, K, ·) without the axis of heads would run here, sample i's table on head i."""
    spec = TINY_PRIMUS.with_(img_size=(16, 24, 16))
    encoder, x = random_encoder(spec), torch.randn(spec.num_heads, 1, 16, 24, 16)
    keep = torch.stack([torch.randperm(12)[:5] for _ in x])
    with torch.no_grad():
        alone = torch.cat([encoder(x[i : i + 1], keep[i : i + 1])[0] for i in range(len(x))])
        torch.testing.assert_close(encoder(x, keep)[0], alone)


def test_registers_belong_to_no_place_and_no_output():
    encoder = random_encoder(FULL_PRIMUS)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        before = encoder(x)[0]
        encoder.register_tokens.mul_(-1)
        assert before.shape == (1, 8, 24) and not torch.allclose(before, encoder(x)[0])


@pytest.mark.parametrize("network", [ViTUNETR, PrimusNetwork])
def test_networks_give_logits_and_every_tensor_learns(network):
    fields = {k: v for k, v in FULL_PRIMUS.with_(in_channels=2).to_dict().items() if k != "in_channels"}
    built = network(2, 3, decoder_width=4, **fields)
    logits = built(torch.randn(2, 2, 16, 24, 16))
    assert logits.shape == (2, 3, 16, 24, 16)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in built.parameters())


@pytest.mark.parametrize("network", [ViTUNETR, PrimusNetwork])
def test_layers_of_learning_rate_decay(network):
    """Registers and positions learn slowest, the decoder fastest; neither they nor LayerScale decay."""
    fields = {k: v for k, v in FULL_PRIMUS.to_dict().items() if k != "in_channels"}
    built = network(1, 3, decoder_width=4, **fields)
    names = {id(p): name for name, p in built.named_parameters()}
    found = {}
    for group in parameter_groups(built, 0.05, 0.5):
        found |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert found["encoder.register_tokens"] == found["encoder.pos_embed"] == (0.5**5, 0)
    assert found["encoder.patch_embed.proj.weight"] == (0.5**5, 0.05)
    assert found["encoder.blocks.0.gamma_1"] == (0.5**4, 0) and found["encoder.norm.weight"] == (1, 0)
    decoder = [name for name in found if not name.startswith("encoder.") and name.endswith("weight")]
    assert decoder and {found[name][0] for name in decoder} == {1}


def test_the_patch_decoder_wants_powers_of_two():
    fields = {k: v for k, v in TINY_PRIMUS.to_dict().items() if k != "in_channels"}
    with pytest.raises(ValueError, match=r"powers of two.*\(12, 8, 8\)"):
        PrimusNetwork(1, 2, **{**fields, "img_size": (24, 16, 16), "patch_size": (12, 8, 8)})
    with pytest.raises(ValueError, match="kind 'primus', got 'vit'"):
        PrimusNetwork(1, 2, img_size=(16, 16, 16), patch_size=(8, 8, 8), embed_dim=24, depth=4, num_heads=2)
    with pytest.raises(ValueError, match="kind 'vit' or 'primus', got 'convvit'"):
        ViTUNETR(1, 2, **{**fields, "kind": "convvit"})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("whole", [False, True])
def test_permuted_weights_see_a_permuted_volume_as_before(order, whole):
    """Kernels, positions and rotary channels go with the axes; each alone would not do."""
    spec = FULL_PRIMUS.with_(img_size=(16, 24, 16), patch_size=(8, 8, 4))
    if whole:
        fields = {k: v for k, v in spec.to_dict().items() if k != "in_channels"}
        build = lambda s: PrimusNetwork(1, 2, **{**fields, "img_size": s.img_size, "patch_size": s.patch_size})  # noqa: E731
    else:
        build = build_encoder
    torch.manual_seed(0)
    source = build(spec).eval()
    for name, parameter in source.named_parameters():
        # large weights, so that attention is sharp enough for rotary positions to matter
        torch.nn.init.normal_(parameter, std=1.0 if name.endswith("weight") or "gamma" in name else 0.3)
    state, moved = permute_axes(source.state_dict(), spec, order)
    target = build(moved).eval()
    target.load_state_dict(state)
    x = torch.randn(1, 1, *spec.img_size)
    turned = x.permute(0, 1, *(2 + i for i in order))
    back = (0, 1, *(2 + order.index(i) for i in range(3)))
    with torch.no_grad():
        if whole:
            ours, theirs = target(turned).permute(back), source(x)
        else:
            ours, theirs = target.feature_maps(turned)[-1].permute(back), source.feature_maps(x)[-1]
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        # without the rotary channels it is another function
        unturned = {k: source.state_dict()[k] if "q_proj" in k or "k_proj" in k else v for k, v in state.items()}
        target.load_state_dict(unturned)
        wrong = target(turned).permute(back) if whole else target.feature_maps(turned)[-1].permute(back)
        assert (wrong - theirs).norm() > 0.05 * theirs.norm()
    again, same = permute_axes(state, moved, [order.index(i) for i in range(3)])
    assert same == spec and all(torch.equal(v, source.state_dict()[k]) for k, v in again.items())


def test_presets_have_the_papers_sizes():
    sizes = {name: (s.embed_dim, s.depth, s.num_heads) for name, s in PRESETS.items() if s.kind == "primus"}
    assert sizes == {
        "primus_nano": (96, 4, 4),
        "primus_s": (396, 12, 6),
        "primus_b": (792, 12, 12),
        "primus_m": (864, 16, 12),
        "primus_l": (1056, 24, 16),
    }
    with torch.device("meta"):
        built = build_encoder(PRESETS["primus_m"])
        counted = sum(p.numel() for p in built.parameters())
        dna = dna_network(PRESETS["primus_m"])
    assert counted == sum(p.numel() for p in dna.parameters()) - sum(p.numel() for p in dna.up_projection.parameters())
    # as counted in nnssl's own networks: OpenMind's, and nnFoundation's two
    crop = {"img_size": (192, 192, 192)}
    large = PRESETS["primus_l"].with_(depth=40, **crop)
    small = PRESETS["primus_m"].with_(layer_scale=None, inner_norm=False, **crop)
    for spec, millions in ((PRESETS["primus_m"], 151), (large, 551), (small, 156)):
        with torch.device("meta"):
            assert round(sum(p.numel() for p in build_encoder(spec).parameters()) / 1e6) == millions


def test_specs_that_are_no_primus():
    fields = {"kind": "primus", "pos_embed": "learned"}
    for wrong, told in (
        ({"num_heads": 8}, "embed_dim 24 over num_heads 8 is not divisible by 6"),
        ({"cls_token": True}, "no CLS token"),
        ({"pos_embed": "sincos"}, "needs pos_embed 'learned'"),
        ({"register_tokens": -1}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=told):
            EncoderSpec((16, 16, 16), (8, 8, 8), 24, 4, **{"num_heads": 2, **fields, **wrong})
    with pytest.raises(ValueError, match=r"register_tokens, layer_scale, inner_norm belong to kind 'primus'"):
        EncoderSpec((16, 16, 16), (8, 8, 8), 24, 4, 2, layer_scale=0.1)


def test_old_versions_read_what_is_no_primus():
    """Their readers refuse a field that they do not know."""
    assert not {"register_tokens", "layer_scale", "inner_norm"} & PRESETS["vit_base_p16"].to_dict().keys()
    for spec in (TINY_PRIMUS, FULL_PRIMUS):
        assert EncoderSpec.from_dict(spec.to_dict()) == spec
