"""Montages: what their rows are called, and that it can be read. Progress curves are in test_loop.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from nnunetv2_hiendmae.pretraining.method import Reconstruction
from nnunetv2_hiendmae.pretraining.progress import draw_reconstruction
from nnunetv2_hiendmae.volume_format import VolumeFormat

CT = VolumeFormat((1.0,) * 3, (-1000.0, 1000.0), "SimpleITKIO", -1000.0, 2000.0, ("CTNormalization",), ("CT",))
MR = VolumeFormat((1.0,) * 3, None, "SimpleITKIO", None, None, ("ZScoreNormalization",), ("T1",))


@pytest.fixture
def draw(tmp_path, drawn):
    """Draws and gives back the figure, laid out."""

    def run(image, cases, volumes=CT, prediction=None, hidden=None, true_scale=True, edges=None):
        hidden = torch.zeros_like(image[:, 0], dtype=torch.bool) if hidden is None else hidden
        made = Reconstruction(image, image, image if prediction is None else prediction, hidden, true_scale)
        draw_reconstruction(tmp_path / "picture.png", made, cases, volumes, edges or [""] * len(cases))
        figure = drawn.pop()
        figure.draw_without_rendering()
        return figure

    return run


def labels(figure) -> list[str]:
    return [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]


@pytest.mark.parametrize("size", [(16, 8, 64), (8, 16, 16), (16, 64, 8)])
def test_labels_of_rows_do_not_touch(draw, size):
    """Whatever the height of rows and the length of names."""
    cases = ["Dataset901_DemoUnlabelledCT/" + "1.2.840.113619." * 2 + str(i) for i in range(4)]
    for names in (cases, [c.replace("901", str(900 + i)) for i, c in enumerate(cases)]):
        figure = draw(torch.rand(4, 1, *size), names)
        boxes = [axis.yaxis.label.get_window_extent() for axis in figure.axes if axis.get_ylabel()]
        pictures = [axis.get_window_extent() for axis in figure.axes]
        assert len(boxes) == 4
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
        assert all(box.x0 >= 0 and not box.overlaps(picture) for box in boxes for picture in pictures)


def test_a_row_is_called_after_its_case(draw):
    """The dataset is only named where there are several."""
    image = torch.rand(2, 1, 4, 4, 4)
    assert labels(draw(image, ["Dataset001_A/x", "Dataset001_A/y"])) == ["x", "y"]
    assert labels(draw(image, ["Dataset001_A/x", "Dataset002_B/x"], MR)) == ["Dataset001_A\nx", "Dataset002_B\nx"]


@pytest.mark.parametrize("volumes", [CT, MR])
def test_a_constant_view_looks_constant(draw, volumes):
    """Air and padding are predicted to about 1e-3 of the normalised intensity: less than a tenth of the grey scale."""
    image = torch.zeros(1, 1, 8, 8, 8)
    noise = 1e-3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    figure = draw(image, ["Dataset001_A/x"], volumes, prediction=image + noise)
    shown = figure.axes[2].images[0]
    low, high = shown.get_clim()
    assert np.ptp(shown.get_array()) > 0 and (shown.get_array().max() - low) / (high - low) <= 0.1 + 1e-6


def test_grey_values_are_the_window_of_ct_and_percentiles_of_the_whole_crop_else(draw):
    """Neither a middle slice without contrast nor a few bright voxels decide them."""
    image = torch.zeros(1, 1, 10, 10, 10)
    image[:, :, :5] = torch.linspace(0, 1, 500).view(5, 10, 10)
    image[..., 0, 0] = 50.0 * (torch.arange(10) < 2)
    for volumes, low, high in ((CT, -1000.0, 1000.0), (MR, 0.0, 1.0)):
        limits = draw(image, ["Dataset001_A/x"], volumes).axes[0].images[0].get_clim()
        assert limits == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize("volumes", [CT, MR])
def test_masked_patches_have_a_colour_that_is_not_grey(draw, volumes):
    hidden = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    hidden[..., 4:] = True
    shown = [axis.images[0] for axis in draw(torch.zeros(1, 1, 8, 8, 8), ["D/x"], volumes, hidden=hidden).axes]
    coloured = [np.ptp(image.to_rgba(image.get_array())[..., :3], axis=-1) > 0.2 for image in shown]
    assert np.array_equal(coloured[1], hidden[0, 4]) and not coloured[0].any() and not coloured[2].any()


def test_letters_stand_at_their_edges(draw):
    figure = draw(torch.rand(2, 1, 8, 8, 8), ["D/x", "D/y"], edges=["APRL", ""])
    letters = [{text.get_text(): text.get_position() for text in axis.texts} for axis in figure.axes]
    assert letters[3:] == [{}] * 3 and letters[0] == letters[1] == letters[2]
    at = letters[0]
    assert at["A"][1] > 0.9 and at["P"][1] < 0.1 and at["R"][0] < 0.1 and at["L"][0] > 0.9


def test_a_picture_says_what_its_grey_values_are(draw):
    title = [draw(torch.rand(1, 1, 8, 8, 8), ["D/x"], v, true_scale=t).get_suptitle() for v in (CT, MR) for t in (1, 0)]
    assert ["true" in text for text in title] == [True, False] * 2
    assert ["-1000 to 1000 HU" in text for text in title] == [True, True, False, False]
