"""Seeds for what draws from the global generators, as batchgeneratorsv2 does."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, independent of that of other numbers; these are at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seeds the global generators that batchgeneratorsv2 draws from, and puts their states back afterwards."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    # not torch.manual_seed, which would also seed every GPU
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
