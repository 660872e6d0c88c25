"""MAE3D, the baseline: a masked autoencoder with a plain decoder (METHODS §1)."""

from typing import ClassVar

from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import split_order
from nnunetv2_hiendmae.pretraining.decoder import MAEDecoder
from nnunetv2_hiendmae.pretraining.masked import MaskedCropMethod
from nnunetv2_hiendmae.recipes import RECIPES


class MAE3D(MaskedCropMethod):
    """Masked autoencoder: encode the visible tokens, decode all of them, MSE on the masked patches.

    Args:
        mask_ratio: share of tokens that is hidden.
        normalize_target: per-patch normalisation of the target (unbiased variance).
        decoder_dim: width of the decoder.
        decoder_depth: self-attention blocks of the decoder.
        decoder_heads: attention heads of the decoder.
    """

    name = "mae3d"
    title = "MAE3D"
    source = "He et al., CVPR 2022, in 3D; decoder 512 x 8 x 16 as in GL-MAE. Training recipe: ours, that of Hi-End-MAE"
    citations: ClassVar[tuple[str, ...]] = RECIPES["mae3d"].citations

    def __init__(
        self,
        spec: EncoderSpec,
        mask_ratio: float = 0.75,
        normalize_target: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__(spec, mask_ratio, normalize_target, unbiased_target=True)
        self.decoder = MAEDecoder(spec, decoder_dim, decoder_depth, decoder_heads)

    def predict(self, image: Tensor, order: Tensor) -> Tensor:
        keep, _ = split_order(order, self.visible)
        tokens, _ = self.encoder(image, keep)
        return self.decoder(tokens, order)
