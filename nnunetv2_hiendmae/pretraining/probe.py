"""A probe while pretraining: how much of a labelled dataset's classes a ridge regression reads off frozen tokens.

The encoder sees whole crops in eval mode and without gradients. No label, and nothing that is computed here, reaches
the loss. The probe is ours; effective rank by Roy & Vetterli 2007 ("The effective rank: a measure of effective
dimensionality"), as a monitor of collapse as in RankMe (Garrido et al. 2023).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import Encoder, EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import patchify
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.training.labelled import MOST_CROPS, UNKNOWN, LabelledCases
from nnunetv2_hiendmae.training.views import grid_corners
from nnunetv2_hiendmae.training.volumes import Case, CaseVolume, crop_and_pad, telling_unreadable

# tokens of all training cases together, and of all test cases for the rank
MOST_TOKENS = 8192
# of the ridge regression, for features of unit variance and the mean squared error: with a tenth of it, random encoders
# differed two to three times as much between seeds (5 seeds, two folds of brain tissues)
RIDGE = 0.1
# a patch of voxels as features: mean values of so many cells along an axis
CELLS = 4
# of a token's voxels: those of a patch that reaches out of the volume by half of each edge
LEAST_LABELLED = 1 / 8
# crops that go through the encoder at once
BATCH = 4

# crops (B, C, D, H, W) → features (B, N, F) of their tokens
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Args:
        dice: mean over classes.
        dice_per_class: mean over the test cases that have the class; classes that none has are left out.
        effective_rank: of the encoder's final tokens in the test cases, 1 to their width.
    """

    dice: float
    dice_per_class: dict[str, float]
    effective_rank: float


@dataclass(frozen=True, eq=False)
class _Crop:
    """`shares` (M, classes) of the labelled tokens, which are those where `known` (N,)."""

    corner: tuple[int, ...]
    known: np.ndarray
    shares: np.ndarray


class Probe:
    """Crops of labelled cases, and how much of each of their tokens every class takes.

    Args:
        spec: its crop and patch size count.
    """

    def __init__(self, cases: LabelledCases, spec: EncoderSpec):
        self.cases, self.spec = cases, spec
        self._crops = {case: self._label_crops(case) for case in (*cases.train, *cases.test)}
        if empty := [case.name for case, crops in self._crops.items() if not any(crop.known.any() for crop in crops)]:
            patch = " x ".join(map(str, spec.patch_size))
            told = f"no patch of {patch} voxels has an eighth of labelled ones in the probe's cases {some(empty)}"
            raise UserError(f"{told}; choose a smaller --patch-size, or others with --probe-fold")

    def measure(self, features: Features) -> tuple[dict[str, float], np.ndarray]:
        """Dice per class of a ridge regression from features to the shares of the classes, and features (T, F) of the
        test cases' tokens."""
        rng = np.random.default_rng(0)
        samples = [self._draw(rng, *self._tokens(case, features)) for case in self.cases.train]
        inputs, shares = map(np.concatenate, zip(*samples, strict=True))
        model = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE * len(inputs))).fit(inputs, shares)
        scores, kept = [], []
        # one by one: all of them may have a gigabyte
        for tokens, true in (self._tokens(case, features) for case in self.cases.test):
            # of a single class the prediction has one axis
            scores.append(share_dice(model.predict(tokens).reshape(true.shape), true))
            kept.append(self._draw(rng, tokens)[0])
        named = zip(self.cases.classes, np.transpose(scores), strict=True)
        dice = {name: round(float(np.nanmean(d)), 6) for name, d in named if not np.isnan(d).all()}
        return dice, np.concatenate(kept)

    def of_encoder(self, encoder: Encoder, autocast: Callable[[], AbstractContextManager] = nullcontext) -> ProbeResult:
        """The probe of all blocks' outputs that an encoder hands out: its taps and its final tokens."""
        device = next(encoder.parameters()).device

        def features(crops: Tensor) -> Tensor:
            with autocast():
                tokens, taps = encoder(crops.to(device))
            return torch.cat([t[:, encoder.num_prefix_tokens :].float() for t in (*taps, tokens)], dim=2)

        with in_eval_mode(encoder), torch.no_grad():
            dice, tokens = self.measure(features)
        return ProbeResult(_mean(dice), dice, round(effective_rank(tokens[:, -self.spec.embed_dim :]), 4))

    def of_voxels(self) -> float:
        """Mean Dice of the same probe without an encoder: mean values of each patch's cells are the features."""
        return _mean(self.measure(lambda crops: cell_means(crops, self.spec))[0])

    def _draw(self, rng: np.random.Generator, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """A case's part of `MOST_TOKENS`: the same rows of its arrays."""
        rows = rng.permutation(len(arrays[0]))[: -(-MOST_TOKENS // len(self.cases.train))]
        return tuple(array[rows] for array in arrays)

    def _label_crops(self, case: Case) -> list[_Crop]:
        labels = self.cases.read_labels(case)[None]
        crops = [self._label_crop(labels, corner) for corner in grid_corners(case.shape, self.spec.img_size)]
        return sorted(crops, key=lambda crop: -float(crop.shares.sum()))[:MOST_CROPS]

    def _label_crop(self, labels: np.ndarray, corner: tuple[int, ...]) -> _Crop:
        """A token counts where enough of its voxels are labelled, and its shares are of those."""
        crop = crop_and_pad(labels, corner, self.spec.img_size, lambda: np.array([UNKNOWN]))[0]

        def share(chosen: np.ndarray) -> np.ndarray:
            volume = torch.from_numpy(chosen)[None, None].float()
            return F.avg_pool3d(volume, self.spec.patch_size).flatten().numpy()

        labelled = share(crop > UNKNOWN)
        known = labelled >= LEAST_LABELLED
        shares = np.stack([share(np.isin(crop, values)) for values in self.cases.classes.values()], axis=1)
        return _Crop(corner, known, shares[known] / labelled[known, None])

    def _tokens(self, case: Case, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Features (M, F) and shares (M, classes) of a case's labelled tokens."""
        crops, found = self._crops[case], []
        with telling_unreadable(case):
            volume = CaseVolume(case, self.cases.format)
        for start in range(0, len(crops), BATCH):
            batch = crops[start : start + BATCH]
            with telling_unreadable(case):
                images = torch.stack([torch.from_numpy(volume.read(c.corner, self.spec.img_size)) for c in batch])
            tokens = features(images)
            # of all of them: an encoder mixes them
            for what, values, mend in (
                ("voxels", images, "choose others with --probe-fold"),
                ("an encoder's tokens", tokens, "use --precision fp32"),
            ):
                if not values.isfinite().all():
                    raise UserError(f"{what} of case {case.name} of the probe hold NaN or infinity; {mend}")
            found += [f[c.known] for c, f in zip(batch, tokens.cpu().numpy(), strict=True)]
        return np.concatenate(found), np.concatenate([crop.shares for crop in crops])


def probe_encoder(encoder: Encoder, cases: LabelledCases) -> ProbeResult:
    """How well a ridge regression reads the classes of labelled cases off an encoder's tokens; see docs/pretraining.md.

    Args:
        encoder: in the form of pretraining, on any device; left as it is.
        cases: of `training.labelled.find_labelled`.
    """
    return Probe(cases, encoder.spec).of_encoder(encoder)


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and as it was before afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def cell_means(crops: Tensor, spec: EncoderSpec) -> Tensor:
    """(B, C, D, H, W) → (B, N, F): per patch the mean values of at most `CELLS`³ cells of each channel."""
    cells = [min(CELLS, p) for p in spec.patch_size]
    return patchify(F.adaptive_avg_pool3d(crops, [g * c for g, c in zip(spec.grid, cells, strict=True)]), cells)


def share_dice(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Dice of shares in [0, 1], what is predicted beyond that is cut off: 2·Σ min(p, t) / (Σ p + Σ t) over tokens,
    which is the usual Dice where shares are 0 or 1.

    Args:
        predicted, true: (tokens, classes).

    Returns:
        (classes,), NaN for a class that has no true share anywhere.
    """
    predicted = predicted.clip(0, 1)
    overlap, total = np.minimum(predicted, true).sum(0), (predicted + true).sum(0)
    return np.where(true.sum(0) > 0, 2 * overlap / np.where(total > 0, total, 1), np.nan)


def effective_rank(tokens: np.ndarray) -> float:
    """exp of the entropy of singular values that sum to 1, of a matrix (tokens, width); 1: all tokens are multiples of
    one."""
    # of the Gram matrix, which is small; squares below float64's precision count as none
    squares = np.linalg.eigvalsh(tokens.T.astype(np.float64) @ tokens.astype(np.float64)).clip(0)
    squares[squares < squares.max() * 1e-14] = 0
    values = np.sqrt(squares)
    parts = values[values > 0] / values.sum()
    return float(np.exp(-(parts * np.log(parts)).sum()))


def _mean(dice: dict[str, float]) -> float:
    # rounded as losses are; no class: cropping left none of them
    return round(float(np.mean(list(dice.values()) or [0.0])), 6)
