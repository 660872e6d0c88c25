"""Networks: the encoders that pretraining and fine-tuning share, and the segmentation networks on top. What a spec says
imports no torch; what computes is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nnunetv2_hiendmae.architectures.kinds import KINDS, LAYER_SCALE, MLP_RATIO, NORM_EPS
from nnunetv2_hiendmae.architectures.spec import EncoderSpec, cube

if TYPE_CHECKING:
    from nnunetv2_hiendmae.architectures.convvit import ConvViTEncoder
    from nnunetv2_hiendmae.architectures.convvit_unetr import ConvViTUNETR
    from nnunetv2_hiendmae.architectures.encoders import ENCODERS, build_encoder
    from nnunetv2_hiendmae.architectures.layers import Encoder
    from nnunetv2_hiendmae.architectures.primus import PrimusEncoder
    from nnunetv2_hiendmae.architectures.primus_network import PrimusNetwork
    from nnunetv2_hiendmae.architectures.unetr import ViTUNETR
    from nnunetv2_hiendmae.architectures.vit import ViTEncoder

__all__ = ["ENCODERS", "KINDS", "PRESETS", "ConvViTEncoder", "ConvViTUNETR", "Encoder", "EncoderSpec"]
__all__ += ["PrimusEncoder", "PrimusNetwork", "ViTEncoder", "ViTUNETR", "build_encoder"]

# public name → its module, which imports torch and timm
_LATER = {"ENCODERS": "encoders", "build_encoder": "encoders", "Encoder": "layers", "ViTEncoder": "vit"}
_LATER |= {"ConvViTEncoder": "convvit", "ViTUNETR": "unetr", "ConvViTUNETR": "convvit_unetr"}
_LATER |= {"PrimusEncoder": "primus", "PrimusNetwork": "primus_network"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _convvit(width: int, num_heads: int) -> EncoderSpec:
    """MiM's shape: three stages of two conv blocks, each twice as wide as the one before, 11 transformer blocks."""
    stages = {"stem_dims": (width // 8, width // 4, width // 2), "stem_depths": (2, 2, 2)}
    return EncoderSpec(cube(96), cube(16), embed_dim=width, depth=11, num_heads=num_heads, kind="convvit", **stages)


def _primus(img_size: int, width: int, depth: int, num_heads: int) -> EncoderSpec:
    """Primus as nnU-Net and nnssl build it: patches of 8 voxels, LayerScale and norms inside the attention."""
    fixed = {"mlp_ratio": MLP_RATIO, "pos_embed": "learned", "norm_eps": NORM_EPS}
    options = {"layer_scale": LAYER_SCALE, "inner_norm": True}
    return EncoderSpec(cube(img_size), cube(8), width, depth, num_heads, kind="primus", **fixed, **options)


PRESETS: dict[str, EncoderSpec] = {
    # ours, for tests and the demo
    "vit_nano_p8": EncoderSpec(cube(48), cube(8), embed_dim=96, depth=6, num_heads=4),
    # GL-MAE ViT-T
    "vit_tiny_p16": EncoderSpec(cube(96), cube(16), embed_dim=192, depth=12, num_heads=3),
    "vit_small_p16": EncoderSpec(cube(96), cube(16), embed_dim=384, depth=12, num_heads=6),
    # Hi-End-MAE "base", GL-MAE ViT-B
    "vit_base_p16": EncoderSpec(cube(96), cube(16), embed_dim=768, depth=12, num_heads=12),
    # Hi-End-MAE as released
    "vit_hiend_p12": EncoderSpec(cube(96), cube(12), embed_dim=1536, depth=12, num_heads=16),
    "vit_hiend_p16": EncoderSpec(cube(96), cube(16), embed_dim=1536, depth=12, num_heads=16),
    # MiM
    "convvit_tiny": _convvit(width=96, num_heads=3),
    "convvit_base": _convvit(width=384, num_heads=12),
    # ours, for tests; then the sizes of the Primus paper
    "primus_nano": _primus(48, width=96, depth=4, num_heads=4),
    "primus_s": _primus(160, width=396, depth=12, num_heads=6),
    "primus_b": _primus(160, width=792, depth=12, num_heads=12),
    "primus_m": _primus(160, width=864, depth=16, num_heads=12),
    "primus_l": _primus(160, width=1056, depth=24, num_heads=16),
}
