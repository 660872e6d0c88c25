"""What is compared, on which images and with how much computing: the numbers of docs/evidence.md, fixed before any run
on a test case."""

from dataclasses import dataclass, field

ENCODER = "vit_nano_p8"
CROP = (32, 32, 32)  # voxels, of pretraining and fine-tuning
SEEDS = (0, 1, 2, 3, 4)
# folds of splits_final.json, in the order in which they stand there
TUNING, ONE_SHOT, ALL = range(3)

STEPS_PER_EPOCH = 100
PRETRAIN_LR = 1e-3
VIEWS_PER_STEP = 8
DECODER = ("decoder_dim=96", "decoder_heads=4")
PLAIN_DECODER = (*DECODER, "decoder_depth=2")
# method -> samples per step, which have `VIEWS_PER_STEP` views together, and options that fit it to the small encoder
METHODS: dict[str, tuple[int, tuple[str, ...]]] = {
    "hiendmae": (8, DECODER),
    "mim": (2, ("crops_level2=1", "crops_level3=2", "views_per_part=2", *PLAIN_DECODER)),
    "glmae": (
        2,
        ("global_views=2", "local_views=2", "global_size=48", "head_hidden=256", "head_dim=128", *PLAIN_DECODER),
    ),
    "mae3d": (8, PLAIN_DECODER),
}
# arm without pretraining
SCRATCH = "scratch"
# an encoder that took one step with next to no learning rate, to be frozen
RANDOM = "random"
FROZEN = "_frozen"

# peak learning rates of fine-tuning that every arm chooses from, with a seed of its own
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
FINETUNING = {
    "epochs": 15,
    "warmup_epochs": 1,
    "iterations_per_epoch": 10,
    "val_iterations_per_epoch": 5,
    "batch_size": 2,
    "decoder_width": 8,
    "drop_path_rate": 0.0,
    "grad_clip": 12.0,
    "weight_decay": 1e-5,
}


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
        spacing_mm: of pretraining and fine-tuning, isotropic.
        tolerance_mm: of surface Dice.
        steps: of pretraining.
        pool: images of every method.
        train: labelled cases, the first one alone is the 1-shot fold.
        tuning: (training case, validation case) of the fold that learning rates are chosen on; no test case.
        test: patient -> cases that no pretraining, no tuning and no training sees.
        arms: pretraining methods; fine-tuning from scratch is always there.
        pools: further pools for `pool_method`, by name.
        frozen: methods whose encoders are frozen, too, beside a random one.
    """

    number: int
    channel: str
    spacing_mm: float
    tolerance_mm: float
    steps: int
    pool: Pool
    train: tuple[str, ...]
    tuning: tuple[str, str]
    test: dict[str, tuple[str, ...]]
    arms: tuple[str, ...]
    pool_method: str = "hiendmae"
    pools: dict[str, Pool] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


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
        503, "MR", 2.5, 1.0, 6000, Pool(521, 511, HEADS),
        train=("SRI24_L", "SRI24_R"),
        tuning=("SRI24_L", "SRI24_R"),
        test={"MNI09a": ("MNI09a_L", "MNI09a_R"), "FSL6": ("FSL6_L", "FSL6_R")},
        arms=tuple(METHODS),
        pools={"2": Pool(522, 511, HEADS[:2]), "6": Pool(523, 511, HEADS[:6]), "18": Pool(524, 511, ALL_BUT_SRI24)},
        frozen=("hiendmae", "mae3d"),
    ),
    # one of the four methods beside the plain one
    Task(
        506, "CT", 3.0, 3.0, 4000, Pool(531, 512, ("CTChest4", "abdomenA", "cranium", "lung1", "thoraxCTA")),
        train=("A_z2", "A_z1", "A_z0"),
        tuning=("A_z1", "A_z2"),
        test={"B": ("B",)},
        arms=("hiendmae", "mae3d"),
    ),
    Task(
        505, "CT", 0.25, 0.25, 4000, Pool(541, 512, ("jointA",)),
        train=("jointA_t0", "jointA_t1", "jointA_t2", "jointA_t3"),
        tuning=("jointA_t0", "jointA_t1"),
        test={"jointB": ("jointB_t0", "jointB_t1", "jointB_t2", "jointB_t3")},
        arms=("hiendmae", "mae3d"),
    ),
)  # fmt: skip
