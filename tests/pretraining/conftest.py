"""What runs of pretraining read."""

import pytest
from run_data import SHAPES, write_preprocessed


@pytest.fixture
def preprocessed(nnunet):
    return write_preprocessed(nnunet.preprocessed, SHAPES)
