"""The classes that build encoders."""

from nnunetv2_hiendmae.architectures.convvit import ConvViTEncoder
from nnunetv2_hiendmae.architectures.layers import Encoder
from nnunetv2_hiendmae.architectures.primus import PrimusEncoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.vit import ViTEncoder

# every kind of encoder; all that is special about one stands in its class and its `Kind`
ENCODERS: dict[str, type[Encoder]] = {encoder.kind: encoder for encoder in (ViTEncoder, ConvViTEncoder, PrimusEncoder)}


def build_encoder(spec: EncoderSpec) -> Encoder:
    """Encoder of a spec, freshly initialised."""
    return ENCODERS[spec.kind](spec)
