"""Crops, augmentation and masks: where they lie, what they change, and that they depend on the generator alone."""

import numpy as np
import pytest
import torch
from array_volume import ArrayVolume, numbered

from nnunetv2_hiendmae.training.views import Augmentation, MaskedCrop, draw_corner, seeded_globals


class IndexVolume(ArrayVolume):
    """Every voxel holds its own index. Foreground is one small box."""

    spacing_mm = (2.0, 1.0, 1.0)

    def __init__(self, shape=(20, 24, 28), box=(slice(14, 18), slice(2, 6), slice(20, 24))):
        foreground = np.zeros(shape, bool)
        foreground[box] = True
        super().__init__(numbered(shape), foreground)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_crops_lie_inside_and_reach_every_corner():
    volume = IndexVolume()
    corners = np.array([draw_corner(volume, (16, 16, 16), 0.0, r) for r in [rng(7)] for _ in range(2000)])
    assert (corners.min(0) == 0).all()
    assert (corners.max(0) == [4, 8, 12]).all()


def test_foreground_share():
    """Centred crops hold a foreground voxel in their middle; of crops anywhere few do (6 % of voxels)."""
    volume = IndexVolume((40, 40, 40), (slice(10, 26), slice(12, 28), slice(14, 30)))
    for share, low, high in ((1.0, 0.99, 1.0), (0.75, 0.7, 0.85), (0.0, 0.0, 0.2)):
        generator = rng(3)
        corners = np.array([draw_corner(volume, (8, 8, 8), share, generator) for _ in range(600)])
        centred = volume.foreground[tuple((corners + 4).T)].mean()
        assert low <= centred <= high, (share, centred)


def test_volume_without_foreground_is_cropped_anywhere():
    volume = IndexVolume(box=(slice(0, 0),) * 3)
    assert MaskedCrop((16, 16, 16), 8).draw(volume, rng())["image"].shape == (1, 16, 16, 16)


@pytest.mark.parametrize("shape", [(10, 24, 28), (10, 11, 12)])
def test_small_volumes_are_padded_around_the_middle(shape):
    volume = IndexVolume(shape, (slice(0, 1),) * 3)
    volume.values += 1
    crop = MaskedCrop((16, 16, 16), 8, augmentation=None).draw(volume, rng())["image"].numpy()[0]
    assert (crop[:3] == 0).all() and (crop[13:] == 0).all()
    assert (crop[3:13] > 0).any(axis=(1, 2)).all()


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 16, 24), (16, 24, 24)])
def test_augmentation_keeps_the_shape_and_the_voxels(size):
    """Flips and turns only move voxels; scale and shift are one line through all of them."""
    volume = IndexVolume()
    for seed in range(40):
        sample = MaskedCrop(size, 8).draw(volume, rng(seed))["image"]
        plain = MaskedCrop(size, 8, augmentation=None).draw(volume, rng(seed))["image"]
        assert sample.shape == (1, *size) and sample.is_contiguous() and sample.dtype == torch.float32
        ours, theirs = sample.flatten().sort().values, plain.flatten().sort().values
        slope = (ours[-1] - ours[0]) / (theirs[-1] - theirs[0])
        # ±10 % scale, and float32 rounding of values up to 2^14
        assert 0.899 <= slope <= 1.101
        torch.testing.assert_close(ours, (theirs - theirs[0]) * slope + ours[0], rtol=1e-5, atol=0.02)


def test_turns_stay_in_the_plane():
    """The first axis may be flipped, but is never exchanged with another one."""
    augment = Augmentation(p_rotate=1.0, p_scale=0.0, p_shift=0.0).transform((6, 6, 6))
    image = torch.arange(6.0)[None, :, None, None].expand(1, 6, 6, 6).contiguous()
    for seed in range(20):
        with seeded_globals(seed):
            turned = augment(image=image.clone())["image"]
        assert torch.equal(turned, image) or torch.equal(turned, image.flip(1))


def test_no_quarter_turn_where_voxels_are_not_square():
    augment = Augmentation(p_rotate=1.0, p_scale=0.0, p_shift=0.0).transform((4, 4, 4), (1.0, 1.0, 3.0))
    image = torch.arange(4.0)[None, None, :, None].expand(1, 4, 4, 4).contiguous()
    for seed in range(20):
        with seeded_globals(seed):
            turned = augment(image=image.clone())["image"]
        assert torch.equal(turned, image) or torch.equal(turned, image.flip(2))


def test_frequencies():
    """p=.5 per flip, .3 turn, .1 scale, .1 shift; 1500 draws keep each within 4 standard deviations (.052)."""
    augment = Augmentation().transform((4, 4, 4))
    image = torch.rand(1, 4, 4, 4) + 1
    found = {"moved": 0, "scaled_or_shifted": 0}
    draws = 1500
    for seed in range(draws):
        with seeded_globals(seed):
            out = augment(image=image.clone())["image"]
        values_kept = torch.equal(out.flatten().sort().values, image.flatten().sort().values)
        found["scaled_or_shifted"] += not values_kept
        found["moved"] += values_kept and not torch.equal(out, image)
    assert abs(found["scaled_or_shifted"] / draws - 0.19) < 0.052
    # unmoved: no flip and no turn, or a turn by 180° undone by two flips
    unmoved = 0.125 * 0.7 + 0.3 * (1 / 3) * 0.125
    assert abs(found["moved"] / draws - 0.81 * (1 - unmoved)) < 0.052


def test_ids_shuffle_is_a_uniform_permutation():
    """Each of 8 tokens is first in one of eight draws; 4000 draws keep that within 4 standard deviations (.021)."""
    volume, views, generator = IndexVolume(), MaskedCrop((16, 16, 16), 8, augmentation=None), rng(11)
    ids_shuffle = torch.stack([views.draw(volume, generator)["ids_shuffle"] for _ in range(4000)])
    assert (ids_shuffle.sort(dim=1).values == torch.arange(8)).all()
    assert (ids_shuffle[:, 0].bincount(minlength=8) / 4000 - 0.125).abs().max() < 0.021
