"""Samples of preprocessed cases by key, and batches of them, made by loader processes and brought to a device."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, Dataset, default_collate

from nnunetv2_hiendmae.environment import end_with_parent
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.training.volumes import CaseSet, CaseVolume, telling_unreadable

# how long a loader process serves on after it was asked to end
WORKER_GRACE_S = 30

Draw = Callable[[CaseVolume, np.random.Generator], dict[str, torch.Tensor | list[torch.Tensor]]]


class SampleDataset(Dataset):
    """Samples by key: a tuple of numbers that, with the seed, decides everything random in a sample.

    Args:
        draw: makes the tensors of a sample out of a volume and a generator.
        case_in_key: the last number of a key is that of the case; otherwise the generator draws the case first.
    """

    def __init__(self, data: CaseSet, draw: Draw, seed: int, case_in_key: bool = False):
        self.data, self.draw, self.seed, self.case_in_key = data, draw, seed, case_in_key

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        """What is drawn, and "case", the name it came from.

        Raises:
            UserError: the case cannot be read.
        """
        rng = np.random.default_rng([self.seed, *key])
        case = self.data.cases[key[-1] if self.case_in_key else rng.integers(len(self.data.cases))]
        with telling_unreadable(case):
            return {**self.draw(CaseVolume(case, self.data.format), rng), "case": case.name}


@dataclass(frozen=True)
class Boxes:
    """Arrays of different shapes, the same number in every sample: a batch of what cannot be stacked. Those that share
    memory still do when they have moved.

    Args:
        arrays: per sample.
    """

    arrays: tuple[tuple[torch.Tensor, ...], ...]

    def column(self, number: int) -> list[torch.Tensor]:
        """Array `number` of every sample."""
        return [sample[number] for sample in self.arrays]

    def to(self, *args: Any, **kwargs: Any) -> "Boxes":
        """On a device, as a tensor's `to`."""
        # as Fabric moves tensors: pinned memory is copied while the GPU works, and kept until then
        return self._each(lambda array: array.to(*args, **{"non_blocking": array.device.type == "cpu", **kwargs}))

    def pin_memory(self, *_: Any) -> "Boxes":
        """In memory that a GPU reads by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Boxes":
        moved: dict[int, torch.Tensor] = {}

        def move(array: torch.Tensor) -> torch.Tensor:
            storage = array.untyped_storage()
            if storage.data_ptr() not in moved:
                moved[storage.data_ptr()] = change(array.new_empty(0).set_(storage))
            return moved[storage.data_ptr()].as_strided(array.size(), array.stride(), array.storage_offset())

        return Boxes(tuple(tuple(map(move, sample)) for sample in self.arrays))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: lists of arrays become `Boxes`, the rest is stacked."""
    return {
        key: Boxes(tuple(map(tuple, values))) if isinstance(values[0], list) else default_collate(values)
        for key, values in ((key, [sample[key] for sample in samples]) for key in samples[0])
    }


def load_batches(fabric: Fabric, dataset: Dataset, keys: Iterable[list[Any]], workers: int) -> Iterator[dict[str, Any]]:
    """Batches on the device, in the order of `keys`, one list per batch, whatever the number of workers.

    Raises:
        UserError: a sample's, without the traceback that a worker puts around it.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        collate_fn=collate,
    )
    try:
        yield from fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    except UserError as e:
        raise UserError(str(e).strip().splitlines()[-1].rpartition("UserError: ")[2]) from e


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach workers too: they go on serving until the step has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
    end_with_parent()
