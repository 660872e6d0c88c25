"""From what the user asked for to the task of a run: labels, cases, split and settings, all checked."""

from argparse import Namespace
from dataclasses import replace

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.classification.data import Inputs
from nnunetv2_hiendmae.classification.device import choose_precision
from nnunetv2_hiendmae.classification.labels import SPLIT, match_labels, read_labels
from nnunetv2_hiendmae.classification.settings import ClassifySettings
from nnunetv2_hiendmae.classification.splits import choose_split
from nnunetv2_hiendmae.classification.train import Task
from nnunetv2_hiendmae.environment import dataset_name
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.pretraining.data import find_data
from nnunetv2_hiendmae.weights import EncoderMetadata, read_metadata

# ours, nobody published them: METHODS §6's for end-to-end fine-tuning, ten times that for a linear layer alone
LR, LR_FROZEN = 1e-4, 1e-3
WARMUP_FRACTION = 0.1


def build_task(args: Namespace) -> Task:
    """Task of `hiendmae classify train`'s arguments.

    Raises:
        UserError: anything about the labels, the data, the encoder file or an option is wrong; nothing was written.
    """
    file = read_labels(args.labels)
    metadata = read_metadata(args.encoder_file)
    # a dataset given twice, by id and by name, is one dataset
    datasets = tuple(dict.fromkeys(dataset_name(d) for d in args.datasets))
    data = find_data(datasets, args.plans, args.configuration)
    labels = match_labels(file, [case.name for case in data.cases])
    split = choose_split(labels, args.fold, args.fraction, args.split_seed)
    spec = _spec(metadata, len(data.format.channel_names), args.crop_size)
    default_lr = LR_FROZEN if args.freeze_encoder else LR
    settings = ClassifySettings(
        datasets=datasets,
        plans_name=args.plans,
        configuration=args.configuration,
        spec=spec,
        encoder_file=str(args.encoder_file.resolve()),
        encoder_sha256=sha256(args.encoder_file),
        labels_sha256=labels.digest(),
        fold=None if labels.column == SPLIT else args.fold or "0",
        fraction=args.fraction,
        inputs=Inputs(args.input, spec.img_size, args.crops),
        epochs=args.epochs,
        warmup_epochs=int(WARMUP_FRACTION * args.epochs) if args.warmup_epochs is None else args.warmup_epochs,
        batch_size=args.batch_size,
        lr=default_lr if args.lr is None else args.lr,
        weight_decay=args.weight_decay,
        precision=choose_precision(args.precision, args.device),
        pool=args.pool,
        freeze_encoder=args.freeze_encoder,
        from_scratch=args.from_scratch,
        augmentation=args.augmentation,
        seed=args.seed,
        split_seed=args.split_seed,
        validate_epochs=args.validate_every,
        checkpoint_epochs=args.checkpoint_every,
    )
    labelled = tuple(case for case in data.cases if case.name in labels.targets)
    return Task(settings, replace(data, cases=labelled), labels, split)


def run_name(args: Namespace, settings: ClassifySettings) -> str:
    """Default name of a run: label file, encoder's method, what trains, input, share of the labels, fold."""
    method = "scratch" if settings.from_scratch else read_metadata(args.encoder_file).method
    trained = "probe" if settings.freeze_encoder else "finetune"
    share = f"{100 * settings.fraction:g}pct"
    fold = SPLIT if settings.fold is None else f"fold{settings.fold}"
    return "_".join([args.labels.stem, method, trained, settings.inputs.mode, share, fold])


def _spec(metadata: EncoderMetadata, channels: int, crop_size: list[int] | None) -> EncoderSpec:
    source = metadata.spec
    if source.in_channels not in (1, channels):
        raise UserError(
            f"the encoder has {source.in_channels} input channels, the images {channels}: only 1 can be spread; choose "
            "another -w"
        )
    try:
        # stochastic depth draws from the global generator: not reproducible from (seed, epoch, case)
        return source.with_(in_channels=channels, img_size=tuple(crop_size or source.img_size), drop_path_rate=0.0)
    except ValueError as e:
        raise UserError(f"{e}; choose --crop-size as a multiple of the encoder's patch") from e
