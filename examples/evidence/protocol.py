"""What is compared, on which images and with how much computing: the numbers of docs/evidence.md, fixed before any run
on a test case of a task."""

from dataclasses import dataclass, field, replace
from typing import Any

SEEDS = (0, 1, 2, 3, 4)
# of the trainings that choose a learning rate
TUNING_SEED = 100
# folds of splits_final.json, in the order in which they stand there
TUNING, ONE_SHOT, ALL = range(3)
# arm without pretraining
SCRATCH = "scratch"
# an encoder that took one step with next to no learning rate, to be frozen
RANDOM = "random"
FROZEN = "_frozen"
SAME_RATE, FLAT = "_same_rate", "_flat"
# with a network that reads tokens alone
TOKENS = "_tokens"
# of further random encoders that such a network reads
RANDOM_SEEDS = (1, 2, 3, 4)
METHODS = ("hiendmae", "mim", "glmae", "mae3d")
# of the remedies, on the tuning fold
REMEDY_SEEDS = (100, 101, 102)


@dataclass(frozen=True)
class Remedy:
    """One change, to be tried on the tuning fold where pretraining does not help.

    Args:
        method: pretraining method that is changed.
        finetuning: fields of `PlanOptions`.
        steps: of another pretraining; None: those of the method.
        options: of another pretraining; none: those of the method.
    """

    method: str = "hiendmae"
    finetuning: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    options: tuple[str, ...] = ()


REMEDIES = {
    "decoder first": Remedy(finetuning={"decoder_warmup": 5}),
    "slow encoder": Remedy(finetuning={"encoder_lr_scale": 0.1}),
    "layer decay": Remedy(finetuning={"layer_decay": 0.75}),
    "frozen": Remedy(finetuning={"freeze_encoder": True}),
    "short pretraining": Remedy(steps=1000),
    "half masked": Remedy(options=("mask_ratio=0.5",)),
    "plain targets": Remedy(method="mae3d", options=("normalize_target=False",)),
    "long pretraining": Remedy(steps=24000),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed.

    Args:
        encoder: preset.
        token_encoder: preset of a kind that has a network which reads tokens alone.
        crop: voxels, of pretraining and fine-tuning.
        flat_crop: the same for images of few slices.
        spacing_mm: by task, isotropic, of pretraining and fine-tuning.
        steps: of pretraining, by task.
        samples: per step, by method; together they have equally many views.
        options: of a method, where it is not its paper's.
        pretrain: further options of `hiendmae pretrain`.
        learning_rates: peaks of fine-tuning that every arm of a task chooses from.
        token_learning_rates: the same for networks that read tokens alone.
        finetuning: fields of `PlanOptions`, by task.
    """

    device: str
    encoder: str
    token_encoder: str
    crop: tuple[int, int, int]
    flat_crop: tuple[int, int, int]
    spacing_mm: dict[int, float]
    steps: dict[int, int]
    samples: dict[str, int]
    options: dict[str, tuple[str, ...]]
    pretrain_lr: float
    pretrain: tuple[str, ...]
    learning_rates: dict[int, tuple[float, ...]]
    token_learning_rates: tuple[float, ...]
    finetuning: dict[int, dict[str, Any]]
    steps_per_epoch: int = 100


_DECODER = ("decoder_dim=96", "decoder_heads=4")
_PLAIN_DECODER = (*_DECODER, "decoder_depth=2")
_SAME_RECIPE = {"drop_path_rate": 0.0, "grad_clip": 12.0, "weight_decay": 1e-5, "batch_size": 2}
_SHORT = {
    **_SAME_RECIPE,
    "epochs": 15,
    "warmup_epochs": 1,
    "iterations_per_epoch": 10,
    "val_iterations_per_epoch": 5,
    "decoder_width": 8,
}
# in 150 batches nothing but vertebrae was learnt (docs/evidence.md)
_LONG = _SHORT | {"epochs": 40, "iterations_per_epoch": 20}
_GPU = _SAME_RECIPE | {"epochs": 20, "warmup_epochs": 2, "iterations_per_epoch": 50, "val_iterations_per_epoch": 10}

BUDGETS = {
    "cpu": Budget(
        device="cpu",
        encoder="vit_nano_p8",
        token_encoder="primus_nano",
        crop=(32, 32, 32),
        flat_crop=(16, 32, 32),
        spacing_mm={503: 2.5, 506: 3.0, 505: 0.25},
        steps={503: 6000, 506: 8000, 505: 4000},
        samples={"hiendmae": 8, "mim": 2, "glmae": 2, "mae3d": 8},
        options={
            "hiendmae": _DECODER,
            "mim": ("crops_level2=1", "crops_level3=2", "views_per_part=2", *_PLAIN_DECODER),
            "glmae": (
                *("global_views=2", "local_views=2", "global_size=48", "head_hidden=256", "head_dim=128"),
                *_PLAIN_DECODER,
            ),
            "mae3d": _PLAIN_DECODER,
        },
        pretrain_lr=1e-3,
        pretrain=("--workers", "1", "--precision", "fp32"),
        # 503 took the highest of its grid; the others' were changed before they ran
        learning_rates={503: (1e-3, 3e-3, 1e-2), 506: (3e-3, 1e-2, 3e-2), 505: (3e-3, 1e-2, 3e-2)},
        token_learning_rates=(3e-3, 1e-2, 3e-2),
        finetuning={503: _SHORT, 506: _LONG, 505: _SHORT},
    ),
    # not tried: no GPU was at hand
    "gpu": Budget(
        device="cuda",
        encoder="vit_small_p16",
        token_encoder="primus_s",
        crop=(96, 96, 96),
        flat_crop=(32, 96, 96),
        spacing_mm={503: 1.0, 506: 1.5, 505: 0.1214},
        steps={503: 6000, 506: 4000, 505: 4000},
        samples={"hiendmae": 64, "mim": 8, "glmae": 16, "mae3d": 64},
        options={"mim": ("crops_level2=1", "crops_level3=6"), "glmae": ("local_views=2",)},
        pretrain_lr=4e-4,
        # all 64 crops of 1,728 tokens at once would keep 24 GB for the backward pass, a quarter of them keeps 6
        pretrain=("--workers", "12", "--accumulate", "4"),
        learning_rates=dict.fromkeys((503, 506, 505), (1e-4, 3e-4, 1e-3)),
        token_learning_rates=(1e-4, 3e-4, 1e-3),
        finetuning=dict.fromkeys((503, 506, 505), _GPU),
    ),
}
# every step of the script once, short: that all is in place, nothing else
BUDGETS["smoke"] = replace(
    BUDGETS["cpu"],
    steps=dict.fromkeys((503, 506, 505), 20),
    steps_per_epoch=10,
    finetuning=dict.fromkeys(
        (503, 506, 505),
        _SHORT | {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1},
    ),
)


@dataclass(frozen=True)
class Pool:
    """Unlabelled images: `cases` of the dataset `source`, as dataset `number`."""

    number: int
    source: int
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A labelled dataset and the images to pretrain on for it.

    Args:
        number: nnU-Net id, in DATA and of the copy whose test cases are among the others.
        channel: the channel's name, for labelled and unlabelled images alike.
        tolerance_mm: of surface Dice.
        pool: images of every method.
        train: labelled cases, the first one alone is the 1-shot fold.
        tuning: (training case, validation case) of the fold that learning rates are chosen on; no test case.
        test: patient -> cases that no pretraining, no tuning and no training sees.
        arms: pretraining methods; fine-tuning from scratch is always there.
        pools: further pools for `pool_method`, by name.
        frozen: methods whose encoders are frozen, too, beside a random one.
        same_rate: also from scratch with the first method's learning rate.
        flat: also the first method and scratch with the budget's flat crop.
        tokens: methods that, like scratch, also have a network which reads tokens alone, trained and frozen.
    """

    number: int
    channel: str
    tolerance_mm: float
    pool: Pool
    train: tuple[str, ...]
    tuning: tuple[str, str]
    test: dict[str, tuple[str, ...]]
    arms: tuple[str, ...]
    pool_method: str = "hiendmae"
    pools: dict[str, Pool] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    same_rate: bool = False
    flat: bool = False
    tokens: tuple[str, ...] = ()


# one volume per head; no animals, no abdomen, none of SRI24, which is a labelled case
HEADS = (
    "MRHead", "ds000031", "pycortexS1", "itkMPRAGE", "niwidgetsT1", "itkMultiFrame", "MRBrainTumor1", "MRBrainTumor2",
    "itkPBNRRfixed",
)  # fmt: skip
ALL_BUT_SRI24 = (
    *HEADS, "brain2", "brainbrowser1", "brainbrowser2", "daikonPD", "itkPBNRRmoving", "itkRodentFSE", "macaqueINIA19",
    "mouseThorax", "totalsegMR",
)  # fmt: skip

TASKS = (
    Task(
        503, "MR", 1.0, Pool(521, 511, HEADS),
        train=("SRI24_L", "SRI24_R"),
        tuning=("SRI24_L", "SRI24_R"),
        test={"MNI09a": ("MNI09a_L", "MNI09a_R"), "FSL6": ("FSL6_L", "FSL6_R")},
        arms=METHODS,
        pools={"2": Pool(522, 511, HEADS[:2]), "6": Pool(523, 511, HEADS[:6]), "18": Pool(524, 511, ALL_BUT_SRI24)},
        frozen=("hiendmae", "mae3d"),
        tokens=METHODS,
    ),
    # one of the four methods beside the plain one
    Task(
        506, "CT", 3.0, Pool(531, 512, ("CTChest4", "abdomenA", "cranium", "lung1", "thoraxCTA")),
        train=("A_z2", "A_z1", "A_z0"),
        tuning=("A_z2", "A_z1"),
        test={"B": ("B",)},
        arms=("hiendmae", "mae3d"),
        same_rate=True,
        flat=True,
    ),
    Task(
        505, "CT", 0.25, Pool(541, 512, ("jointA",)),
        train=("jointA_t0", "jointA_t1", "jointA_t2", "jointA_t3"),
        tuning=("jointA_t0", "jointA_t1"),
        test={"jointB": ("jointB_t0", "jointB_t1", "jointB_t2", "jointB_t3")},
        arms=("hiendmae", "mae3d"),
        tokens=("hiendmae", "mae3d"),
    ),
)  # fmt: skip
