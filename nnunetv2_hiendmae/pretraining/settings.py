"""What a pretraining run computes: the user's options over defaults of the method and the preset."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.environment import dataset_id
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import SETTINGS, STEP, read_settings, sha256
from nnunetv2_hiendmae.optim import warmup_cosine
from nnunetv2_hiendmae.options import option, parse_assignments
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.method import Method
from nnunetv2_hiendmae.schemas import CLOSED, validated
from nnunetv2_hiendmae.training import run
from nnunetv2_hiendmae.training.labelled import find_labelled, num_crops
from nnunetv2_hiendmae.training.launch import choose_precision, num_processes
from nnunetv2_hiendmae.training.volumes import CaseSet, check_crop_size, find_cases
from nnunetv2_hiendmae.weights import check_encoder_file
from nnunetv2_hiendmae.weights.adapt import check_compatible
from nnunetv2_hiendmae.weights.hub import hub_name, lasting_path, local_file

logger = logging.getLogger(__name__)

# of a run's time that its probes take at most, where nobody says how often
MOST_PROBE_SHARE = 0.05


@dataclass(frozen=True)
class Start:
    """An encoder file that a run's encoder starts from, and what it says of where its weights come from.

    Args:
        file: its path, in a run's record its name.
    """

    __pydantic_config__: ClassVar = CLOSED
    file: str = ""
    sha256: str = ""
    method: str = ""
    citations: tuple[str, ...] = ()
    licence: str = ""
    source: str | None = None
    source_sha256: str | None = None


@dataclass(frozen=True)
class ProbeCases:
    """Names of the labelled cases that a run's probe is fitted to and tested on."""

    __pydantic_config__: ClassVar = CLOSED
    dataset: str
    fold: int
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(run.RunSettings, PretrainOptions):
    """What a run computes, and how: its options, all decided.

    Args:
        options: of the method.
        batch_size: crops per optimizer step over all processes and accumulated micro-batches.
        betas: of AdamW.
        start: the encoder file that the encoder's weights come from.
        extensions: epoch at which the run was finished and went on, and its schedule from there.
        probe: what its encoders are tested on, every `probe_epochs`; it decides nothing of the encoder.

    Raises:
        UserError: a value is out of range.
    """

    datasets: tuple[str, ...]
    options: dict[str, Any]
    spec: EncoderSpec
    betas: tuple[float, float]
    encoder: str = option("", "preset, or the method whose weights it starts from")
    start: Start | None = None
    extensions: tuple[tuple[int, str], ...] = ()
    probe: ProbeCases | None = None

    keys: ClassVar = (
        *("datasets", "plans_name", "configuration", "method", "options", "spec", "epochs", "steps_per_epoch"),
        *("warmup_epochs", "batch_size", "accumulate", "lr", "weight_decay", "betas", "precision", "seed"),
        *("checkpoint_epochs", "picture_epochs"),
    )
    # recorded where there are such
    optional: ClassVar = ("start", "extensions", "probe", "probe_epochs")
    not_deciding: ClassVar = ("accumulate", "checkpoint_epochs", "picture_epochs", "probe_epochs")

    def __post_init__(self):
        super().__post_init__()
        if self.spec.drop_path_rate:
            # its draws come from the global generator: neither stateless nor in the checkpoint
            raise UserError(
                f"drop_path_rate {self.spec.drop_path_rate} is for fine-tuning only, needed 0 in pretraining"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak learning rate."""
        return self.warmup_epochs * self.steps_per_epoch

    def lr_factor(self, step: int) -> float:
        """Of the peak learning rate, at a step: warm-up, then a cosine to 0; the same anew in each extension, or the
        peak itself after its warm-up where that is constant."""
        per_epoch = self.steps_per_epoch
        starts = [(0, "cosine"), *self.extensions]
        begin, schedule = [(epoch, name) for epoch, name in starts if epoch * per_epoch <= step][-1]
        end = min((epoch for epoch, _ in starts if epoch > begin), default=self.epochs)
        length = (end - begin) * per_epoch
        warmup = min(self.warmup_steps, length // 10) if begin else self.warmup_steps
        position = step - begin * per_epoch
        return 1.0 if schedule == "constant" and position >= warmup else warmup_cosine(position, warmup, length)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        recorded = super().to_dict()
        if self.start:
            recorded["start"] = vars(self.start) | {"file": Path(self.start.file).name}
        if self.extensions:
            recorded["extensions"] = self.extensions
        if self.probe:
            recorded |= {"probe": vars(self.probe), "probe_epochs": self.probe_epochs}
        return json.loads(json.dumps(recorded))

    def deciding(self) -> dict[str, Any]:
        """The number of micro-batches too, where a method compares the samples of one."""
        compared = {"accumulate": self.accumulate} if METHODS[self.method].compares_samples else {}
        return {**super().deciding(), **compared}

    def as_before(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the result of the run that is recorded, if this one extends it."""
        *earlier, (epochs, _) = self.extensions or [(self.epochs, "")]
        extends = self.extensions and recorded.get("epochs") == epochs
        return (replace(self, epochs=epochs, extensions=tuple(earlier)) if extends else self).deciding()

    def build_method(self) -> Method:
        """The method with freshly initialised weights; the same ones for the same seed."""
        torch.manual_seed(self.seed)
        try:
            return METHODS[self.method](self.spec, **self.options)
        except (ValueError, AssertionError, RuntimeError) as e:
            # timm and torch check sizes with assertions and runtime errors
            raise UserError(f"{self.method} cannot be built with {self.options}: {e}; change --set") from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PretrainSettings":
        """Inverse of `to_dict`; how a run is carried out is as by default.

        Raises:
            ValueError, TypeError: keys are missing or unknown, or a value is not of its kind.
            UserError: a value is out of range.
        """
        if differing := set(data) - set(cls.optional) ^ set(cls.keys):
            raise ValueError(f"missing or unknown: {', '.join(sorted(differing))}")
        return validated(cls, json.dumps(dict(data)))


def build_settings(datasets: Iterable[str | int], options: PretrainOptions) -> tuple[PretrainSettings, CaseSet]:
    """Settings and data of a run.

    Raises:
        UserError: unknown method, preset or option, a crop that the patch does not divide, or no such data.
    """
    method = METHODS[options.method]
    method_options = read_options(method, options.method_options or ())
    data = find_cases(datasets, options.plans_name, options.configuration)
    recipe = method.recipe
    start, spec = _start(options, len(data.format.channel_names), options.encoder or recipe.encoder)
    epochs, batch_size = options.epochs or recipe.epochs, options.batch_size or recipe.batch_size
    values = {
        **vars(recipe),
        "warmup_epochs": min(recipe.warmup_epochs, epochs // 10),
        # fewer micro-batches where the batch of a process cannot be split into as many
        "accumulate": math.gcd(recipe.accumulate, batch_size // num_processes()),
        **{name: value for name, value in vars(options).items() if value is not None},
        "datasets": data.datasets,
        "options": method_options,
        "spec": spec,
        "start": start,
        "probe": None,
        "precision": choose_precision(options.precision, options.device),
    }
    if start and not options.encoder:
        values["encoder"] = f"from_{start.method}"
    settings = PretrainSettings(**{**values, **_probe(options, data, spec, values["steps_per_epoch"] * batch_size)})
    if options.accumulate is None and settings.accumulate != recipe.accumulate:
        whole = f"batch {batch_size} on {num_processes()} processes"
        logger.info(
            f"{settings.accumulate} micro-batches per step instead of {recipe.accumulate}: {whole} gives no more"
        )
    if options.crop_size:
        check_crop_size(data.cases, options.crop_size)
    with torch.device("meta"):
        # what cannot be built is told before anything is written
        settings.build_method()
    return settings, data


def run_name(settings: PretrainSettings) -> str:
    """Default name of a run: method, preset and dataset ids."""
    return "_".join([settings.method, settings.encoder, *(f"{dataset_id(name):03d}" for name in settings.datasets)])


def read_options(method: type[Method], asked: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method from texts `key=value`, or as they are.

    Raises:
        UserError: no '=', an unknown key, or a value of another type.
    """
    if not isinstance(asked, Mapping):
        return parse_assignments(method.Options, list(asked), method.name)
    unknown = [name for name in asked if name not in method.defaults()]
    if unknown:
        raise UserError(f"{unknown[0]} is no option of {method.name}, needed some of: {', '.join(method.defaults())}")
    return dict(asked)


def _sized(spec: EncoderSpec, options: PretrainOptions, channels: int) -> EncoderSpec:
    sizes = {"patch_size": options.patch_size, "img_size": options.crop_size}
    try:
        return spec.with_(in_channels=channels, **{k: tuple(v) for k, v in sizes.items() if v})
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the patch, or another --patch-size") from e


def _probe(options: PretrainOptions, data: CaseSet, spec: EncoderSpec, samples_per_epoch: int) -> dict[str, Any]:
    """Cases of the probe, and how many epochs lie between two: whatever the method, a step's sample takes no less time
    than a crop that is only encoded."""
    if options.probe is None:
        if (options.probe_fold, options.probe_cases, options.probe_epochs) != (None, None, None):
            raise UserError("--probe-fold, --probe-cases and --probe-every belong to --probe DATASET; name that too")
        return {}
    try:
        found = find_labelled(
            options.probe,
            options.plans_name,
            options.configuration,
            options.probe_fold or 0,
            options.probe_cases,
            data.format,
        )
    except UserError as e:
        raise UserError(f"--probe {options.probe}: {e}") from e
    train, test = ([case.path.stem for case in cases] for cases in (found.train, found.test))
    crops = sum(num_crops(case.shape, spec.img_size) for case in (*found.train, *found.test))
    epochs = options.probe_epochs or math.ceil(crops / (MOST_PROBE_SHARE * samples_per_epoch))
    return {"probe": ProbeCases(found.dataset, found.fold, tuple(train), tuple(test)), "probe_epochs": epochs}


def warn_if_seen(settings: PretrainSettings, data: CaseSet) -> None:
    """Says so where test cases of the probe are among the images of pretraining."""
    probe, seen = settings.probe, {case.name for case in data.cases}
    if probe and (known := [name for name in probe.test if f"{probe.dataset}/{name}" in seen]):
        told = f"the probe's test cases {', '.join(known)} of {probe.dataset} are among the images of pretraining"
        logger.warning(f"{told}: its Dice is not that of unseen images; choose another --probe-fold or -d")


def _start(options: PretrainOptions, channels: int, preset: str) -> tuple[Start | None, EncoderSpec]:
    """Where the encoder's weights come from, and the encoder: that of the file, where no preset is given."""
    if options.encoder_file is None:
        return None, _sized(PRESETS[preset], options, channels)
    file = local_file(options.encoder_file)
    metadata, digest, named = check_encoder_file(file), sha256(file), hub_name(file)
    own = metadata.spec.with_(drop_path_rate=0.0)
    spec = _sized(PRESETS[preset] if options.encoder else own, options, channels)
    check_compatible(metadata.spec, spec, "leave out --encoder and --patch-size, which the file decides")
    known = {name: getattr(metadata, name) for name in ("method", "citations", "licence", "source", "source_sha256")}
    known["source"] = named or metadata.source or file.resolve().name
    if named:
        known["source_sha256"] = digest
    return Start(file=str(lasting_path(file)), sha256=digest, **known), spec


def extended(settings: PretrainSettings, options: PretrainOptions, run_dir: Path) -> PretrainSettings:
    """Settings of a run that goes on, with the extensions that it had and one more where it gets more epochs.

    Raises:
        UserError: more epochs for a run that is not finished.
    """
    if not settings.resume or not (run_dir / SETTINGS).exists():
        return settings
    recorded = read_settings(run_dir)
    extensions, before = recorded.get("extensions", []), recorded.get("epochs")
    if isinstance(before, int) and before < settings.epochs:
        state = run.load_checkpoint(run_dir, (STEP,))
        if state is None or state[STEP] != before * settings.steps_per_epoch:
            told = f"{run_dir} is not finished: epoch {before} comes before {settings.epochs}"
            raise UserError(f"{told}; run the same command with --epochs {before} first")
        extensions = [*extensions, [before, options.schedule]]
    if not extensions:
        return settings
    warmup = recorded.get("warmup_epochs") if options.warmup_epochs is None else settings.warmup_epochs
    try:
        return replace(settings, warmup_epochs=warmup, extensions=tuple((int(e), str(s)) for e, s in extensions))
    except (TypeError, ValueError) as e:
        raise UserError(f"{run_dir / SETTINGS} is damaged (extensions: {e}); start anew under another --name") from e
