"""Surface Dice, HD95 and volumes: known answers, and two independent implementations."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from monai.metrics.utils import get_code_to_measure_table, get_edge_surface_distance
from scipy import ndimage
from scipy.spatial.distance import cdist

from nnunetv2_hiendmae.evaluation.surfaces import _areas, measure

SPACINGS = ((1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.8, 2.5, 1.3), (3.0, 3.0, 1.0))
SHAPE = (14, 13, 12)


def blobs(seed, shape=SHAPE):
    """Two masks that overlap, touch the border of the image and have patterns of every kind."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 1)
    return smooth > 0.1, np.roll(smooth, 3, 1) + 0.05 * rng.standard_normal(shape) > 0.12


def box(shape, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def ball(radius_mm, spacing, shape):
    middles = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    return sum(x**2 for x in np.meshgrid(*middles, indexing="ij")) <= radius_mm**2


def brute_force(reference, prediction, spacing, tolerance):
    """Element by element, and every distance between them; only the areas are those of the code under test."""
    surfaces = []
    for mask in (reference, prediction):
        padded, points, areas = np.pad(mask, 1), [], []
        for corner in product(*(range(n + 1) for n in mask.shape)):
            cube = padded[tuple(slice(start, start + 2) for start in corner)].ravel()
            if 0 < cube.sum() < 8:
                points.append(np.multiply(corner, spacing))
                areas.append(_areas(tuple(spacing))[sum(int(inside) << bit for bit, inside in enumerate(cube))])
        surfaces.append((np.array(points), np.array(areas)))
    (p, p_areas), (q, q_areas) = surfaces
    every = cdist(p, q)
    return nsd_and_hd95([(every.min(1), p_areas), (every.min(0), q_areas)], tolerance)


def nsd_and_hd95(directions, tolerance):
    """From (distances, areas) of both directions."""
    near = sum(areas[distances <= tolerance].sum() for distances, areas in directions)
    hausdorff = []
    for distances, areas in directions:
        hausdorff.append(min(d for d in distances if areas[distances <= d].sum() >= 0.95 * areas.sum() - 1e-6))
    return near / sum(areas.sum() for _, areas in directions), max(hausdorff)


def as_tensors(*masks):
    return [torch.from_numpy(mask)[None, None] for mask in masks]


@pytest.mark.parametrize("seed, spacing", list(enumerate(SPACINGS)))
def test_equal_to_brute_force_and_to_monai(seed, spacing):
    reference, prediction = blobs(seed)
    found = measure(reference, prediction, spacing, 1)
    assert 0.1 < found["nsd"] < 0.99
    assert (found["nsd"], found["hd95"]) == pytest.approx(brute_force(reference, prediction, spacing, 1))
    options = {"spacing": list(spacing), "use_subvoxels": True}
    theirs = compute_surface_dice(*as_tensors(prediction, reference), [1.0], include_background=True, **options)
    assert found["nsd"] == pytest.approx(theirs.item(), abs=1e-6)
    masks = (torch.from_numpy(prediction), torch.from_numpy(reference))
    edges, distances, areas = get_edge_surface_distance(*masks, symmetric=True, **options)
    parts = [(d.double().numpy(), a[e].double().numpy()) for e, d, a in zip(edges, distances, areas, strict=True)]
    assert found["hd95"] == pytest.approx(nsd_and_hd95(parts, 1)[1], abs=1e-5)


# of DeepMind's surface-distance 0.1 (which fails with NumPy 2 where a mask is empty)
RECORDED = ((0, 0.83839664, 2.0), (1, 0.87934341, 1.4), (2, 0.6150585, 2.7202941), (3, 0.80914458, 3.0))


@pytest.mark.parametrize("seed, nsd, hd95", RECORDED)
def test_equal_to_the_published_program(seed, nsd, hd95):
    found = measure(*blobs(seed), SPACINGS[seed], 1)
    assert found["nsd"] == pytest.approx(nsd, abs=1e-7) and found["hd95"] == pytest.approx(hd95, abs=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_of_all_patterns(spacing):
    theirs, kernel = get_code_to_measure_table(list(spacing))
    weights = kernel.ravel().int().tolist()
    for pattern, area in enumerate(_areas(spacing)):
        code = sum(weight for bit, weight in enumerate(weights) if pattern >> bit & 1)
        assert area == pytest.approx(theirs[code].item(), abs=1e-5)
    # across each axis: a face of the voxel
    half = [sum(1 << bit for bit, corner in enumerate(product((0, 1), repeat=3)) if corner[axis]) for axis in range(3)]
    faces = [math.prod(spacing) / mm for mm in spacing]
    assert [_areas(spacing)[pattern] for pattern in half] == pytest.approx(faces)


@pytest.mark.parametrize("axis", range(3))
def test_one_voxel_that_is_shifted_by_three(axis):
    """Its elements are its eight corners, all of the same area: four are two voxels away, four are three."""
    spacing = np.array((5, 0.7, 1.3))
    reference, prediction = (np.zeros((9, 9, 9), dtype=bool) for _ in range(2))
    reference[4, 4, 4] = True
    prediction[tuple(np.array((4, 4, 4)) + 3 * np.eye(3, dtype=int)[axis])] = True
    mm = spacing[axis]
    for tolerance, nsd in ((1.99 * mm, 0), (2 * mm, 0.5), (2.99 * mm, 0.5), (3 * mm, 1)):
        found = measure(reference, prediction, spacing, tolerance)
        assert found["nsd"] == pytest.approx(nsd) and found["hd95"] == pytest.approx(3 * mm)
    assert found["predicted_ml"] == found["reference_ml"] == pytest.approx(5 * 0.7 * 1.3 / 1000)


@pytest.mark.parametrize("axis", range(3))
def test_a_plate_that_is_shifted(axis):
    """Its edges are a small part: half of the surface is far away where the other half lies within the shift."""
    spacing, shape = np.array((3, 1, 0.5)), np.full(3, 60)
    shape[axis] = 12
    ranges = [[(0, n)] * 2 for n in shape]
    ranges[axis] = [(2, 4), (5, 7)]
    masks = [box(shape, *(r[i] for r in ranges)) for i in range(2)]
    found = measure(*masks, spacing, 2 * spacing[axis])
    # front to front 3 voxels, but back to front only 1
    assert found["nsd"] == pytest.approx(0.5, abs=0.07) and found["hd95"] == pytest.approx(3 * spacing[axis])


def test_spheres_of_one_centre():
    spacing, shape = (0.5, 1, 1), (80, 44, 44)
    small, large = ball(14, spacing, shape), ball(18, spacing, shape)
    found = measure(small, large, spacing, 5)
    assert found["nsd"] == 1 and found["hd95"] == pytest.approx(4, abs=0.5)
    assert measure(small, large, spacing, 2)["nsd"] == 0
    assert found["reference_ml"] == pytest.approx(4 / 3 * math.pi * 1.4**3, rel=0.01)
    # marching cubes on voxels are stairs: more than the area of the sphere
    assert measure(small, small, spacing, 0) == {**found, "nsd": 1, "hd95": 0, "predicted_ml": found["reference_ml"]}


def test_a_speck_far_away_counts_by_its_area():
    """Less than 5% of the surface: HD95 does not see it, NSD loses its share."""
    reference = box((40, 40, 40), (2, 22), (2, 22), (2, 22))
    prediction = reference.copy()
    prediction[38, 38, 38] = True
    found = measure(reference, prediction, (1, 1, 1), 1)
    assert found["hd95"] == 0 and 0.99 < found["nsd"] < 1


@pytest.mark.parametrize("spacing, shape", [((2, 1, 1), (6, 5, 4)), ((999, 0.5, 0.5), (1, 8, 6))])
def test_empty_masks(spacing, shape):
    nothing, something = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    something[0, 2:4, 2:4] = True
    both = measure(nothing, nothing, spacing, 1)
    assert math.isnan(both["nsd"]) and math.isnan(both["hd95"]) and both["predicted_ml"] == both["reference_ml"] == 0
    # the thickness of a single slice is no length of the image
    diagonal = np.linalg.norm([n * mm for n, mm in zip(shape, spacing, strict=True) if n > 1])
    for pair, name in (((something, nothing), "reference_ml"), ((nothing, something), "predicted_ml")):
        found = measure(*pair, spacing, 1)
        assert (found["nsd"], found["hd95"]) == (0, pytest.approx(diagonal))
        assert found[name] == pytest.approx(4 * math.prod(spacing) / 1000)


def test_a_single_slice_has_contours():
    """As a 2D image; nnU-Net calls its thickness 999 mm."""
    reference, prediction = (mask[:1] for mask in blobs(5, (1, 30, 28)))
    found = measure(reference, prediction, (999, 0.7, 1.2), 1)
    options = {"include_background": True, "spacing": [0.7, 1.2], "use_subvoxels": True}
    theirs = compute_surface_dice(*as_tensors(prediction[0], reference[0]), [1.0], **options)
    assert found["nsd"] == pytest.approx(theirs.item(), abs=1e-6)
    other = measure(reference, prediction, (1, 0.7, 1.2), 1)
    assert (other["nsd"], other["hd95"]) == pytest.approx((found["nsd"], found["hd95"]))


def test_a_spacing_of_32_bits_does_not_decide():
    """A mask that is shifted by one voxel of 1 mm lies within 1 mm, whichever way the header rounded."""
    reference = box((12, 12, 12), (3, 8), (3, 8), (3, 8))
    for mm in (np.nextafter(np.float32(1), 2), 1, np.nextafter(np.float32(1), 0)):
        assert measure(reference, np.roll(reference, 1, 0), (float(mm), 1, 1), 1)["nsd"] == 1


def test_ties_stay_ties():
    """The same error elsewhere in the image gives the same numbers, whatever 1.3 is in binary."""
    found = []
    for start in range(3, 12):
        reference = box((30, 12, 12), (start, start + 8), (2, 9), (2, 9))
        prediction = np.roll(reference, 3, 0)
        reference[0, 0, 0] = prediction[0, 0, 0] = True
        found.append(measure(reference, prediction, (1.3, 1.1, 0.7), 2.1))
    assert all(other == found[0] for other in found)
    assert found[0]["hd95"] == 3.9
