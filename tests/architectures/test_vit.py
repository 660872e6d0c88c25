"""ViTEncoder: parity with the authors' encoders, masking, dense maps, initialisation."""

import math

import pytest
import torch
from authors_names import block_outputs
from fixtures_util import Fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.spec import num_visible
from nnunetv2_hiendmae.architectures.tokens import patchify

SPEC = EncoderSpec((8, 8, 12), (4, 4, 4), embed_dim=12, depth=4, num_heads=2)


def encoder_of(spec):
    torch.manual_seed(0)
    return build_encoder(spec).eval()


# ---- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hiendmae_pretrain_p12", "hiendmae_pretrain_p16", "hiendmae_pretrain_2ch"])
def test_equals_the_authors_hiendmae_encoder(name):
    fixture = Fixture(name)
    config = fixture.meta["config"]
    spec = EncoderSpec(
        config["img_size"],
        config["patch_size"],
        embed_dim=config["encoder"]["embed"],
        depth=config["encoder"]["depth"],
        num_heads=config["encoder"]["heads"],
        in_channels=config["in_chans"],
    )
    encoder = build_encoder(spec)
    weights = fixture.state_dict("module.encoder.")
    encoder.load_state_dict({**weights, "pos_embed": fixture.state_dict("module.")["encoder_pos_embed"]})
    visible = num_visible(spec.num_tokens, config["mask_ratio"])
    assert visible == config["sel_length"]
    keep = fixture["shuffle_indices"][:, :visible]
    with torch.no_grad():
        out, taps = encoder(fixture.image, keep)
    fixture.check("enc_out", out)
    fixture.check("enc_hidden", torch.stack(block_outputs(encoder, fixture.image, keep)))
    for i, tap in zip((3, 6, 9), taps, strict=True):
        fixture.check("enc_hidden", tap, fixture["enc_hidden"][i])


def test_equals_the_authors_mae3d_encoder():
    fixture = Fixture("mae3d_pretrain")
    config = fixture.meta["config"]
    spec = EncoderSpec(config["img_size"], config["patch_size"], config["embed"], config["depth"], config["heads"])
    encoder = build_encoder(spec)
    theirs = fixture.state_dict()
    assert not theirs["pos_embed"][:, 0].any()
    weights = {k: theirs[k] for k in encoder.state_dict()}
    weights["pos_embed"] = theirs["pos_embed"][:, 1:]  # their table has a row for CLS
    encoder.load_state_dict(weights)
    keep = fixture["noise"].argsort(dim=1)[:, : num_visible(spec.num_tokens, config["mask_ratio"])]
    with torch.no_grad():
        out, _ = encoder(fixture.image, keep)
    fixture.check("latent", out)


# ---- behaviour --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3),
    cls_token=st.booleans(),
    channels=st.integers(1, 2),
)
def test_shapes_on_any_grid(grid, patch, cls_token, channels):
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    encoder = encoder_of(EncoderSpec(size, patch, 12, 4, 2, in_channels=channels, cls_token=cls_token))
    x = torch.rand(2, channels, *size)
    tokens, taps = encoder(x)
    n = math.prod(grid) + cls_token
    assert encoder.num_prefix_tokens == int(cls_token)
    assert [t.shape for t in (tokens, *taps)] == [(2, n, 12)] * 4
    maps = encoder.feature_maps(x)
    assert [m.shape for m in maps] == [(2, 12, *grid)] * 4
    for m, t in zip(maps, [*taps, tokens], strict=True):
        assert torch.equal(m.flatten(2).transpose(1, 2), t[:, cls_token:])


def test_hidden_patches_have_no_influence():
    encoder = encoder_of(SPEC)
    x = torch.rand(1, 1, 8, 8, 12)
    keep = torch.tensor([[0, 7, 4]])
    changed = x.clone()
    changed[..., 0:4, 4:8, 8:12] = 9  # token 5, patch (0, 1, 2)
    with torch.no_grad():
        tokens, others = encoder(x, keep)[0], encoder(changed, keep)[0]
        assert torch.equal(tokens, others)
        assert not torch.equal(encoder(x, keep + 1)[0], encoder(changed, keep + 1)[0])


def test_order_of_the_visible_patches_is_kept():
    encoder = encoder_of(SPEC.with_(cls_token=False))
    x = torch.rand(2, 1, 8, 8, 12)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    with torch.no_grad():
        raster, _ = encoder(x)
        shuffled, _ = encoder(x, order)
    expected = torch.stack([raster[b, order[b]] for b in range(2)])
    # attention sums over tokens in another order
    torch.testing.assert_close(shuffled, expected, atol=1e-5, rtol=1e-5)


def test_embedding_as_a_matrix_equals_the_convolution():
    encoder = encoder_of(SPEC.with_(in_channels=2))
    x = torch.rand(1, 2, 8, 8, 12)
    with torch.no_grad():
        ours = encoder.patch_embed(patchify(x, SPEC.patch_size))
        conv = encoder.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, conv, atol=1e-6, rtol=1e-5)


def test_positions_of_another_crop_are_resampled():
    encoder = encoder_of(SPEC)
    assert encoder.positions([2, 2, 3]) is encoder.pos_embed
    assert encoder.positions([3, 4, 1]).shape == (1, 12, 12)
    assert encoder.feature_maps(torch.rand(1, 1, 12, 16, 4))[0].shape == (1, 12, 3, 4, 1)


def test_learned_positions_start_as_the_fixed_table():
    fixed, learned = encoder_of(SPEC), encoder_of(SPEC.with_(pos_embed="learned"))
    assert torch.equal(fixed.pos_embed, learned.pos_embed)
    assert not fixed.pos_embed.requires_grad
    assert learned.pos_embed.requires_grad


def test_initialisation():
    encoder = encoder_of(SPEC.with_(embed_dim=96, num_heads=4))
    weight = encoder.patch_embed.proj.weight
    bound = math.sqrt(6 / (96 + 64))
    # uniform: the largest of 6144 draws comes close to the bound, the deviation is bound/√3
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    qkv = encoder.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= math.sqrt(6 / (96 + 3 * 96))
    assert not qkv.bias.any()
    assert not encoder.patch_embed.proj.bias.any()
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_drop_path_rises_over_the_blocks():
    encoder = encoder_of(SPEC.with_(drop_path_rate=0.3))
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
