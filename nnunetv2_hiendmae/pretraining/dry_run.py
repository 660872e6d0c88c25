"""`hiendmae pretrain --dry-run`: checks of a run, a few steps, and what the whole of it takes. Writes nothing."""

import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from nnunetv2_hiendmae.files import STEP
from nnunetv2_hiendmae.host_memory import RSS_UNIT
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining.loop import check, decide, prepare
from nnunetv2_hiendmae.pretraining.method import Batch
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings
from nnunetv2_hiendmae.pretraining.steps import Learner, part_processes, telling_full_memory
from nnunetv2_hiendmae.training import run
from nnunetv2_hiendmae.training.batches import SampleDataset
from nnunetv2_hiendmae.training.launch import on_first_process
from nnunetv2_hiendmae.training.runlog import check_wandb
from nnunetv2_hiendmae.training.volumes import CaseSet

# the first is slower: memory is claimed, kernels are chosen, loaders start
STEPS = 3
# drawn one by one, to know how fast loaders are
DRAWN = 4
GB = 1e9


@dataclass(frozen=True)
class DryRun:
    """What a dry run found. Seconds and bytes; the largest process's, where there are several.

    Args:
        parameters: of the encoder, and of all that is trained.
        first_step: where the run would begin; not 0 if it is continued.
        seconds: of each step that was done.
        waited: of these, for images.
        draw_seconds: of one sample in one process.
        gpu: peak of what torch keeps on a GPU, None without one.
        process, loader: peak of a process, and of the largest of its loader workers; None where it is not known.
        checkpoint, free: its size, and what is free on the disk.
    """

    settings: PretrainSettings
    data: CaseSet
    run_dir: Path
    processes: int
    parameters: tuple[int, int]
    first_step: int
    seconds: tuple[float, ...]
    waited: tuple[float, ...]
    draw_seconds: float
    gpu: int | None
    process: int | None
    loader: int | None
    checkpoint: int
    free: int

    @property
    def steps_left(self) -> int:
        """Steps that the run would do."""
        return self.settings.total_steps - self.first_step

    @property
    def seconds_per_step(self) -> float:
        """The median of all but the first, or that of loaders that cannot follow."""
        return max(statistics.median(self.seconds[1:] or self.seconds), self.loading_seconds)

    @property
    def loading_seconds(self) -> float:
        """In which all loader workers make the samples of a step; 0 without them, as steps then include it."""
        workers = self.settings.workers * self.processes
        return self.draw_seconds * self.settings.batch_size / workers if workers else 0.0

    def text(self) -> str:
        """One line per matter."""
        settings, left = self.settings, self.steps_left
        if not left:
            return f"{self.run_dir} is finished: nothing is left to do (more --epochs with --c extend it)"
        encoder, trained = (f"{n / 1e6:,.1f} million parameters" for n in self.parameters)
        crop, patch = (" x ".join(map(str, size)) for size in (settings.spec.img_size, settings.spec.patch_size))
        voxels = sum(math.prod(case.shape) for case in self.data.cases)
        cases = _count(len(self.data.cases), "case", "s")
        part = settings.batch_size // settings.accumulate // self.processes
        split = " x ".join([_count(settings.accumulate, "micro-batch"), _count(self.processes, "process"), str(part)])
        also = ", probes" if settings.probe else ""
        per_step, begins = self.seconds_per_step, f", from step {self.first_step}" if self.first_step else ""
        hours = left * per_step / 3600
        lines = {
            "encoder": f"{settings.encoder}, {encoder}, crop {crop}, patch {patch}; {settings.method} trains {trained}",
            "data": f"{cases}, {voxels / 1e6:,.1f} million voxels, {', '.join(settings.datasets)}",
            "step": f"{settings.batch_size} samples = {split}, {settings.precision} on {settings.device}",
            "run": f"{settings.steps_per_epoch} steps per epoch, {settings.total_steps} in all{begins}",
            **self._probe(),
            "speed": self._speed(),
            "time": f"about {hours:.3g} hours for {left} steps, without checkpoints{also} and pictures",
            "memory": self._memory(),
            "disk": f"a checkpoint has {self.checkpoint / GB:.3g} GB (twice that while it is replaced), "
            f"{self.free / GB:,.0f} GB are free for {self.run_dir}",
        }
        return "\n".join(f"{name}: {told}" for name, told in lines.items())

    def _probe(self) -> dict[str, str]:
        if not (probe := self.settings.probe):
            return {}
        cases = f"{', '.join(probe.train)} to fit, {', '.join(probe.test)} to test"
        period = _count(self.settings.probe_epochs, "epoch", "s")
        return {"probe": f"{probe.dataset} fold {probe.fold}, {cases}, every {period}"}

    def _speed(self) -> str:
        rest, per_step = self.seconds[1:], statistics.median(self.seconds[1:] or self.seconds)
        of = f"median of {len(rest)}, after a first of {self.seconds[0]:.3g} s" if rest else "of the only step"
        waited = statistics.median(self.waited[1:] or self.waited)
        rate = f"{self.settings.batch_size / per_step:.3g} samples/s, {per_step:.3g} s per step"
        told = f"{rate} ({of}), {waited:.2g} s of it waiting for images"
        if self.loading_seconds > per_step:
            most = f"{self.settings.batch_size / self.loading_seconds:.3g} samples/s"
            told += f"; in the long run {self.settings.workers} --workers make {most} at most, which is taken below"
        return told

    def _memory(self) -> str:
        whose = {"on the GPU": self.gpu, "in the process": self.process}
        told = [f"{size / GB:.3g} GB {where}" for where, size in whose.items() if size is not None]
        if self.settings.workers and self.loader is not None:
            workers = _count(self.settings.workers, "loader worker", "s")
            told.append(f"up to {self.loader / GB:.3g} GB in each of {workers}, much of it shared with the process")
        each = f", for each of {self.processes} processes" if self.processes > 1 else ""
        return f"peak {', '.join(told)}{each}" if told else "not known on this system"


def _count(number: int, one: str, plural: str = "es") -> str:
    return f"{number} {one}{'' if number == 1 else plural}"


def dry_run(datasets: Iterable[str | int], options: PretrainOptions | None = None, **changes: Any) -> DryRun | None:
    """Checks all that `pretrain` with the same arguments would, and takes a few of its steps; writes nothing.

    Returns:
        What was found; None in all processes but the first.

    Raises:
        UserError: as `pretrain`.
    """
    settings, data, run_dir = decide(datasets, options, changes)
    fabric, method = prepare(settings, run_dir)

    def check_all() -> None:
        check(settings, data, method, run_dir)
        run.check_claimable(run_dir, settings, data.digest())
        check_wandb()

    on_first_process(fabric, check_all)
    with telling_full_memory(settings):
        found = _measure(Learner.set_up(fabric, settings, method), data, run_dir)
    part_processes(fabric)
    return found if fabric.is_global_zero else None


def _measure(learner: Learner, data: CaseSet, run_dir: Path) -> DryRun:
    fabric, settings, method = learner.fabric, learner.settings, learner.method
    first = learner.restore(run_dir)
    steps = range(first, min(first + STEPS, settings.total_steps))
    batches, waits, seconds, waited = learner.batches(data, steps), [], [], []
    timed = _timed(batches, waits)
    for step in steps:
        begun, before = time.perf_counter(), len(waits)
        learner.step(step, timed)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        seconds.append(time.perf_counter() - begun)
        waited.append(sum(waits[before:]))
    # ends the loader workers, which makes their memory known
    batches.close()
    gpu = torch.cuda.max_memory_reserved(fabric.device) if fabric.device.type == "cuda" else None
    sizes = [_largest(fabric, size) for size in (gpu, *_peak_memory())]
    samples, draws = SampleDataset(data, learner.views.draw, settings.seed), []
    for i in range(DRAWN if steps else 0):
        begun = time.perf_counter()
        _ = samples[settings.total_steps, i]
        draws.append(time.perf_counter() - begun)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return DryRun(
        *(settings, data, run_dir, fabric.world_size),
        (sum(p.numel() for p in method.encoder.parameters()), trained),
        *(first, tuple(seconds), tuple(waited), statistics.median(draws or [0.0])),
        *sizes,
        run.state_size(learner.parts, **{STEP: first}),
        run.free_disk(run_dir),
    )


def _timed(batches: Iterator[Batch], waits: list[float]) -> Iterator[Batch]:
    """The same batches; how long each took to come is put into `waits`."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - begun)
        if batch is None:
            return
        yield batch


def _peak_memory() -> tuple[int | None, int | None]:
    """Bytes of this process and of the largest of its children that have ended; None where the system does not say."""
    if os.name != "posix":
        return None, None
    import resource

    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_maxrss * RSS_UNIT, children.ru_maxrss * RSS_UNIT


def _largest(fabric: Fabric, size: int | None) -> int | None:
    if size is None or fabric.world_size == 1:
        return size
    # all_reduce of float64: float32 counts bytes exactly up to 16 MB only
    return int(fabric.all_reduce(torch.tensor(size, dtype=torch.float64, device=fabric.device), reduce_op="max").item())
