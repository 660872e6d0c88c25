"""Defaults per method: how volumes become arrays, and how the network is fine-tuned (METHODS §2 to §6)."""

from dataclasses import dataclass, field

from nnunetv2_hiendmae.plans_section import FinetuneRecipe


@dataclass(frozen=True)
class MethodRecipe:
    """What a method's encoder saw and how it is fine-tuned, wherever the user does not say otherwise.

    Args:
        spacing_mm: target spacing (D, H, W); None: the dataset's own, by nnU-Net's rule.
        window_hu: CT window that becomes [0, 1]; channels other than CT keep nnU-Net's normalisation.
        decoder_width: channels of the UNETR decoder at full resolution.
        batch_size: crops per fine-tuning batch.
        drop_path_rate: stochastic depth of the encoder in fine-tuning.
        frozen_lr: peak learning rate where the encoder is frozen; None: that of `finetune`.
        crop_limit: largest fine-tuning crop (D, H, W) in voxels, where the encoder saw larger ones; None: no limit.
    """

    spacing_mm: tuple[float, float, float] | None = (1.5, 1.5, 1.5)
    window_hu: tuple[float, float] | None = (-175.0, 250.0)
    decoder_width: int = 32
    batch_size: int = 4
    drop_path_rate: float = 0.0
    frozen_lr: float | None = None
    crop_limit: tuple[int, int, int] | None = None
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)


RECIPES: dict[str, MethodRecipe] = {
    "hiendmae": MethodRecipe(),
    "mim": MethodRecipe(
        spacing_mm=None,
        window_hu=(-1000.0, 1000.0),
        decoder_width=48,
        drop_path_rate=0.2,
        # lr unpublished: ours
        finetune=FinetuneRecipe(lr=1e-4, grad_clip=5.0),
    ),
    # widths 16 to 48 are published
    "glmae": MethodRecipe(
        spacing_mm=None,
        window_hu=(-1000.0, 1000.0),
        # its global views have 160³ voxels
        crop_limit=(96, 96, 96),
        finetune=FinetuneRecipe(lr=3e-4),
        frozen_lr=1e-2,
    ),
    # ours: the baseline sees what Hi-End-MAE sees, so that the two can be compared
    "mae3d": MethodRecipe(),
}
DEFAULT_METHOD = "hiendmae"
