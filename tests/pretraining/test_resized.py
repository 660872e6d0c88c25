"""GL-MAE's views: which box they show, where its voxels go, and that nothing but the generator decides."""

import numpy as np
import pytest
import torch

from nnunetv2_hiendmae.pretraining import crops
from nnunetv2_hiendmae.pretraining.crops import Box, GlobalLocalCrops, ResizedCrop, read_boxes
from nnunetv2_hiendmae.training.batches import Boxes, collate
from nnunetv2_hiendmae.training.views import (
    Augmentation,
    axis_weights,
    read_resized,
    resize_box,
    unaugmented,
    unresized,
)


class RampVolume:
    """Three channels that hold the D, H and W index of every voxel: a view tells what it shows and where."""

    spacing_mm = (3.0, 1.0, 1.0)

    def __init__(self, shape=(20, 30, 44)):
        self.shape = shape
        self.values = np.stack(np.meshgrid(*(np.arange(s, dtype=np.float32) for s in shape), indexing="ij"))
        self.reads = []

    def read(self, lower, size):
        return self.read_stored(lower, size).float().numpy()

    def read_stored(self, lower, size):
        assert all(a >= 0 and a + b <= s for a, b, s in zip(lower, size, self.shape, strict=True)), "outside"
        self.reads.append((tuple(lower), tuple(size)))
        cut = (slice(None), *(slice(a, a + b) for a, b in zip(lower, size, strict=True)))
        return torch.from_numpy(self.values[cut].copy())

    def is_foreground(self, voxel):
        raise AssertionError("global and local views do not look for foreground")


def rng(seed=0):
    return np.random.default_rng(seed)


def places(lower: int, box: int, size: int) -> np.ndarray:
    """Where the voxel centres of a resized axis lie in the volume."""
    return lower + (np.arange(size) + 0.5) * box / size - 0.5


def views(global_views=2, local_views=3, augmentation=None) -> GlobalLocalCrops:
    return GlobalLocalCrops(
        ResizedCrop((24, 24, 24), 27, (0.5, 1.0), augmentation),
        ResizedCrop((16, 16, 16), 8, (0.25, 0.5), augmentation),
        global_views,
        local_views,
    )


@pytest.mark.parametrize(
    ("lower", "box", "size"),
    [
        ((0, 0, 0), (20, 30, 44), (16, 24, 16)),
        ((3, 5, 7), (5, 7, 11), (16, 8, 24)),
        ((2, 1, 9), (17, 8, 33), (8, 24, 8)),
        ((19, 0, 0), (1, 30, 2), (8, 8, 8)),
    ],
)
def test_a_view_shows_its_box_and_every_voxel_in_its_place(lower, box, size):
    """A ramp stays a ramp: to float32 rounding where it is enlarged; where it shrinks, voxels sample the wide triangle
    unevenly, which moves its centre by up to 0.05 voxels (0.035 seen). Towards the border there are neighbours on one
    side only: closer than half the triangle, values only have to lie in the box.
    """
    view = read_resized(RampVolume(), lower, box, size).numpy()
    assert view.shape == (3, *size)
    for axis in range(3):
        expected = places(lower[axis], box[axis], size[axis])
        lines = np.moveaxis(view[axis], axis, 0).reshape(size[axis], -1)
        first, last = lower[axis], lower[axis] + box[axis] - 1
        assert lines.min() >= first - 1e-4 and lines.max() <= last + 1e-4
        reach = max(1.0, box[axis] / size[axis])
        inside = (expected - reach >= first - 0.5) & (expected + reach <= last + 0.5)
        assert inside.sum() >= (box[axis] > 4) * (size[axis] // 2)
        distance = np.abs(lines[inside] - expected[inside, None])
        assert (distance <= (1e-4 if box[axis] <= size[axis] else 0.05)).all()


def test_the_same_size_is_the_crop_itself():
    volume = RampVolume()
    assert np.array_equal(read_resized(volume, (3, 4, 5), (8, 9, 10), (8, 9, 10)), volume.read((3, 4, 5), (8, 9, 10)))


def test_shrinking_averages_what_plain_interpolation_would_skip():
    """White noise, shrunk four times per axis: each axis' triangle spans 8 voxels, its squared weights sum to 0.172, so
    that the standard deviation falls to 0.172^1.5 = 0.071; plain trilinear interpolation would leave 0.5^1.5 = 0.35."""
    volume = RampVolume((64, 64, 64))
    volume.values = rng().standard_normal((1, 64, 64, 64)).astype(np.float32)
    inner = read_resized(volume, (0, 0, 0), (64, 64, 64), (16, 16, 16))[:, 1:-1, 1:-1, 1:-1]
    assert 0.065 < inner.std() < 0.078


@pytest.mark.parametrize(("source", "target"), [(7, 16), (40, 16), (16, 16), (1, 8), (13, 1)])
def test_weights_of_an_axis_sum_to_one(source, target):
    weights = axis_weights(source, target)
    assert weights.shape == (target, source) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(target), rtol=1e-6, atol=0)


def test_slabs_do_not_change_the_view_and_bound_what_is_read_at_once(monkeypatch):
    volume = RampVolume()
    volume.values = rng().standard_normal(volume.values.shape).astype(np.float32)
    whole = read_resized(volume, (1, 2, 3), (18, 25, 40), (16, 24, 16))
    assert len(volume.reads) == 1
    monkeypatch.setattr("nnunetv2_hiendmae.training.views.SLAB_VOXELS", 4000)
    slabs = read_resized(volume, (1, 2, 3), (18, 25, 40), (16, 24, 16))
    assert torch.equal(whole, slabs)
    read = volume.reads[1:]
    assert sum(size[0] for _, size in read) == 18 and all(np.prod(size) <= 4000 for _, size in read)
    # thinner than a slice is not possible
    monkeypatch.setattr("nnunetv2_hiendmae.training.views.SLAB_VOXELS", 10)
    assert torch.equal(whole, read_resized(volume, (1, 2, 3), (18, 25, 40), (16, 24, 16)))


def test_the_number_of_threads_does_not_change_a_bit():
    """What a worker with one thread makes equals what the training process makes with several."""
    volume, before = RampVolume((40, 50, 60)), torch.get_num_threads()
    volume.values = rng().standard_normal(volume.values.shape).astype(np.float32)
    made = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            made.append(read_resized(volume, (0, 0, 0), volume.shape, (24, 24, 24)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_scales_are_uniform_one_for_all_axes_and_boxes_lie_anywhere(monkeypatch):
    """800 boxes: shares reach both ends of their range within 1 %, their mean lies within 4 standard deviations
    (0.144 / sqrt(800) · 4 = 0.02), and boxes touch both ends of every axis."""
    volume, generator, drawn = RampVolume((200, 160, 240)), rng(5), []
    monkeypatch.setattr(crops, "read_resized", lambda volume, lower, box, size: drawn.append((lower, box)))
    for _ in range(800):
        ResizedCrop((2, 2, 2), 1, (0.5, 1.0)).draw(volume, generator)
    lower, box = np.array(drawn).transpose(1, 0, 2)
    shares, slack = box / volume.shape, volume.shape - box
    # rounding to whole voxels: half a voxel of 160, twice
    assert (np.ptp(shares, axis=1) <= 1 / 160).all()
    assert 0.49 < shares.min() < 0.51 and 0.99 < shares.max() <= 1
    assert abs(shares.mean() - 0.75) < 0.02
    assert (lower >= 0).all() and (lower <= slack).all()
    assert (lower.min(axis=0) == 0).all() and ((slack - lower).min(axis=0) == 0).all()
    # uniform: in the middle of the room on average (4 standard deviations: 0.29 / sqrt(800) · 4)
    assert (abs((lower / np.maximum(slack, 1))[slack[:, 0] > 20].mean(axis=0) - 0.5) < 0.041).all()


@pytest.mark.parametrize("shape", [(20, 30, 44), (5, 60, 7), (1, 1, 3)])
def test_a_sample_holds_all_views_of_any_volume(shape):
    """Volumes smaller than a view, thin ones too, are enlarged and never padded: every value lies in the box."""
    volume = RampVolume(shape)
    volume.values += 1
    sample = views().draw(volume, rng())
    assert {k: tuple(v.shape) for k, v in sample.items()} == {
        "global": (2, 3, 24, 24, 24),
        "global_ids_shuffle": (2, 27),
        "local": (3, 3, 16, 16, 16),
        "local_ids_shuffle": (3, 8),
    }
    assert sample["global"].dtype == torch.float32 and sample["global_ids_shuffle"].dtype == torch.int64
    assert sample["global"].min() >= 1 - 1e-4
    for kind, tokens in (("global", 27), ("local", 8)):
        assert (sample[f"{kind}_ids_shuffle"].sort(dim=1).values == torch.arange(tokens)).all()
        assert not torch.equal(sample[kind][0], sample[kind][1]) or max(shape) < 4


def test_augmentation_moves_voxels_of_the_resized_view():
    """Flips only: every augmented view is one of the eight mirror images of the plain one."""
    volume, flips = RampVolume(), Augmentation(p_rotate=0.0, p_scale=0.0, p_shift=0.0)
    moved = 0
    for seed in range(10):
        plain, _ = ResizedCrop((8, 8, 8), 8, (0.5, 1.0)).draw(volume, rng(seed))
        augmented, _ = ResizedCrop((8, 8, 8), 8, (0.5, 1.0), flips).draw(volume, rng(seed))
        mirrored = [plain.flip([a for a in (1, 2, 3) if mask >> a & 1]) for mask in range(0, 16, 2)]
        assert sum(torch.equal(augmented, m) for m in mirrored) == 1 and augmented.is_contiguous()
        moved += not torch.equal(augmented, plain)
    assert moved >= 5


def noise_volume(shape=(40, 50, 60), channels=2, dtype=np.float32):
    """As after preprocessing: in [0, 1]."""
    volume = RampVolume(shape)
    volume.values = rng().random((channels, *shape)).astype(dtype)
    return volume


def largest_difference(plain, sent) -> float:
    """Between views and those that a device makes of their boxes."""
    columns = [views for kind in ("global", "local") for views in plain[kind].unbind(1)]
    made = [[resize_box(box, view.shape[2:]) for box in sent.column(i)] for i, view in enumerate(columns)]
    assert all(view.dtype == torch.float32 for views in made for view in views)
    return max((torch.stack(m) - view).abs().max().item() for m, view in zip(made, columns, strict=True))


@pytest.mark.parametrize("augmentation", [None, Augmentation(p_rotate=1.0, p_scale=0.5, p_shift=0.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(30, 40, 44), (5, 33, 33), (1, 9, 70)])
def test_boxes_become_the_same_views_on_a_device(augmentation, dtype, shape):
    """What a worker sends to a GPU, and what it makes of it, against what a worker makes: to 1e-5 of the window, of
    every shape of box, also where a view is mirrored and turned; the same generator gives the same boxes and tokens."""
    volume, drawn = noise_volume(shape, dtype=dtype), views(augmentation=augmentation)
    plain = collate([drawn.draw(volume, rng(seed)) for seed in range(6)])
    sent = collate([unresized(drawn).draw(volume, rng(seed)) for seed in range(6)])
    assert all(torch.equal(plain[f"{kind}_ids_shuffle"], sent[f"{kind}_ids_shuffle"]) for kind in ("global", "local"))
    boxes = sent["boxes"]
    assert isinstance(boxes, Boxes) and len({array.shape for row in boxes.arrays for array in row}) > 1
    # in the stored precision, unless its numbers were changed
    kept = torch.float16 if dtype == np.float16 and not augmentation else torch.float32
    assert {array.dtype for row in boxes.arrays for array in row} == {kept}
    assert largest_difference(plain, boxes) < 1e-5


def test_boxes_are_read_together_where_that_is_less():
    """No voxel twice, and none between boxes that lie far apart."""
    volume = noise_volume(shape=(36, 46, 56))
    together = [Box((2, 3, 4), (20, 20, 20)), Box((0, 10, 6), (20, 20, 20))]
    apart = [Box((0, 0, 0), (5, 5, 5)), Box((30, 40, 50), (5, 5, 5))]
    read = [*read_boxes(volume, together), *read_boxes(volume, apart)]
    assert volume.reads == [((0, 3, 4), (22, 27, 22)), *apart]
    for box, array in zip((*together, *apart), read, strict=True):
        assert np.array_equal(array, volume.read(*box))


def test_a_box_far_larger_than_its_view_is_resized_by_the_worker():
    """So that what is sent, and a worker's memory, do not grow with the volume."""
    crop = ResizedCrop((8, 8, 8), 8, (1.0, 1.0))
    drawn = GlobalLocalCrops(crop, crop, 1, 1)
    for edge, sent in ((12, (2, 12, 12, 12)), (13, (2, 8, 8, 8))):
        volume = noise_volume((edge,) * 3)
        box, _ = unresized(drawn).draw(volume, rng())["boxes"]
        view, _ = crop.draw(volume, rng())
        assert tuple(box.shape) == sent
        assert (resize_box(box, (8, 8, 8)) - view).abs().max() < 1e-5
        assert sent[1] != 8 or torch.equal(resize_box(box, (8, 8, 8)), view)


def test_boxes_move_as_tensors_do():
    boxes = collate([{"a": [torch.rand(1, 2, 3, 4), torch.rand(1, 1, 1, 1)]}, {"a": [torch.rand(1, 5, 1, 2)] * 2}])["a"]
    moved = boxes.to("cpu", torch.float64)
    assert [box.shape for box in moved.column(0)] == [(1, 2, 3, 4), (1, 5, 1, 2)]
    assert all(torch.equal(a, b.double()) for a, b in zip(moved.column(1), boxes.column(1), strict=True))


def test_boxes_of_one_memory_move_as_one():
    whole = torch.rand(2, 6, 7, 8)
    parts = [whole[:, 1:5, 2:, :3], whole[:, :, 3:4], torch.rand(2, 2, 2, 2)]
    moved = collate([{"a": parts}])["a"].to(torch.float64).arrays[0]
    assert all(torch.equal(a.double(), b) for a, b in zip(parts, moved, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in moved}) == 2
    assert moved[0].untyped_storage().nbytes() == 8 * whole.numel()


def test_only_what_is_resized_changes_for_a_device():
    drawn = views(augmentation=Augmentation())
    changed = unresized(drawn)
    assert not changed.global_crop.resized and not changed.local_crop.resized
    assert unaugmented(changed) == unresized(unaugmented(drawn)) != unaugmented(drawn)
    other = object()
    assert unresized(other) is other
