"""What Hi-End-MAE and MAE3D have in common: one masked crop, a loss on its masked patches."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.tokens import (
    normalize_patches,
    num_visible,
    patchify,
    put_tokens,
    take_tokens,
    unpatchify,
)
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.pretraining.views import MaskedCrop


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
        self.visible = num_visible(spec.num_tokens, mask_ratio)
        if not 0 < self.visible < spec.num_tokens:
            raise UserError(
                f"mask_ratio {mask_ratio} leaves {self.visible} of {spec.num_tokens} tokens visible, needed at least 1 "
                "visible and 1 masked; change --set mask_ratio=…, or --crop-size for more tokens"
            )
        self.normalize_target = normalize_target
        self.unbiased_target = unbiased_target
        self.encoder = build_encoder(spec)

    @abstractmethod
    def predict(self, image: Tensor, order: Tensor) -> Tensor:
        """Crop (B, C, D, H, W) and token permutation (B, N) → predicted masked patches (B, N − K, P)."""

    def views(self) -> MaskedCrop:
        return MaskedCrop(self.spec.img_size, self.spec.num_tokens)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        prediction = self.predict(views["image"], views["order"])
        return {"loss": F.mse_loss(prediction.float(), self.target(views["image"], views["order"]))}

    def target(self, image: Tensor, order: Tensor) -> Tensor:
        """Masked patches (B, N − K, P) as the loss wants them."""
        patches = masked_patches(image, order, self.visible, self.spec)
        return normalize_patches(patches, self.unbiased_target) if self.normalize_target else patches

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        image, order = views["image"], views["order"]
        prediction = self.predict(image, order).float()
        if self.normalize_target:
            hidden = masked_patches(image, order, self.visible, self.spec)
            prediction = denormalize_patches(prediction, hidden, self.unbiased_target)
        return {"crop": assemble_pictures(image, order, prediction, self.spec)}


def masked_patches(image: Tensor, order: Tensor, visible: int, spec: EncoderSpec) -> Tensor:
    """Crop (B, C, D, H, W) and token permutation (B, N) → patches (B, N − K, P) behind the first K, float32."""
    return take_tokens(patchify(image, spec.patch_size), order[:, visible:]).float()


def denormalize_patches(prediction: Tensor, hidden: Tensor, unbiased: bool) -> Tensor:
    """Predictions (B, M, P) of normalised patches, given the mean and spread of the true ones."""
    var, mean = torch.var_mean(hidden, dim=-1, correction=int(unbiased), keepdim=True)
    return prediction * (var + 1e-6).sqrt() + mean


def assemble_pictures(image: Tensor, order: Tensor, prediction: Tensor, spec: EncoderSpec) -> Reconstruction:
    """Crop, crop without its masked patches, and crop with `prediction` (B, N − K, P) in their place."""
    keep = order[:, : order.shape[1] - prediction.shape[1]]
    visible = take_tokens(patchify(image, spec.patch_size), keep).float()

    def assemble(patches: Tensor) -> Tensor:
        tokens = torch.cat([visible, patches], dim=1)
        return unpatchify(put_tokens(tokens, order), spec.grid, spec.patch_size)

    blank = torch.full_like(prediction, float(image.min()))
    return Reconstruction(image, assemble(blank), assemble(prediction))
