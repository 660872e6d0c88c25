"""nnU-Net's batches as a function of a seed and their number, in however many processes they are made."""

from typing import Any

import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_hiendmae.randomness import seed_of, seeded_globals


class SeededLoader:
    """nnU-Net's loader, which draws from the global generators of numpy and torch, with both seeded for every batch.

    Args:
        loader: transforms included; its next batch depends on the generators alone.
        seed: numbers that the seed of a batch is made of, besides the batch's own.
        first: number of the first batch.
        stride: workers that take turns; the k-th of them, told by `set_thread_id`, makes batches first + k, + stride …
    """

    def __init__(self, loader: nnUNetDataLoader, seed: tuple[int, ...], first: int, stride: int = 1):
        self.loader, self.seed, self.number, self.stride = loader, seed, first, stride

    def set_thread_id(self, thread_id: int) -> None:
        """batchgenerators calls it once in each worker."""
        # as nnU-Net's own workers do: a forked process has none of its parent's threads, and would wait for them
        torch.set_num_threads(1)
        self.number += thread_id

    def __next__(self) -> dict[str, Any]:
        seed = seed_of(*self.seed, self.number)
        self.number += self.stride
        with seeded_globals(seed):
            return next(self.loader)


def seeded(
    augmenter: SingleThreadedAugmenter | NonDetMultiThreadedAugmenter, seed: tuple[int, ...], first: int
) -> SingleThreadedAugmenter | MultiThreadedAugmenter:
    """Batches of nnU-Net's augmenter from number `first` on, in order, with as many workers as it has, started."""
    if isinstance(augmenter, SingleThreadedAugmenter):
        return SingleThreadedAugmenter(SeededLoader(augmenter.data_loader, seed, first), None)
    # its workers hand over what is ready first
    augmenter._finish()
    workers = augmenter.num_processes
    # one batch ahead per worker keeps about as many in memory as nnU-Net does
    ordered = MultiThreadedAugmenter(
        SeededLoader(augmenter.generator, seed, first, workers),
        None,
        workers,
        num_cached_per_queue=1,
        pin_memory=augmenter.pin_memory,
        wait_time=augmenter.wait_time,
    )
    ordered.restart()
    return ordered
