"""ViTEncoder (parity is in pretraining/test_parity.py): masking, dense maps, initialisation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.tokens import patchify

SPEC = EncoderSpec((8, 8, 12), (4, 4, 4), embed_dim=12, depth=4, num_heads=2)


def encoder_of(spec):
    torch.manual_seed(0)
    return build_encoder(spec).eval()


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
