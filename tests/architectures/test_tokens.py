"""Volumes as tokens: round trips, orders, positions and masking, for any grid."""

import math

import pytest
import torch
from fixtures_util import Fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_hiendmae.architectures.spec import num_visible
from nnunetv2_hiendmae.architectures.tokens import (
    normalize_patches,
    patchify,
    put_tokens,
    resample_positions,
    sincos_positions,
    split_shuffle,
    take_tokens,
    token_grid,
    unpatchify,
)

GRIDS = st.tuples(*[st.integers(1, 4)] * 3)
PRETRAIN = ["hiendmae_pretrain_p12", "hiendmae_pretrain_p16", "hiendmae_pretrain_2ch"]


@settings(deadline=None)
@given(grid=GRIDS, patch=st.tuples(*[st.integers(1, 5)] * 3), batch=st.integers(1, 2), channels=st.integers(1, 3))
def test_patchify_and_back(grid, patch, batch, channels):
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    x = torch.arange(batch * channels * math.prod(size)).reshape(batch, channels, *size)
    patches = patchify(x, patch)
    assert patches.shape == (batch, math.prod(grid), math.prod(patch) * channels)
    assert torch.equal(unpatchify(patches, grid, patch), x)
    # the last token is the far corner, its first value the first channel of that corner's first voxel
    corner = [-p for p in patch]
    assert patches[0, -1, 0] == x[(0, 0, *corner)]


def test_patches_are_in_raster_order_with_channels_last():
    x = torch.zeros(1, 2, 4, 4, 6)
    x[0, 1, 2, 1, 5] = 1  # patch (1, 0, 2), inside it voxel (0, 1, 1), channel 1
    where = patchify(x, (2, 2, 2))[0].nonzero().tolist()
    assert where == [[1 * 2 * 3 + 0 * 3 + 2, (0 * 4 + 1 * 2 + 1) * 2 + 1]]


def test_patchify_equals_the_authors():
    fixture = Fixture("hiendmae_pretrain_2ch")
    patches = patchify(fixture.image, fixture.meta["config"]["patch_size"])
    fixture.check("x_patches_0", patches[0])


def test_patchify_refuses_a_crop_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match=r"crop \(8, 9, 8\) is not divisible by the patch \(4, 4, 4\)"):
        patchify(torch.zeros(1, 1, 8, 9, 8), (4, 4, 4))


@settings(deadline=None)
@given(grid=GRIDS, width=st.integers(6, 30))
def test_positions_follow_the_formula(grid, width):
    table = sincos_positions(grid, width)
    assert table.shape == (1, math.prod(grid), width)
    volume = table.reshape(*grid, width)
    e = width // 6
    place = tuple(g - 1 for g in grid)
    expected = []
    for coordinate in place:
        angles = [coordinate * 10000 ** (-k / e) for k in range(e)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    expected += [0.0] * (width - 6 * e)
    torch.testing.assert_close(volume[place], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PRETRAIN)
def test_positions_equal_the_authors(name):
    fixture = Fixture(name)
    theirs = fixture.state_dict("module.")
    for key, width in (("encoder_pos_embed", "encoder"), ("decoder_pos_embed", "decoder")):
        ours = sincos_positions(fixture.meta["config"]["grid"], fixture.meta["config"][width]["embed"])
        # sines of float32 angles against float64
        torch.testing.assert_close(ours, theirs[key], atol=1e-6, rtol=0)


def test_positions_need_width():
    with pytest.raises(ValueError, match=r"width 5 .*6"):
        sincos_positions((2, 2, 2), 5)


@settings(deadline=None)
@given(grid=GRIDS, target=GRIDS)
def test_resampling_positions(grid, target):
    table = torch.rand(1, math.prod(grid), 6)
    assert torch.equal(resample_positions(table, grid, grid), table)
    assert resample_positions(table, grid, target).shape == (1, math.prod(target), 6)
    # interpolation keeps a constant, and never leaves the range of the table
    constant = torch.full_like(table, 0.3)
    torch.testing.assert_close(resample_positions(constant, grid, target), torch.full((1, math.prod(target), 6), 0.3))
    resampled = resample_positions(table, grid, target)
    assert resampled.min() >= table.min() - 1e-6
    assert resampled.max() <= table.max() + 1e-6


def test_resampling_keeps_the_axes_apart():
    """A table that only grows along W stays constant along D and H."""
    grid, target = (2, 3, 4), (4, 5, 8)
    table = torch.arange(4.0).expand(2, 3, 4).reshape(1, -1, 1)
    volume = resample_positions(table, grid, target).reshape(target)
    torch.testing.assert_close(volume, volume[:1, :1].expand(target))
    # half-voxel centres (align_corners=False), clamped at the border
    torch.testing.assert_close(volume[0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_resampling_keeps_tables_and_columns_apart():
    grid, target = (2, 3, 4), (3, 2, 5)
    tables = torch.rand(2, 24, 3)
    together = resample_positions(tables, grid, target)
    for t in range(2):
        for c in range(3):
            alone = resample_positions(tables[t : t + 1, :, c : c + 1], grid, target)
            torch.testing.assert_close(together[t : t + 1, :, c : c + 1], alone)


def test_token_grid():
    assert token_grid((8, 12, 16), (4, 4, 2)) == [2, 3, 8]
    with pytest.raises(ValueError, match=r"crop \(8, 10, 16\) is not divisible by the patch \(4, 4, 2\)"):
        token_grid((8, 10, 16), (4, 4, 2))


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"), [(512, 0.75, 128), (216, 0.75, 54), (30, 0.9, 2), (24, 0.6, 9), (27, 0.75, 6)]
)
def test_num_visible(tokens, ratio, visible):
    # 30·(1 − .9) is 2.9999… in floating point, and the authors truncate
    assert num_visible(tokens, ratio) == visible


@settings(deadline=None)
@given(tokens=st.integers(1, 1000), ratio=st.floats(0, 1))
def test_num_visible_stays_in_range(tokens, ratio):
    assert 0 <= num_visible(tokens, ratio) <= tokens


@settings(deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(2, 12), data=st.data())
def test_taking_and_putting_tokens(batch, tokens, data):
    visible = data.draw(st.integers(1, tokens))
    ids_shuffle = torch.stack([torch.tensor(data.draw(st.permutations(range(tokens)))) for _ in range(batch)])
    x = torch.rand(batch, tokens, 5)
    keep, masked = split_shuffle(ids_shuffle, visible)
    assert keep.shape == (batch, visible)
    assert masked.shape == (batch, tokens - visible)
    taken = take_tokens(x, keep)
    for b in range(batch):
        assert torch.equal(taken[b], x[b, keep[b]])
    # a table of one sample serves the whole batch
    assert torch.equal(take_tokens(x[:1], keep), x[:1].expand_as(x).gather(1, keep[..., None].expand(-1, -1, 5)))
    assert torch.equal(put_tokens(take_tokens(x, ids_shuffle), ids_shuffle), x)


@pytest.mark.parametrize("unbiased", [True, False])
def test_normalized_patches(unbiased):
    patches = torch.rand(2, 3, 64, dtype=torch.float64) * 5 + 2
    patches[0, 0] = 0.25  # no variance
    ours = normalize_patches(patches, unbiased)
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (64 - unbiased)
    torch.testing.assert_close(ours, centred / (variance + 1e-6).sqrt())
    assert (ours[0, 0] == 0).all()
