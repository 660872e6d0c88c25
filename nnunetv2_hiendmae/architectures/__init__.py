"""Networks: the encoders that pretraining and fine-tuning share, and the segmentation networks on top."""

from nnunetv2_hiendmae.architectures.convvit import ConvViTEncoder
from nnunetv2_hiendmae.architectures.convvit_unetr import ConvViTUNETR
from nnunetv2_hiendmae.architectures.spec import PRESETS, EncoderSpec
from nnunetv2_hiendmae.architectures.unetr import ViTUNETR
from nnunetv2_hiendmae.architectures.vit import ViTEncoder, build_encoder

__all__ = ["PRESETS", "ConvViTEncoder", "ConvViTUNETR", "EncoderSpec", "ViTEncoder", "ViTUNETR", "build_encoder"]
