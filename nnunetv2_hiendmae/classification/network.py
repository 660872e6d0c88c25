"""The classifier: pooled tokens of an encoder, LayerNorm, one linear layer; its file; and volumes as its inputs. Those
of training are a function of (seed, epoch, case)."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with
from nnunetv2_hiendmae.options.commands import ANTIALIASED, CROPS, RESIZE
from nnunetv2_hiendmae.schemas import CLOSED, validated
from nnunetv2_hiendmae.training.views import Augmentation, Volume, draw_corner, grid_corners, read_resized
from nnunetv2_hiendmae.training.volumes import CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat, twins
from nnunetv2_hiendmae.weights.adapt import check_size

logger = logging.getLogger(__name__)

METADATA_KEY = "hiendmae_classifier"
BEST, LAST = "classifier_best.safetensors", "classifier_last.safetensors"
# of the random crops; 3:1, as in pretraining
FOREGROUND_SHARE = 0.75
# relative difference of spacing or intensities that no warning is worth
TOLERATED = 0.01


@dataclass(frozen=True)
class Inputs:
    """How a volume becomes images (n, C, *size) of the encoder's size.

    Args:
        mode: "antialiased": the whole volume, n = 1, every voxel counts; "resize": the same without anti-aliasing, as
            0.1 did; "crops": random ones in training, a regular grid in prediction.
        size: (D, H, W) in voxels.
        crops: random crops per case and epoch in training, and the most that the grid may have.

    Raises:
        UserError: unknown mode, or no crop.
    """

    mode: str
    size: tuple[int, int, int]
    crops: int = 1

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(self.size))
        if self.mode not in (ANTIALIASED, RESIZE, CROPS):
            raise UserError(f"inputs '{self.mode}' are unknown, needed {ANTIALIASED}, {RESIZE} or {CROPS}")
        if self.crops < 1:
            raise UserError(f"--crops is {self.crops}, needed at least 1")
        if self.whole and self.crops > 1:
            raise UserError(f"--crops {self.crops} with --input {RESIZE}, which has one input; add --input {CROPS}")

    @property
    def whole(self) -> bool:
        """Whether the input is the whole volume, resized."""
        return self.mode != CROPS

    def draw(self, volume: Volume, rng: np.random.Generator, augment: bool) -> dict[str, Tensor]:
        """Inputs for training, "image" (n, C, *size); everything random comes from `rng`."""
        if self.whole:
            images = self._resized(volume)[None]
            spacing = [s * n / m for s, n, m in zip(volume.spacing_mm, volume.shape, self.size, strict=True)]
        else:
            corners = [draw_corner(volume, self.size, FOREGROUND_SHARE, rng) for _ in range(self.crops)]
            images, spacing = self._cut(volume, corners), volume.spacing_mm
        if augment:
            images = Augmentation().apply(images, spacing, rng)
        return {"image": images}

    def regular(self, volume: Volume, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Inputs for prediction, "image" (n, C, *size); nothing random."""
        if self.whole:
            return {"image": self._resized(volume)[None]}
        return {"image": self._cut(volume, grid_corners(volume.shape, self.size, self.crops))}

    def _resized(self, volume: Volume) -> Tensor:
        if self.mode == ANTIALIASED:
            return read_resized(volume, (0, 0, 0), volume.shape, self.size)
        whole = torch.from_numpy(volume.read((0, 0, 0), volume.shape))
        return F.interpolate(whole[None], size=self.size, mode="trilinear", align_corners=False)[0]

    def _cut(self, volume: Volume, corners: Iterable[Sequence[int]]) -> Tensor:
        return torch.stack([torch.from_numpy(volume.read(corner, self.size)) for corner in corners])


def forward_work(network: "Classifier", inputs: Inputs) -> float:
    """Floating-point operations that a case takes, roughly: two per parameter and token."""
    tokens = math.prod(inputs.size) / math.prod(network.encoder.spec.patch_size)
    return 2 * sum(p.numel() for p in network.parameters()) * tokens * inputs.crops


def epoch_keys(epochs: range, cases: int, batch_size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Keys of every training batch: each epoch has all cases once, in an order of its own. The last batch of an
    epoch may be smaller."""
    for epoch in epochs:
        # a sample's generator is seeded by its case's index, which is never the number of cases
        order = np.random.default_rng([seed, epoch, cases]).permutation(cases).tolist()
        for start in range(0, cases, batch_size):
            yield [(epoch, index) for index in order[start : start + batch_size]]


def warn_of_differences(data: CaseSet, inputs: Inputs, seen: VolumeFormat, whose: str) -> None:
    """Says so when images were prepared otherwise than those that `whose` weights saw, and how far apart voxels are
    after resizing. What is None was not recorded, or varied."""
    images = data.format
    for what, before, now in (
        ("spacing in mm", seen.spacing_mm, images.spacing_mm),
        ("window in HU", seen.window_hu, images.window_hu),
        ("offset of the intensities", seen.intensity_offset, images.intensity_offset),
        ("scale of the intensities", seen.intensity_scale, images.intensity_scale),
        ("normalisation", sorted(set(seen.normalization_schemes)) or None, sorted(set(images.normalization_schemes))),
        (
            "z-score of the voxels that are not 0 alone",
            any(seen.use_mask_for_norm) if seen.use_mask_for_norm else None,
            any(images.use_mask_for_norm),
        ),
        ("reader", seen.image_reader_writer, images.image_reader_writer),
    ):
        numbers = None not in (before, now) and not isinstance(before, str | list)
        close = numbers and np.allclose(before, now, rtol=TOLERATED, atol=0)
        if before is not None and now not in twins(before) and not close:
            logger.warning(f"{what}: the images have {now}, {whose} saw {before}; preprocess them alike")
    if inputs.whole:
        shape = np.median([case.shape for case in data.cases], axis=0)
        spacing = " x ".join(f"{s:.1f}" for s in shape * images.spacing_mm / inputs.size)
        logger.info(f"whole volumes are resized to {inputs.size} voxels: in the median {spacing} mm each")


class Classifier(nn.Module):
    """Logits (B, K) of images (B, C, D, H, W).

    Args:
        encoder: `encoder(x)` gives tokens (B, prefix + N, E) after the final norm, and taps.
        pool: "mean" of the patch tokens, or "cls", the first prefix token.
        frozen: the encoder gets no gradient and stays in eval mode (linear probe).

    Raises:
        ValueError: "cls" with an encoder without prefix tokens.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, pool: str = "mean", frozen: bool = False):
        super().__init__()
        if pool == "cls" and not encoder.num_prefix_tokens:
            raise ValueError("pool 'cls' needs an encoder with a CLS token")
        self.encoder = encoder
        self.pool = pool
        self.frozen = frozen
        self.norm = nn.LayerNorm(encoder.spec.embed_dim)
        self.head = nn.Linear(encoder.spec.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if frozen:
            encoder.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.encoder(x)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.encoder.num_prefix_tokens :].mean(1)
        return self.head(self.norm(pooled))

    def train(self, mode: bool = True) -> "Classifier":
        """As in torch, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def build_classifier(
    spec: EncoderSpec, num_classes: int, pool: str = "mean", frozen: bool = False, seed: int = 0
) -> Classifier:
    """Classifier with fresh weights; the same ones for the same seed."""
    torch.manual_seed(seed)
    return Classifier(build_encoder(spec), num_classes, pool, frozen)


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights (K,) of the classes, n / (K · n_k): inverse to their frequency, 1 on average over the cases. Those of
    scikit-learn, but for float32 rounding."""
    return len(targets) / (num_classes * torch.bincount(targets, minlength=num_classes).float())


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weight · cross-entropy.

    Not torch's weighted mean, which divides by the weights in the batch: in a batch of one class they would cancel.
    """
    return F.cross_entropy(logits.float(), targets, weight=weights, reduction="sum") / len(targets)


@dataclass(frozen=True)
class ClassifierMetadata:
    """What a classifier is and what it saw: all that prediction must know.

    Args:
        classes: names in the order of the outputs.
        volumes: how its training images were prepared.
        method: of the encoder's pretraining, None from scratch.
        epoch: that the weights are of (0-based).
    """

    spec: EncoderSpec
    classes: tuple[str, ...]
    pool: str
    inputs: Inputs
    volumes: VolumeFormat
    plans_name: str
    configuration: str
    method: str | None
    citations: tuple[str, ...]
    epoch: int = 0
    version: str = ""
    __pydantic_config__: ClassVar = CLOSED

    def to_json(self) -> str:
        """As stored in the file's header."""
        return json.dumps({**asdict(self), "spec": self.spec.to_dict(), "volumes": self.volumes.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "ClassifierMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a classifier.
        """
        data = from_json(text)
        if not isinstance(data, dict) or not isinstance(data.get("volumes"), dict):
            raise ValueError("no description of a classifier")
        return validated(cls, json.dumps({**data, "volumes": asdict(VolumeFormat.from_dict(data["volumes"]))}))


def save_classifier(path: Path, network: Classifier, metadata: ClassifierMetadata) -> None:
    """Writes the weights with their metadata, in one step.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    content = save(tensors, metadata={METADATA_KEY: header})
    write_with(path, lambda temporary: temporary.write_bytes(content))


def load_classifier(path: Path) -> tuple[Classifier, ClassifierMetadata]:
    """Classifier of a file in eval mode on the CPU.

    Raises:
        UserError: no such file, or not a classifier of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no classifier at {path}; make one with: hiendmae classify train")
    try:
        with safe_open(path, "pt") as f:
            metadata = ClassifierMetadata.from_json((f.metadata() or {})[METADATA_KEY])
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        check_size(metadata.spec, state)
        if metadata.inputs.size != metadata.spec.img_size:
            raise ValueError(f"inputs.size {metadata.inputs.size} is not spec.img_size {metadata.spec.img_size}")
        network = build_classifier(metadata.spec, len(metadata.classes), metadata.pool)
        network.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} is not a readable classifier ({reason}); train anew: hiendmae classify train") from e
    return network.eval(), metadata
