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

    def run(image, cases, volumes=CT, prediction=None):
        made = Reconstruction(image, image, image if prediction is None else prediction)
        draw_reconstruction(tmp_path / "picture.png", made, cases, volumes)
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
    """The dataset is only named where there are several; CT with its range in HU."""
    image = torch.tensor([0.0, 0.6])[:, None, None, None, None] * torch.linspace(0, 1, 4)[:, None, None]
    image = image.expand(2, 1, 4, 4, 4).contiguous()
    assert labels(draw(image, ["Dataset001_A/x", "Dataset001_A/y"])) == ["x\n-1000 to -1000 HU", "y\n-1000 to 200 HU"]
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


def test_grey_values_are_those_of_the_whole_crop(draw):
    """A middle slice without contrast is not stretched."""
    image = torch.zeros(1, 1, 8, 8, 8)
    image[..., 4, 0, 0], image[..., 0, 0, 0] = 0.001, 1.0
    assert draw(image, ["Dataset001_A/x"]).axes[0].images[0].get_clim() == (-1000.0, 1000.0)
