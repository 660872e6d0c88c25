"""What Hi-End-MAE and MAE3D have in common: one masked crop, a loss on its masked patches."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.tokens import (
    normalize_patches,
    patchify,
    put_tokens,
    take_tokens,
    unpatchify,
)
from nnunetv2_hiendmae.pretraining.checks import visible_of
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.training.views import MaskedCrop


class MaskedCropMethod(Method):
    """Predicts the masked patches of a crop from its visible ones; MSE on masked patches only.

    Subclasses build `self.encoder` before anything else and implement `predict`.

    Args:
        mask_ratio: share of tokens that is hidden.
        normalize_target: compare with patches normalised by their own mean and standard deviation.
        unbiased_target: whether that deviation is the unbiased one.
    """

    def __init__(self, spec: EncoderSpec, mask_ratio: float, normalize_target: bool, unbiased_target: bool):
        super().__init__(spec)
        self.visible = visible_of(spec.num_tokens, "mask_ratio", mask_ratio)
        self.normalize_target = normalize_target
        self.unbiased_target = unbiased_target
        self.encoder = build_encoder(spec)

    @abstractmethod
    def predict(self, image: Tensor, order: Tensor) -> Tensor:
        """Crop (B, C, D, H, W) and token permutation (B, N) → predicted masked patches (B, N − K, P)."""

    def views(self) -> MaskedCrop:
        return MaskedCrop(self.spec.img_size, self.spec.num_tokens)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        image, order = views["image"], views["order"]
        prediction = self.predict(image, order)
        target = patch_targets(image, order, self.visible, self.spec, self.normalize_target, self.unbiased_target)
        return {"loss": F.mse_loss(prediction.float(), target)}

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        image, order = views["image"], views["order"]
        prediction = self.predict(image, order)
        return {"crop": picture(image, order, prediction, self.spec, self.normalize_target, self.unbiased_target)}


def patch_targets(
    image: Tensor, order: Tensor, visible: int, spec: EncoderSpec, normalize: bool, unbiased: bool
) -> Tensor:
    """Masked patches of a crop as the loss wants them.

    Args:
        image: (B, C, D, H, W).
        order: (B, N) token permutation; the first `visible` (K) are not masked.
        normalize: each patch by its own mean and standard deviation; `unbiased`: that of its variance.

    Returns:
        (B, N − K, P), float32.
    """
    patches = _masked_patches(image, order, visible, spec)
    return normalize_patches(patches, unbiased) if normalize else patches


def picture(
    image: Tensor, order: Tensor, prediction: Tensor, spec: EncoderSpec, normalize: bool, unbiased: bool
) -> Reconstruction:
    """Crop, crop without its masked patches, and crop with what was predicted for them.

    Args:
        image: (B, C, D, H, W).
        order: (B, N) token permutation, visible ones first.
        prediction: (B, N − K, P) of what `patch_targets` gives with the same `normalize` and `unbiased`; scaled with
            the true mean and spread of its patch where those are normalised.
    """
    visible = order.shape[1] - prediction.shape[1]
    prediction = prediction.float()
    if normalize:
        hidden = _masked_patches(image, order, visible, spec)
        var, mean = torch.var_mean(hidden, dim=-1, correction=int(unbiased), keepdim=True)
        prediction = prediction * (var + 1e-6).sqrt() + mean
    shown = take_tokens(patchify(image, spec.patch_size), order[:, :visible]).float()

    def assemble(patches: Tensor) -> Tensor:
        tokens = torch.cat([shown, patches], dim=1)
        return unpatchify(put_tokens(tokens, order), spec.grid, spec.patch_size)

    blank = torch.full_like(prediction, float(image.min()))
    return Reconstruction(image, assemble(blank), assemble(prediction))


def _masked_patches(image: Tensor, order: Tensor, visible: int, spec: EncoderSpec) -> Tensor:
    return take_tokens(patchify(image, spec.patch_size), order[:, visible:]).float()
