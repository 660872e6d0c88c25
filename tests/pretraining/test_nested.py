"""MiM's nested crops on volumes whose voxels hold their own index: where every view lies."""

import re

import numpy as np
import pytest
import torch
from array_volume import ArrayVolume, numbered
from torch.utils.data import default_collate

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import patchify
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import MiM
from nnunetv2_hiendmae.pretraining.crops import cut_blocks, octant_tokens, resize

SHAPE = (70, 80, 100)
# neither the crop nor the patch is a cube: 4 × 2 × 6 tokens
SPEC = EncoderSpec((16, 16, 24), (4, 8, 4), embed_dim=12, depth=1, num_heads=2)


def index_volume(shape=SHAPE) -> ArrayVolume:
    """Numbers from 1 on, below 2²⁴, so that float32 holds them exactly."""
    return ArrayVolume(numbered(shape, first=1))


def method_of(spec=SPEC, **options):
    return MiM(spec, decoder_dim=12, decoder_depth=1, decoder_heads=2, **options)


def draw(method, seed=0, volume=None):
    return method.views().draw(volume or index_volume(), np.random.default_rng(seed))


def corner(values: torch.Tensor) -> np.ndarray:
    """Position in the volume of the first voxel of a block that holds indices."""
    return np.array(np.unravel_index(int(values.flatten()[0]) - 1, SHAPE))


def block(lower, size) -> torch.Tensor:
    return torch.from_numpy(index_volume().read([int(a) for a in lower], size))


def raster(number: int, grid) -> np.ndarray:
    return np.array(np.unravel_index(int(number), tuple(grid)))


def test_octants_are_the_eight_halves_of_all_axes():
    """Each token belongs to the octant of its coordinates, in true 2×2×2 raster order."""
    tokens = octant_tokens(SPEC.grid)
    assert tokens.shape == (8, SPEC.num_tokens // 8)
    for octant, row in enumerate(tokens):
        for token in row:
            half = raster(token, SPEC.grid) // (np.array(SPEC.grid) // 2)
            assert (half == raster(octant, (2, 2, 2))).all()
        assert row.tolist() == sorted(row.tolist())
    assert sorted(tokens.flatten().tolist()) == list(range(SPEC.num_tokens))


def test_cut_blocks_are_patchify_without_the_flattening():
    images = torch.rand(2, 3, 8, 12, 4)
    index = torch.tensor([[0, 5, 3], [2, 2, 1]])
    blocks = cut_blocks(images, index, (4, 4, 2))
    patches = patchify(images, (4, 4, 2))
    for b, k in np.ndindex(2, 3):
        assert torch.equal(blocks[b, k].movedim(0, -1).flatten(), patches[b, index[b, k]])


def test_halving_mixes_no_two_patches():
    """A patch of level 1 is the mean of 2×2×2 voxels of its own 8 patches' worth of the crop, and of nothing else."""
    image = torch.rand(1, 1, 8, 8, 8)
    expected = torch.nn.functional.avg_pool3d(image, 2)
    torch.testing.assert_close(resize(image, (4, 4, 4)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_level_1_is_the_whole_crop_and_masks_whole_octants(seed):
    method = method_of()
    sample = draw(method, seed)
    # the first octant of the crop tells where the crop lies, whether it became a view or not
    lower = corner(sample["level2"][0]) - raster(sample["octants"][0], (2, 2, 2)) * SPEC.img_size
    whole = block(lower, [2 * s for s in SPEC.img_size])
    assert (lower >= 0).all() and (lower + 2 * np.array(SPEC.img_size) <= SHAPE).all()
    assert torch.equal(sample["level1"], resize(whole[None], SPEC.img_size)[0])
    assert sorted(sample["ids_shuffle1"].tolist()) == list(range(SPEC.num_tokens))
    masked = set(sample["ids_shuffle1"][method.visible[1] :].tolist())
    full = [o for o, row in enumerate(octant_tokens(SPEC.grid).tolist()) if set(row) <= masked]
    assert len(full) == 4 and len(masked) == SPEC.num_tokens // 2
    assert set(sample["octants"].tolist()) <= set(full)


@pytest.mark.parametrize("seed", range(5))
def test_level_2_lies_in_masked_octants_and_equals_the_source(seed):
    method = method_of()
    sample = draw(method, seed)
    masked = set(sample["ids_shuffle1"][method.visible[1] :].tolist())
    octants = sample["octants"].tolist()
    assert len(set(octants)) == 4
    lower = corner(sample["level2"][0]) - raster(octants[0], (2, 2, 2)) * SPEC.img_size
    for octant, crop in zip(octants, sample["level2"], strict=True):
        assert set(octant_tokens(SPEC.grid)[octant].tolist()) <= masked
        assert torch.equal(crop, block(lower + raster(octant, (2, 2, 2)) * SPEC.img_size, SPEC.img_size))


@pytest.mark.parametrize("seed", range(5))
def test_level_3_lies_in_masked_tokens_and_equals_the_source_enlarged(seed):
    method = method_of()
    sample = draw(method, seed)
    batch = default_collate([sample, draw(method, seed + 100)])
    images, ids_shuffle = method.level_views(batch, 3, range(16))
    assert images.shape == (2, 16, 1, *SPEC.img_size) and ids_shuffle.shape == (2, 16, SPEC.num_tokens)
    for crop in range(4):
        masked = sample["ids_shuffle2"][crop, method.visible[2] :].tolist()
        patches = sample["patches"][crop].tolist()
        assert len(set(patches)) == 4 and set(patches) <= set(masked)
        for j, patch in enumerate(patches):
            lower = corner(sample["level2"][crop]) + raster(patch, SPEC.grid) * SPEC.patch_size
            expected = resize(block(lower, SPEC.patch_size)[None], SPEC.img_size)[0]
            assert torch.equal(images[0, 4 * crop + j], expected)
            assert torch.equal(ids_shuffle[0, 4 * crop + j], sample["ids_shuffle3"][crop, j])


@pytest.mark.parametrize("views_per_part", [1, 3, 99])
def test_views_do_not_depend_on_how_they_are_parted(views_per_part):
    method = method_of(views_per_part=views_per_part)
    batch = default_collate([draw(method)])
    for level, count in ((1, 1), (2, 4), (3, 16)):
        chosen = [c for at, c in method.parts if at == level]
        whole = method.level_views(batch, level, range(count))
        parted = [torch.cat(t, dim=1) for t in zip(*(method.level_views(batch, level, c) for c in chosen), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))
        assert [v for c in chosen for v in c] == list(range(count))


def test_small_volumes_are_padded_and_said_to_be():
    method = method_of()
    assert method.views().padded_below == (32, 32, 48)
    sample = draw(method, volume=index_volume((20, 40, 20)))
    assert sample["level1"].shape == (1, *SPEC.img_size) and (sample["level2"] == 0).any()


def test_octants_and_patches_are_chosen_uniformly():
    """Each octant is a level-2 view in half of 1500 samples, each token of 8 a level-3 patch in a quarter of 6000
    draws of 2; both within 4 standard deviations (.052, .023)."""
    spec = EncoderSpec((4, 4, 4), (2, 2, 2), embed_dim=12, depth=1, num_heads=2)
    method, volume = method_of(spec, crops_level3=2), index_volume((8, 8, 8))
    samples = default_collate([draw(method, seed, volume) for seed in range(1500)])
    octants = samples["octants"].flatten().bincount(minlength=8) / 1500
    patches = samples["patches"].flatten().bincount(minlength=8) / 6000
    assert (octants - 0.5).abs().max() < 0.052 and (patches - 0.25).abs().max() < 0.023


@pytest.mark.parametrize("grid", [(3, 4, 4), (4, 4, 1)])
def test_an_odd_grid_is_refused(grid):
    spec = SPEC.with_(img_size=tuple(g * p for g, p in zip(grid, SPEC.patch_size, strict=True)))
    with pytest.raises(UserError, match=rf"{re.escape(str(grid))}.*odd.*--crop-size"):
        method_of(spec)
