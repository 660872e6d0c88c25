"""Foreign checkpoints that are understood: one entry each, with everything that is known about it (docs/methods.md,
"Released weights")."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import layouts, primus

APACHE = "Apache-2.0"
NONE_STATED = "none stated by the authors"
UNKNOWN = "unknown"
UNKNOWN_NOTE = (
    "nothing is known of the volumes it saw, not even which way they lay: say it with --reader, --spacing and "
    "--window of hiendmae plan"
)
# the usual ViTs, tiny to huge
USUAL_SIZES = {192: (3, 12), 384: (6, 12), 768: (12, 12), 1024: (16, 24), 1280: (16, 32)}

_BLOCK = r"blocks\.\d+\.(norm|attn|mlp)"
_DECODER = "the decoder is not used for fine-tuning"
_HEAD = "a head of pretraining or classification is not used for fine-tuning"
_UNUSED = "MONAI's ViT creates cross-attention tensors and never uses them"
_MASK = "nothing is masked in fine-tuning"
OUTSIDE = "outside the encoder, whose tensors have a prefix of their own"
# pattern of a name without prefix, and why such tensors are not read
_MAE_DROPPED = ((r"decoder_.*", _DECODER), (r"mask_tokens?", _MASK))
# what programs call the layers behind an encoder's output
_HEADS = r"((dino_|ibot_)?heads?|head_dist|head_drop|fc_norm|fc|classifier|(linear|proj|projection)_head"
_HEADS_DROPPED = ((rf"{_HEADS}|projector|predictor)\..*", _HEAD),)


def _released(method: str) -> VolumeFormat:
    """How the authors' volumes became arrays: the window is [0, 1], axes are turned to RAS."""
    volume = RECIPES[method].volume
    low, high = volume.window_hu
    turned = replace(volume, image_reader_writer="NibabelIOWithReorient", orientation="RAS")
    return replace(turned, intensity_offset=low, intensity_scale=high - low)


@dataclass(frozen=True)
class WeightFormat:
    """One kind of file.

    Args:
        name: for `--format`.
        title: in words.
        blocks: pattern at the start of some names of such an encoder, without prefix.
        rename: a name without prefix → our name of it, None where it is not the encoder's.
        spec: the spec that renamed tensors tell.
        sizes: what was released.
        value: our name, tensor, spec → tensor in our shape and what was done to it ("" for nothing); None: all shapes
            are ours.
        dropped: patterns of names that are rightly left out, with the reason.
        library: names of a library, used for any pretraining; its arrays are nnU-Net's (z, y, x), positions may be
            trained, and it has an option without qkv bias, where zeros are the same. Otherwise of the authors of the
            method `name`, whose arrays are (x, y, z) and who never train their sin-cos table.
        seen: how the images had become arrays, but for the channels.
        only: whether names with such blocks are of no other format, from the container's key ("" for a bare one), the
            prefix and the names; asked where the user does not say the format.
        prefix: that its program puts before the encoder's names.
        inside: pattern of the names that are the encoder's, where that is more than a prefix; None: every name is.
        head_on_cls: pattern of names that only come with a CLS token.
        lookalikes: what else has the same names, in words; "" for nothing.
    """

    name: str
    title: str
    blocks: str
    rename: Callable[[str], str | None]
    spec: layouts.InferSpec
    sizes: layouts.Sizes
    value: Callable[[str, Tensor, EncoderSpec], tuple[Tensor, str]] | None = None
    dropped: tuple[tuple[str, str], ...] = _MAE_DROPPED
    library: bool = False
    seen: VolumeFormat = VolumeFormat(orientation=UNKNOWN, interpolation=None)
    licence: str = "not known"
    only: Callable[[str, str, Collection[str]], bool] = lambda _key, _prefix, _names: True
    prefix: str = ""
    inside: str | None = None
    head_on_cls: str | None = None
    lookalikes: str = ""

    @property
    def method(self) -> str | None:
        """Pretraining method, None where only the user knows."""
        return None if self.library else self.name

    @property
    def axes(self) -> str:
        """What the arrays usually were, one of `options.commands.AXES`."""
        return "dhw" if self.library else "xyz"

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor that is not the encoder's is left out; None: no rule explains it."""
        for pattern, reason in self.dropped:
            if re.fullmatch(pattern, name):
                return reason
        return None if self.inside is None or re.match(self.inside, name) else OUTSIDE


def any_match(names: Collection[str], pattern: str) -> bool:
    """Whether a name begins so."""
    return any(re.match(pattern, n) for n in names)


def like_glmae(key: str, prefix: str) -> bool:
    """Whether a state_dict lies where GL-MAE keeps its student and teacher, as other programs do."""
    return key in ("student", "teacher") or "backbone." in prefix


# in the order in which they are tried; a bare MAE3D and a bare GL-MAE have the same names, see `find.find_encoder`
FORMATS: tuple[WeightFormat, ...] = (
    WeightFormat(
        "hiendmae",
        "Hi-End-MAE pretraining checkpoint",
        rf"encoder\.{_BLOCK}",
        layouts.hiendmae_name,
        partial(layouts.vit_spec, cls_token=True, cls_row=False),
        {1536: (16, 12), 768: (12, 12)},
        dropped=((r"decoder\..*|decoder_pos_embed|encoder_to_decoder\..*", _DECODER), (r"mask_token", _MASK)),
        seen=_released("hiendmae"),
        licence=APACHE,
        only=lambda _key, _prefix, names: any_match(names, "(encoder|decoder)_pos_embed|encoder_to_decoder"),
        inside=r"encoder[._]",
    ),
    WeightFormat(
        "mim",
        "MiM pretraining checkpoint (hybrid conv-ViT, any number of alignment heads)",
        r"blocks4\.\d+\.",
        layouts.mim_name,
        layouts.mim_spec,
        {384: (12, 11), 96: (3, 11)},
        layouts.mim_value,
        dropped=(*_MAE_DROPPED, (r"aggregate_.*", _HEAD)),
        seen=_released("mim"),
        licence=NONE_STATED,
    ),
    WeightFormat(
        "monai",
        "ViT with MONAI's names, alone or as the encoder of a UNETR",
        r"(blocks\.\d+\.mlp\.linear1|patch_embedding)\.",
        layouts.monai_name,
        partial(layouts.vit_spec, cls_token=None, cls_row=False, norm_eps=1e-5),
        {768: (12, 12)},
        layouts.monai_value,
        dropped=(
            *_MAE_DROPPED,
            (r"blocks\.\d+\.(norm_cross_attn|cross_attn)\..*", _UNUSED),
            (r"patch_embedding\.cls_token", "older versions of MONAI created it and never used it"),
            (r"(classification_head|linear_\d)\..*", _HEAD),
            (r"(encoder\d+|decoder\d+|out|conv3d_transpose(_1)?)\..*", _DECODER),
        ),
        prefix="vit.",
        library=True,
        head_on_cls=r"classification_head\..*",
    ),
    WeightFormat(
        "glmae",
        "GL-MAE pretraining checkpoint (student, teacher, or backbone alone)",
        _BLOCK,
        layouts.same_name,
        partial(layouts.vit_spec, cls_token=True, cls_row=True),
        {768: (12, 12), 192: (3, 12)},
        dropped=_MAE_DROPPED + _HEADS_DROPPED,
        seen=_released("glmae"),
        licence=NONE_STATED,
        only=lambda key, prefix, names: like_glmae(key, prefix) and any_match(names, "decoder_|mask_token"),
        prefix="backbone.",
    ),
    WeightFormat(
        "mae3d",
        "MAE3D pretraining checkpoint",
        _BLOCK,
        layouts.same_name,
        partial(layouts.vit_spec, cls_token=True, cls_row=True),
        USUAL_SIZES,
        dropped=_MAE_DROPPED + _HEADS_DROPPED,
        licence=NONE_STATED,
        only=lambda _key, _prefix, names: any_match(names, "decoder_"),
        lookalikes="taken as MAE3D, but a GL-MAE encoder saved without its container and 'backbone.' has the same "
        "names: if it is one, give --format glmae",
    ),
    WeightFormat(
        "timm",
        "ViT with timm's names and a 3D patch embedding",
        _BLOCK,
        layouts.same_name,
        partial(layouts.vit_spec, cls_token=None, cls_row=None),
        USUAL_SIZES,
        dropped=_HEADS_DROPPED + _MAE_DROPPED,
        library=True,
        lookalikes="taken as timm's with arrays (z, y, x), but the bare encoders of MAE3D and GL-MAE have the same "
        "names: if it is one, give --format mae3d or --format glmae, whose arrays are (x, y, z)",
    ),
    PRIMUS := WeightFormat(
        "primus",
        "Primus of dynamic-network-architectures, as nnU-Net's trainers have it",
        primus.BLOCKS,
        primus.primus_name,
        primus.primus_spec,
        primus.SIZES,
        dropped=((r"mask_token", _MASK), (r"(decoder|up_projection)\..*", _DECODER), *_HEADS_DROPPED),
        library=True,
    ),
    # known by its container, or because the user says so
    NNSSL := replace(PRIMUS, name="nnssl", title="Primus of nnssl (OpenMind, nnFoundation)", only=lambda *_: False),
)
