"""A seed in the plans makes nnU-Net's training, with its loaders and augmentation, repeat itself."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunet_data import make_dataset, write_fingerprint
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workplace import make_workplace, prepare

from nnunetv2_hiendmae.plans_section import FinetuneRecipe, PlansSection
from nnunetv2_hiendmae.trainers.loaders import seeded
from nnunetv2_hiendmae.trainers.trainers import nnUNetTrainer_HiEndMAE


class Noise:
    """A loader that draws from both generators; `loader` of what nnU-Net calls so."""

    def __next__(self):
        return np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002

    def set_thread_id(self, thread_id):
        pytest.fail("of the wrapped loader, which has no number")


def augmenter(workers: int):
    """As nnU-Net makes it."""
    if workers == 0:
        return SingleThreadedAugmenter(Noise(), None)
    return NonDetMultiThreadedAugmenter(Noise(), None, workers, num_cached=6, wait_time=0.002)


def draw(count: int, workers: int = 0, seed=(5, 0, 0), first: int = 0) -> list:
    batches = seeded(augmenter(workers), seed, first)
    drawn = [next(batches) for _ in range(count)]
    if workers:
        batches._finish()
    return drawn


def test_a_batch_depends_on_seed_and_number_alone():
    drawn = draw(7)
    assert len({str(batch) for batch in drawn}) == 7
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert draw(4, first=3) == drawn[3:]
    # the network draws from it too
    assert torch.equal(torch.get_rng_state(), before)
    for workers in (1, 3):
        assert draw(7, workers) == drawn
    assert draw(4, 2, first=3) == drawn[3:]
    others = draw(3, seed=(6, 0, 0)) + draw(3, seed=(5, 1, 0)) + draw(3, seed=(5, 0, 1))
    assert len({str(batch) for batch in drawn + others}) == 16


def test_processes_and_loaders_have_batches_of_their_own(monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, "get_dataloaders", lambda _: (augmenter(0), augmenter(0)))
    trainer = object.__new__(nnUNetTrainer_HiEndMAE)
    trainer.section = PlansSection(recipe=FinetuneRecipe(seed=5))
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = trainer.current_epoch = 1
    drawn = set()
    for trainer.local_rank in (0, 1):
        drawn |= {str(next(loader)) for loader in trainer.get_dataloaders()}
    assert len(drawn) == 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Workplace and plans, with a seed, stochastic depth and a decoder warm-up."""
    workplace = make_workplace(tmp_path_factory.mktemp("seeds") / "nnunet")
    name = make_dataset(workplace.folders, 1, cases=2, shape=(24, 28, 24))
    write_fingerprint(workplace.folders, name)
    planned = prepare(workplace, name, seed=5, drop_path_rate=0.5, decoder_warmup=1, warmup_epochs=0, epochs=2)
    return SimpleNamespace(workplace=workplace, planned=planned)


@pytest.fixture
def train(place, tmp_path, monkeypatch):
    """train(name of the results, …) → what the last checkpoint of nnU-Net's own loop holds, None if it was stopped."""
    for variable, value in place.workplace.environment.items():
        monkeypatch.setenv(variable, value)
    planned = place.planned
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda _: None)

    def run(results, workers=0, stop_after=None, continued=False):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
        # whatever happened before
        np.random.seed(workers)  # noqa: NPY002
        torch.manual_seed(workers)
        names = planned.dataset_name, "3d_fullres", "all", planned.trainer, planned.plans_name
        trainer = get_trainer_from_args(*names, continued, torch.device("cpu"))
        maybe_load_checkpoint(trainer, continued, False)
        trainer.save_every = 1
        with pytest.raises(KeyboardInterrupt) if stop_after else nullcontext():
            ends = trainer.on_epoch_end
            trainer.on_epoch_end = lambda: (ends(), stop(trainer.current_epoch == stop_after))
            trainer.run_training()
        final = Path(trainer.output_folder) / "checkpoint_final.pth"
        return torch.load(final, weights_only=False) if final.is_file() else None

    return run


def stop(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


def told(checkpoint) -> tuple:
    """Weights, moments and curves: all that a training leaves."""
    curves = {k: v for k, v in checkpoint["logging"].items() if not k.endswith("timestamps")}
    tensors = [*checkpoint["network_weights"].values()]
    tensors += [v for state in checkpoint["optimizer_state"]["state"].values() for v in state.values()]
    return curves, [t.tolist() for t in tensors]


@pytest.mark.slow
def test_a_training_repeats_itself_to_the_bit(train):
    """In one go, and with background workers, stopped in the decoder's warm-up and continued without."""
    first = told(train("once"))
    assert train("twice", workers=2, stop_after=1) is None
    assert told(train("twice", continued=True)) == first
