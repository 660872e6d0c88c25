"""What methods of one masked crop have in common, and targets and pictures of masked patches."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.tokens import normalize_patches, patchify, put_tokens, take_tokens, unpatchify
from nnunetv2_hiendmae.options import SHARE, option
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, MethodOptions, Reconstruction
from nnunetv2_hiendmae.training.views import MaskedCrop


class MaskedCropMethod(Method):
    """Predicts the masked patches of a crop from its visible ones; MSE on masked patches only.

    Subclasses build what they predict with after `super().__init__`, which builds the encoder, and implement `predict`.
    """

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """`mask_ratio` is the share of tokens that is hidden."""

        mask_ratio: float = option(0.75, **SHARE)

    # the target, see `patch_targets`
    normalize_target: bool = True
    unbiased_target: ClassVar[bool] = True

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        self.visible = self.options.visible("mask_ratio", spec.num_tokens)
        self.encoder = build_encoder(spec)

    @abstractmethod
    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Crop (B, C, D, H, W) and token permutation (B, N) → predicted masked patches (B, N − K, P)."""

    def views(self) -> MaskedCrop:
        return MaskedCrop(self.spec.img_size, self.spec.num_tokens)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        image, ids_shuffle = views["image"], views["ids_shuffle"]
        prediction = self.predict(image, ids_shuffle)
        target = patch_targets(image, ids_shuffle, self.visible, self.spec, self.normalize_target, self.unbiased_target)
        return {"loss": F.mse_loss(prediction.float(), target)}

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        image, ids_shuffle = views["image"], views["ids_shuffle"]
        prediction = self.predict(image, ids_shuffle)
        return {"crop": picture(image, ids_shuffle, prediction, self.spec, self.normalize_target, self.unbiased_target)}


def patch_targets(
    image: Tensor, ids_shuffle: Tensor, visible: int, spec: EncoderSpec, normalize: bool = True, unbiased: bool = True
) -> Tensor:
    """Masked patches of a crop as the loss wants them.

    Args:
        image: (B, C, D, H, W).
        ids_shuffle: (B, N) token permutation; the first `visible` (K) are not masked.
        normalize: each patch by its own mean and standard deviation; `unbiased`: that of its variance.

    Returns:
        (B, N − K, P), float32.
    """
    patches = _masked_patches(image, ids_shuffle, visible, spec)
    return normalize_patches(patches, unbiased) if normalize else patches


def picture(
    image: Tensor,
    ids_shuffle: Tensor,
    prediction: Tensor,
    spec: EncoderSpec,
    normalize: bool = True,
    unbiased: bool = True,
) -> Reconstruction:
    """Crop, crop without its masked patches, and crop with what was predicted for them.

    Args:
        image: (B, C, D, H, W).
        ids_shuffle: (B, N) token permutation, visible ones first.
        prediction: (B, N − K, P) of what `patch_targets` gives with the same `normalize` and `unbiased`; scaled with
            the true mean and spread of its patch where those are normalised.
    """
    visible = ids_shuffle.shape[1] - prediction.shape[1]
    prediction = prediction.float()
    if normalize:
        hidden = _masked_patches(image, ids_shuffle, visible, spec)
        var, mean = torch.var_mean(hidden, dim=-1, correction=int(unbiased), keepdim=True)
        prediction = prediction * (var + 1e-6).sqrt() + mean
    shown = take_tokens(patchify(image, spec.patch_size), ids_shuffle[:, :visible]).float()

    def assemble(patches: Tensor) -> Tensor:
        tokens = torch.cat([shown, patches], dim=1)
        return unpatchify(put_tokens(tokens, ids_shuffle), spec.grid, spec.patch_size)

    blank = torch.full_like(prediction, float(image.min()))
    return Reconstruction(image, assemble(blank), assemble(prediction))


def _masked_patches(image: Tensor, ids_shuffle: Tensor, visible: int, spec: EncoderSpec) -> Tensor:
    return take_tokens(patchify(image, spec.patch_size), ids_shuffle[:, visible:]).float()
