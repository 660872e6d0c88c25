"""The probe of a run: when it is due, what it takes, and the encoder that it found best."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lightning_fabric import Fabric

from nnunetv2_hiendmae.architectures import Encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.probe import Probe, ProbeResult
from nnunetv2_hiendmae.pretraining.progress import (
    PROBE_DICE,
    PROBE_KEYS,
    PROBE_RANK,
    PROBE_SECONDS,
    PROBE_SHARE,
    PROBE_VOXELS,
    StepLog,
)
from nnunetv2_hiendmae.pretraining.settings import MOST_PROBE_SHARE, PretrainSettings
from nnunetv2_hiendmae.training.labelled import find_labelled
from nnunetv2_hiendmae.training.volumes import CaseSet
from nnunetv2_hiendmae.weights import read_metadata

logger = logging.getLogger(__name__)


class RunProbe:
    """Probes a run's encoder, in the process that writes; the others wait for its next step.

    Args:
        file: where the best encoder is kept.
        export: writes that file; gets the step, its name, and what the encoder was chosen by as `probe`.
    """

    def __init__(
        self,
        fabric: Fabric,
        settings: PretrainSettings,
        data: CaseSet,
        encoder: Encoder,
        file: Path,
        export: Callable[..., None],
    ):
        self._fabric, self._settings, self._encoder, self._file, self._export = fabric, settings, encoder, file, export
        chosen = settings.probe
        where = (settings.plans_name, settings.configuration, chosen.fold, len(chosen.train), data.format)
        self._probe = Probe(find_labelled(chosen.dataset, *where), settings.spec)
        self._period = settings.probe_epochs * settings.steps_per_epoch
        self._start: dict[str, float] = {}
        self._best = _recorded_dice(file) if settings.resume else None
        # seconds of every probe, in this process
        self._spent: list[float] = []
        self._warned = False

    def begin(self, log: StepLog) -> None:
        """Probes the encoder as it starts, and voxels, as the log's first line; a run that goes on has it there."""
        if log.first == 0:
            self._probe_start(log)
        elif log.first_line and log.first_line["step"] < 0:
            self._start = {key: log.first_line[key] for key in PROBE_KEYS if key in log.first_line}
        self._first, self._begun = log.first, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether the encoder is to be probed after so many steps."""
        return step % self._period == 0 or step == self._settings.total_steps

    def measure(self, step: int) -> dict[str, float]:
        """What is logged of the probe after so many steps; keeps the encoder if it is the best until now."""
        found, seconds = self._timed()
        share = self._share(step)
        told = f"Dice {found.dice:.4f}, effective rank {found.effective_rank:.1f}, {seconds:.2g} s"
        logger.info(f"probe after step {step}: {told}, {share:.1%} of the run")
        if share > MOST_PROBE_SHARE and not self._warned:
            self._warned = True
            logger.warning(f"the probe takes {share:.1%} of the run; raise --probe-every or lower --probe-cases")
        if self._best is None or found.dice > self._best:
            self._best = found.dice
            about = {**vars(self._settings.probe), **asdict(found)}
            about |= {"dice_at_start": self._start.get(PROBE_DICE), "dice_of_voxels": self._start.get(PROBE_VOXELS)}
            self._export(step, self._file.name, probe=about)
        if step == self._settings.total_steps:
            self._tell_end()
        costs = {PROBE_SECONDS: round(seconds, 3), PROBE_SHARE: round(share, 4)}
        return {PROBE_DICE: found.dice, PROBE_RANK: found.effective_rank, **costs}

    def _probe_start(self, log: StepLog) -> None:
        found, seconds = self._timed()
        self._start = {PROBE_DICE: found.dice, PROBE_VOXELS: self._probe.of_voxels(), PROBE_RANK: found.effective_rank}
        log.before_steps({**self._start, PROBE_SECONDS: round(seconds, 3)})
        told = f"Dice {found.dice:.4f}, of voxels {self._start[PROBE_VOXELS]:.4f}"
        logger.info(f"probe before the first step: {told}, effective rank {found.effective_rank:.1f}")

    def _timed(self) -> tuple[ProbeResult, float]:
        begun = time.monotonic()
        found = self._probe.of_encoder(self._encoder, self._fabric.autocast)
        self._spent.append(time.monotonic() - begun)
        return found, self._spent[-1]

    def _share(self, step: int) -> float:
        """Of the whole run's time that probes take, by what they and steps took until now."""
        total = self._settings.total_steps
        probes = 1 + -(-total // self._period)
        # the one before the first step
        since = self._spent[self._first == 0 :]
        per_step = (time.monotonic() - self._begun - sum(since)) / (step - self._first)
        probing = probes * sum(self._spent) / len(self._spent)
        return probing / (probing + total * per_step)

    def _tell_end(self) -> None:
        start = self._start.get(PROBE_DICE)
        if start is not None and self._best <= start:
            told = f"no probe was above the one before the first step ({self._best:.4f}, {start:.4f} there)"
            logger.warning(f"{told}: these features read no more classes than those that the run began with")


def _recorded_dice(file: Path) -> float | None:
    """What the best encoder until now was chosen by."""
    try:
        training = read_metadata(file).training or {} if file.exists() else {}
        return training.get("probe", {}).get("dice")
    except UserError as e:
        logger.warning(f"{e}: the best encoder of the probe is chosen anew")
        return None
