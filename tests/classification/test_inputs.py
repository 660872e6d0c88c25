"""How volumes become inputs: resizing, crops, grids, and samples that depend on (seed, epoch, case) alone."""

import itertools
import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from array_volume import ArrayVolume
from classification_data import write_cases
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from run_data import PLANS
from torch.nn import functional as F

from nnunetv2_hiendmae.classification.inputs import (
    Inputs,
    epoch_keys,
    warn_of_differences,
)
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.training.batches import SampleDataset, load_batches
from nnunetv2_hiendmae.training.views import grid_corners
from nnunetv2_hiendmae.training.volumes import CaseSet, CaseVolume, find_cases

SIZE = (16, 16, 16)
sizes = st.tuples(*[st.integers(1, 60)] * 3)


@pytest.fixture
def data(nnunet):
    write_cases(nnunet.preprocessed, 6)
    return find_cases(["1"], PLANS, "3d_fullres")


@pytest.mark.parametrize("mode", ["resize", "antialiased"])
def test_every_voxel_of_a_resized_volume_counts(mode):
    """White noise that shrinks sixfold along each axis gets calm, by the triangle's weights: its standard deviation is
    (2 / 3 / 6) ** 1.5 = .037. As 0.1 resized, two voxels per axis were picked, .5 ** 1.5 = .354."""
    noise = np.random.default_rng(0).standard_normal((96, 96, 96), np.float32)
    made = Inputs(mode, SIZE).regular(ArrayVolume(noise[None]))["image"]
    assert made.shape == (1, 1, *SIZE)
    assert made.std().item() == pytest.approx({"antialiased": 0.037, "resize": 0.354}[mode], rel=0.06)


def test_no_small_structure_vanishes_wherever_it_lies():
    for corner in range(40, 52):
        block = np.zeros((96, 96, 96), np.float32)
        block[(slice(corner, corner + 3),) * 3] = 1
        made = Inputs("antialiased", SIZE).regular(ArrayVolume(block[None]))["image"]
        assert made.max() > 0.02 and made.sum().item() == pytest.approx(27 / 216, rel=0.01)


def test_resizing_as_0_1_did_is_trilinear_over_the_whole_volume(data):
    volume = CaseVolume(data.cases[0], data.format)
    whole = torch.from_numpy(volume.read((0, 0, 0), volume.shape))[None]
    made = Inputs("resize", SIZE).regular(volume)["image"]
    assert torch.equal(made, F.interpolate(whole, size=SIZE, mode="trilinear", align_corners=False))
    # without augmentation nothing is random
    assert torch.equal(Inputs("resize", SIZE).draw(volume, np.random.default_rng(0), augment=False)["image"], made)


def test_regular_crops_are_those_of_the_grid(data):
    volume = CaseVolume(data.cases[0], data.format)
    made = Inputs("crops", SIZE, 8).regular(volume)["image"]
    corners = grid_corners(volume.shape, SIZE, 8)
    assert len(made) == len(corners) == 8
    for image, corner in zip(made, corners, strict=True):
        assert np.array_equal(image, volume.read(corner, SIZE))


def test_random_crops_lie_in_the_volume_and_differ(data):
    volume = CaseVolume(data.cases[0], data.format)
    whole = volume.read((0, 0, 0), volume.shape)
    made = Inputs("crops", (6, 6, 6), 5).draw(volume, np.random.default_rng(0), augment=False)["image"]
    windows = np.lib.stride_tricks.sliding_window_view(whole[0], (6, 6, 6)).reshape(-1, 216)
    found = [int(np.flatnonzero((windows == image.reshape(-1).numpy()).all(1))[0]) for image in made]
    assert len(set(found)) == 5


@given(shape=sizes, size=sizes, most=st.integers(1, 40))
def test_grids_cover_evenly_and_stay_inside(shape, size, most):
    corners = grid_corners(shape, size, most)
    assert 1 <= len(corners) == len(set(corners)) <= most
    for axis in range(3):
        along = sorted({corner[axis] for corner in corners})
        room = shape[axis] - size[axis]
        # the first at the beginning and the last at the end, or a single one in the middle
        if len(along) > 1:
            assert along[0] == 0 and along[-1] == room
            steps = np.diff(along)
            assert steps.max() - steps.min() <= 1
        else:
            assert abs(along[0] - room / 2) <= 0.5
    # a full grid: every combination of the positions
    assert corners == list(itertools.product(*(sorted({c[a] for c in corners}) for a in range(3))))


def test_enough_crops_leave_no_gap():
    covered = np.zeros((40, 33, 16), bool)
    corners = grid_corners(covered.shape, SIZE, 100)
    for d, h, w in corners:
        covered[d : d + 16, h : h + 16, w : w + 16] = True
    assert covered.all() and len(corners) == 3 * 3 * 1


def test_every_epoch_has_every_case_once_in_another_order():
    batches = list(epoch_keys(range(4), 7, 3, seed=5))
    assert len(batches) == 12
    orders = [[key for batch in batches[3 * e : 3 * e + 3] for key in batch] for e in range(4)]
    assert all(sorted(keys) == [(e, i) for i in range(7)] for e, keys in enumerate(orders))
    assert len({tuple(i for _, i in keys) for keys in orders}) == 4
    # a continued run draws what the whole one would have drawn
    assert list(epoch_keys(range(2, 4), 7, 3, seed=5)) == batches[6:]
    assert list(epoch_keys(range(4), 7, 3, seed=6)) != batches


def training_samples(data, inputs) -> SampleDataset:
    return SampleDataset(data, partial(inputs.draw, augment=True), seed=3, case_in_key=True)


@pytest.mark.parametrize("inputs", [Inputs("antialiased", SIZE), Inputs("crops", SIZE, 2)], ids=["resize", "crops"])
def test_samples_do_not_depend_on_workers(data, inputs):
    def batches(workers):
        samples = training_samples(data, inputs)
        return list(load_batches(Fabric(accelerator="cpu"), samples, epoch_keys(range(2), 6, 4, 3), workers))

    expected = batches(0)
    assert [len(batch["case"]) for batch in expected] == [4, 2, 4, 2]
    assert expected[0]["image"].shape == (4, inputs.crops, 1, *SIZE)
    for workers in (1, 2):
        for a, b in zip(expected, batches(workers), strict=True):
            assert a["case"] == b["case"] and torch.equal(a["image"], b["image"])


def test_augmentation_differs_between_epochs_and_repeats_within_one(data):
    samples = training_samples(data, Inputs("resize", SIZE))
    images = [samples[(epoch, 0)]["image"] for epoch in range(6)]
    assert len({image.numpy().tobytes() for image in images}) > 3
    assert torch.equal(samples[(2, 0)]["image"], images[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_case_is_named_in_one_line(data, workers):
    broken = replace(data.cases[1], path=data.cases[1].path.with_name("gone.b2nd"))
    samples = SampleDataset(CaseSet((broken,), data.format), Inputs("resize", SIZE).regular, 0, case_in_key=True)
    with pytest.raises(UserError, match=r"^cannot read case Dataset001_Tiny/c01 .*preprocess again$"):
        list(load_batches(Fabric(accelerator="cpu"), samples, [[(0,)]], workers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("whole", SIZE), "'whole' are unknown"),
        (("crops", SIZE, 0), "--crops is 0"),
        (("resize", SIZE, 2), "--crops 2 with --input resize.*add --input crops"),
    ],
)
def test_bad_inputs(arguments, message):
    with pytest.raises(UserError, match=message):
        Inputs(*arguments)


def warnings_of(caplog, data, **changes) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        seen = replace(data.format, **changes)
        warn_of_differences(data, Inputs("resize", SIZE), seen, "the encoder")
    return [record.getMessage() for record in caplog.records]


def test_other_spacing_window_or_normalisation_is_told(data, caplog):
    assert warnings_of(caplog, data) == []
    (told,) = warnings_of(caplog, data, spacing_mm=(1.5, 1.5, 1.5))
    assert told.startswith("spacing in mm: the images have (3.0, 3.0, 3.0), the encoder saw (1.5, 1.5, 1.5)")
    (told,) = warnings_of(caplog, data, window_hu=(-1000.0, 1000.0))
    assert told.startswith("window in HU: the images have (-175.0, 250.0), the encoder saw (-1000.0, 1000.0)")
    assert len(warnings_of(caplog, data, normalization_schemes=("ZScoreNormalization",))) == 1
    assert len(warnings_of(caplog, data, image_reader_writer="NibabelIOWithReorient")) == 1
    # unknown or varying is no difference; nor is one channel that was spread over two
    assert warnings_of(caplog, data, spacing_mm=None, window_hu=None, image_reader_writer=None) == []
    assert warnings_of(caplog, data, normalization_schemes=("CTNormalization",) * 2) == []
