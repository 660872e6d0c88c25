"""Tiny preprocessed datasets as nnU-Net leaves them, written directly, and settings of tiny runs."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings

PLANS = "TinyPlans"
SHAPES = {"a": (20, 24, 28), "b": (18, 20, 22)}
TINY_SPEC = EncoderSpec((16, 16, 16), (8, 8, 8), embed_dim=24, depth=4, num_heads=2)
# a method that is not named here gets its defaults
TINY_OPTIONS = defaultdict(
    dict,
    hiendmae={"decoder_dim": 12, "self_depth": 1},
    mim={
        "decoder_dim": 12,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "crops_level2": 2,
        "crops_level3": 2,
        "views_per_part": 2,
    },
    glmae={
        "global_views": 2,
        "local_views": 1,
        "head_hidden": 12,
        "head_dim": 8,
        "decoder_dim": 12,
        "decoder_depth": 1,
        "decoder_heads": 2,
        # the defaults divide by 0.04, which multiplies rounding; no fitting lowers the loss below the teacher's entropy
        "student_temperature": 0.5,
        "teacher_temperature": 0.2,
        "teacher_temperature_start": 0.3,
        "consistency_weight": 0.25,
    },
    mae3d={"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2},
    simmim={"mask_edge": 1},
    genesis={"windows": 10},
    # the default multiplies rounding by ten
    simclr={"temperature": 0.5},
    swinpretexts={"projection_dim": 8},
)
WINDOW = (-175.0, 250.0)


def write_preprocessed(
    preprocessed: Path,
    shapes: dict[str, tuple[int, int, int]],
    dataset: str = "Dataset001_Tiny",
    channels: int = 1,
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
    patch_size: tuple[int, ...] = (16, 16, 16),
    fill=None,
) -> Path:
    """Cases with values in [0, 1]: a bright smooth ball (foreground) on zeros, or `fill(name, shape)`."""
    root = preprocessed / dataset
    folder = root / f"{PLANS}_3d_fullres"
    folder.mkdir(parents=True, exist_ok=True)
    lo, hi = WINDOW
    stats = {"mean": lo, "std": hi - lo, "percentile_00_5": lo, "percentile_99_5": hi}
    plans = {
        "dataset_name": dataset,
        "plans_name": PLANS,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {str(c): stats for c in range(channels)},
        "configurations": {
            "3d_fullres": {
                "data_identifier": folder.name,
                "patch_size": list(patch_size),
                "spacing": list(spacing),
                "normalization_schemes": ["CTNormalization"] * channels,
                "architecture": {"network_class_name": "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"},
            }
        },
    }
    (root / f"{PLANS}.json").write_text(json.dumps(plans))
    names = {str(c): "CT" for c in range(channels)}
    (root / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": {"background": 0}}))
    for number, (name, shape) in enumerate(shapes.items()):
        image = (fill or _ball)(number, shape)
        write_case(folder / name, np.repeat(image[None], channels, axis=0).astype(np.float32))
    return folder


def write_labelled(
    preprocessed: Path,
    shapes: dict[str, tuple[int, int, int]],
    splits: list[dict[str, list[str]]],
    dataset: str = "Dataset002_Labelled",
    labels: dict | None = None,
    **more,
) -> Path:
    """The same cases with labels, as nnU-Net preprocesses them: the ball is 1, where it is bright 2."""
    folder = write_preprocessed(preprocessed, shapes, dataset, **more)
    for number, (name, shape) in enumerate(shapes.items()):
        image = _ball(number, shape)
        seg = (image > 0).astype(np.int16) + (image > 0.6)
        write_case(folder / name, np.repeat(image[None], more.get("channels", 1), axis=0).astype(np.float32), seg)
    about = json.loads((folder.parent / "dataset.json").read_text())
    about["labels"] = labels or {"background": 0, "ball": 1, "bright": 2}
    (folder.parent / "dataset.json").write_text(json.dumps(about))
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    return folder


def write_case(target: Path, image: np.ndarray, labels: np.ndarray | None = None) -> None:
    """One case (C, D, H, W) in nnU-Net's storage format, with labels (D, H, W) if there are some."""
    # blosc2 does not write over an existing file
    target.with_name(f"{target.name}.b2nd").unlink(missing_ok=True)
    target.with_name(f"{target.name}_seg.b2nd").unlink(missing_ok=True)
    blocks, chunks = comp_blosc2_params(image.shape, (16, 16, 16), 4)
    seg = np.zeros((1, *image.shape[1:]), np.int16) if labels is None else labels[None]
    places = {} if labels is None else {"class_locations": {v: np.argwhere(seg == v)[:9] for v in (1, 2)}}
    nnUNetDatasetBlosc2.save_case(
        image, seg, places, str(target), chunks=chunks, blocks=blocks, chunks_seg=chunks, blocks_seg=blocks
    )


def _ball(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    axes = np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    waves = 0.5 + 0.4 * np.sin(4 * axes[0] + number) * np.cos(5 * axes[1]) * np.cos(3 * axes[2] + number)
    return np.where(radius < 0.8, waves, 0.0)


def tiny_settings(method: str = "hiendmae", **changes) -> PretrainSettings:
    """A run of a few steps on 16³ crops."""
    values = {
        "datasets": ("Dataset001_Tiny",),
        "plans_name": PLANS,
        "configuration": "3d_fullres",
        "method": method,
        "options": TINY_OPTIONS[method],
        "spec": TINY_SPEC,
        "epochs": 3,
        "steps_per_epoch": 3,
        "warmup_epochs": 1,
        "batch_size": 4,
        "accumulate": 1,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "betas": (0.9, 0.95),
        "precision": "fp32",
        "seed": 3,
        "checkpoint_epochs": 1,
        "picture_epochs": 2,
        "device": "cpu",
        "workers": 0,
    }
    return PretrainSettings(**{**values, **changes})
