"""Foreign checkpoints that are understood: one entry each, with everything that is known about it (METHODS §5)."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights.layouts import (
    Layout,
    Size,
    backbone_name,
    hiendmae_name,
    monai_name,
    monai_value,
    same_name,
    unchanged,
    vit_spec,
)
from nnunetv2_hiendmae.weights.mim_layout import mim_name, mim_spec, mim_value

APACHE = "Apache-2.0"
NONE_STATED = "none stated by the authors"
UNKNOWN = "unknown"
REORIENTING_READER = "NibabelIOWithReorient"
# the usual ViTs by width, tiny to huge
USUAL_SIZES = {192: Size(3, 12), 384: Size(6, 12), 768: Size(12, 12), 1024: Size(16, 24), 1280: Size(16, 32)}

_DECODER = "the decoder is not used for fine-tuning"
_HEAD = "a head of pretraining or classification is not used for fine-tuning"
_MASK = "nothing is masked in fine-tuning"
# what programs call the layers behind an encoder's output
_HEADS = (
    r"((dino_|ibot_)?heads?|head_dist|head_drop|fc_norm|fc|classifier|linear_head|proj(ection)?_head|projector"
    r"|predictor)\..*"
)
# pattern of a name without wrappers, and why such tensors are not read
_MAE_DROPPED = ((r"decoder_.*", _DECODER), (r"mask_token", _MASK))


def _released(spacing_mm: tuple[float, float, float] | None, window_hu: tuple[float, float]) -> VolumeFormat:
    """How the authors' volumes became arrays: the window is [0, 1], axes are turned to RAS."""
    return VolumeFormat(spacing_mm, window_hu, REORIENTING_READER, orientation="RAS")


@dataclass(frozen=True)
class WeightFormat:
    """One kind of file.

    Args:
        name: for `--format`.
        title: in words.
        matches: whether a state_dict is of this kind, from its container's key ("" for a bare one) and its names
            without the wrappers of data-parallel training.
        method: pretraining method, None where only the user knows.
        axes: what the arrays were, see `axes.AXES`.
        sizes: what was released, by width.
        dropped: patterns of names that are rightly left out, with the reason.
        inside: pattern of the names that are the encoder's, where its program keeps them apart; in a file without
            such names, and where this is None, every name is.
        fixed_positions: the program never trains its sin-cos table.
        zero_qkv_bias: the program has an option without qkv bias; zeros are the same.
        head_on_cls: pattern of names that only come with a CLS token.
        lookalikes: what else has the same names, in words; "" for nothing.
    """

    name: str
    title: str
    matches: Callable[[str, Collection[str]], bool]
    layout: Layout
    method: str | None
    axes: str
    sizes: Mapping[int, Size]
    dropped: tuple[tuple[str, str], ...] = _MAE_DROPPED
    seen: VolumeFormat = VolumeFormat(orientation=UNKNOWN)
    licence: str = "not known"
    inside: str | None = None
    fixed_positions: bool = False
    zero_qkv_bias: bool = False
    head_on_cls: str | None = None
    lookalikes: str = ""

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor that is not the encoder's is left out; None: no rule explains it."""
        return next((reason for pattern, reason in self.dropped if re.fullmatch(pattern, name)), None)

    def is_outside(self, name: str, names: Collection[str]) -> bool:
        """Whether a name lies beside an encoder that `names` keep under a prefix of its own."""
        if self.inside is None or re.match(self.inside, name):
            return False
        return _any(names, self.inside)


def _any(names: Collection[str], pattern: str) -> bool:
    return any(re.match(pattern, n) for n in names)


_BLOCK = r"blocks\.\d+\.(norm|attn|mlp)"
_GLMAE_CONTAINERS = ("student", "teacher")

# in the order in which they are tried; a bare MAE3D and a bare GL-MAE have the same names, see `finding.find`
FORMATS: tuple[WeightFormat, ...] = (
    WeightFormat(
        "hiendmae",
        "Hi-End-MAE pretraining checkpoint",
        lambda _key, names: _any(names, rf"encoder\.{_BLOCK}"),
        Layout(hiendmae_name, vit_spec(cls_token=True, cls_row=False), unchanged),
        "hiendmae",
        "xyz",
        {1536: Size(16, 12), 768: Size(12, 12)},
        dropped=(
            (r"decoder\..*|decoder_pos_embed|encoder_to_decoder\..*", _DECODER),
            (r"mask_token", _MASK),
        ),
        seen=_released((1.5, 1.5, 1.5), (-175.0, 250.0)),
        licence=APACHE,
        inside=r"encoder[._]",
        fixed_positions=True,
    ),
    WeightFormat(
        "mim",
        "MiM pretraining checkpoint (hybrid conv-ViT, any number of alignment heads)",
        lambda _key, names: _any(names, r"blocks4\.\d+\."),
        Layout(mim_name, mim_spec, mim_value),
        "mim",
        "xyz",
        {384: Size(12, 11), 96: Size(3, 11)},
        dropped=(*_MAE_DROPPED, (r"aggregate_.*", _HEAD)),
        seen=_released(None, (-1000.0, 1000.0)),
        licence=NONE_STATED,
        fixed_positions=True,
    ),
    WeightFormat(
        "monai",
        "ViT with MONAI's names, alone or as the encoder of a UNETR",
        lambda _key, names: _any(names, r"(vit\.)?(blocks\.\d+\.mlp\.linear1|patch_embedding)\."),
        Layout(monai_name, vit_spec(cls_token=None, cls_row=False, norm_eps=1e-5), monai_value),
        None,
        "dhw",
        {768: Size(12, 12)},
        dropped=(
            (
                r"(vit\.)?blocks\.\d+\.(norm_cross_attn|cross_attn)\..*",
                "MONAI's ViT creates cross-attention tensors and never uses them",
            ),
            (r"(vit\.)?classification_head\..*", _HEAD),
            (r"(encoder\d+|decoder\d+|out|conv3d_transpose(_1)?)\..*", _DECODER),
        ),
        inside=r"vit\.",
        zero_qkv_bias=True,
        head_on_cls=r"(vit\.)?classification_head\..*",
    ),
    WeightFormat(
        "glmae",
        "GL-MAE pretraining checkpoint (student, teacher, or backbone alone)",
        lambda key, names: _any(names, rf"backbone\.{_BLOCK}") or (key in _GLMAE_CONTAINERS and _any(names, _BLOCK)),
        Layout(backbone_name, vit_spec(cls_token=True, cls_row=True), unchanged),
        "glmae",
        "xyz",
        {768: Size(12, 12), 192: Size(3, 12)},
        dropped=((r"(backbone\.)?decoder_.*", _DECODER), (r"(backbone\.)?mask_token", _MASK), (_HEADS, _HEAD)),
        seen=_released(None, (-1000.0, 1000.0)),
        licence=NONE_STATED,
        inside=r"backbone\.",
        fixed_positions=True,
    ),
    WeightFormat(
        "mae3d",
        "MAE3D pretraining checkpoint",
        lambda _key, names: _any(names, _BLOCK) and _any(names, "decoder_"),
        Layout(same_name, vit_spec(cls_token=True, cls_row=True), unchanged),
        "mae3d",
        "xyz",
        USUAL_SIZES,
        dropped=(*_MAE_DROPPED, (_HEADS, _HEAD)),
        licence=NONE_STATED,
        fixed_positions=True,
        lookalikes="taken as MAE3D, but a GL-MAE encoder saved without its container and 'backbone.' has the same "
        "names: if it is one, give --format glmae",
    ),
    WeightFormat(
        "timm",
        "ViT with timm's names and a 3D patch embedding",
        lambda _key, names: _any(names, _BLOCK),
        Layout(same_name, vit_spec(cls_token=None, cls_row=None), unchanged),
        None,
        "dhw",
        USUAL_SIZES,
        dropped=((_HEADS, _HEAD), *_MAE_DROPPED),
        zero_qkv_bias=True,
        lookalikes="taken as timm's with arrays (z, y, x), but the bare encoders of MAE3D and GL-MAE have the same "
        "names: if it is one, give --format mae3d or --format glmae, whose arrays are (x, y, z)",
    ),
)
FORMAT_NAMES = tuple(f.name for f in FORMATS)
# methods that a released or converted encoder may belong to
METHOD_NAMES = tuple(f.method for f in FORMATS if f.method)
DEFAULT_METHOD = "mae3d"
