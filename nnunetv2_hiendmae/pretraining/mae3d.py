"""MAE3D, the baseline: a masked autoencoder with a plain decoder (docs/methods.md, "MAE3D")."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import split_shuffle
from nnunetv2_hiendmae.options import option
from nnunetv2_hiendmae.pretraining.decoder import MAEDecoder
from nnunetv2_hiendmae.pretraining.masked import MaskedCropMethod


class MAE3D(MaskedCropMethod):
    """Masked autoencoder: encode the visible tokens, decode all of them, MSE on the masked patches."""

    name = "mae3d"
    title = "MAE3D"
    source = "He et al., CVPR 2022, in 3D; decoder 512 x 8 x 16 as in GL-MAE. Training recipe: ours, that of Hi-End-MAE"

    @dataclass(frozen=True)
    class Options(MaskedCropMethod.Options):
        """Of the target, and the decoder's width, blocks and attention heads."""

        # every patch by its own mean and standard deviation (unbiased variance)
        normalize_target: bool = option(True)
        decoder_dim: int = option(512)
        decoder_depth: int = option(8)
        decoder_heads: int = option(16)

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        chosen = self.options
        self.normalize_target = chosen.normalize_target
        self.decoder = MAEDecoder(spec, chosen.decoder_dim, chosen.decoder_depth, chosen.decoder_heads)

    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        ids_keep, _ = split_shuffle(ids_shuffle, self.visible)
        tokens, _ = self.encoder(image, ids_keep)
        return self.decoder(tokens, ids_shuffle)
