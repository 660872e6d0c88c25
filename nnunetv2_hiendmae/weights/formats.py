"""Foreign checkpoints that are understood: one entry each, with everything that is known about it, and where in a file
the encoder's state_dict is (docs/methods.md, "Released weights")."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import layouts, primus
from nnunetv2_hiendmae.weights.checkpoint_io import is_weight, tensors_in

APACHE = "Apache-2.0"
NONE_STATED = "none stated by the authors"
UNKNOWN = "unknown"
# the usual ViTs, tiny to huge
USUAL_SIZES = {192: (3, 12), 384: (6, 12), 768: (12, 12), 1024: (16, 24), 1280: (16, 32)}

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


def _any(names: Collection[str], pattern: str) -> bool:
    return any(re.match(pattern, n) for n in names)


_BLOCK = r"blocks\.\d+\.(norm|attn|mlp)"
_WHICH = (
    "its names are those of timm, and it lies where GL-MAE and other programs keep a student or teacher. Of GL-MAE "
    "(arrays x y z, window -1000..1000): give --format glmae. Of another program (arrays z y x, nothing known of its "
    "images): give --format timm"
)


def _like_glmae(key: str, prefix: str) -> bool:
    return key in ("student", "teacher") or "backbone." in prefix


# in the order in which they are tried; a bare MAE3D and a bare GL-MAE have the same names, see `find_encoder`
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
        only=lambda _key, _prefix, names: _any(names, "(encoder|decoder)_pos_embed|encoder_to_decoder"),
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
        only=lambda key, prefix, names: _like_glmae(key, prefix) and _any(names, "decoder_|mask_token"),
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
        only=lambda _key, _prefix, names: _any(names, "decoder_"),
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
FORMAT_NAMES = tuple(f.name for f in FORMATS)

# keys under which programs keep the state_dict, the first that fits is taken; "" is a bare one
_CONTAINERS = ("student", "state_dict", "model", "model_state_dict", "net", "network", "network_weights", "teacher", "")
# what stands before an encoder's patch embedding, of any format, where other tensors have names without it
_PREFIX = re.compile(r"(.+?\.)(patch_embed(ding)?\d?|down_projection)\.")
_MOST_LISTED = 5


@dataclass(frozen=True)
class ForeignEncoder:
    """The state_dict of an encoder in another program's file, and of which format it is.

    Args:
        path: keys that lead to it, () if the file is the state_dict.
        prefix: of the encoder's names.
        names: name without prefix → name in the state_dict.
        outside: the same of tensors without that prefix; without the one that all have.
        state: the tensors, by their names in the state_dict.
    """

    format: WeightFormat
    path: tuple[str, ...]
    prefix: str
    names: dict[str, str]
    outside: dict[str, str]
    state: dict[str, Tensor]


def find_encoder(content: Mapping[str, Any], options: ConvertOptions) -> ForeignEncoder:
    """The encoder's state_dict in a file, recognised by its names.

    It is looked for under the usual keys, then under those inside the one other dictionary of the file that has it.
    MAE3D and a GL-MAE backbone saved without its container and `backbone.` have the same names. Such a file is taken
    as MAE3D, of which the names are the original ones; without its decoder as timm, whose arrays are `dhw`, not
    `xyz`. `--format glmae` says otherwise.

    Raises:
        UserError: unknown names, an unknown format or method, no teacher, several dictionaries or prefixes with an
            encoder, or one that may be GL-MAE's or not.
    """
    if options.format not in (None, *FORMAT_NAMES):
        raise UserError(f"--format {options.format} is unknown, needed one of {', '.join(FORMAT_NAMES)}")
    if options.method not in (None, *RECIPES):
        raise UserError(f"--method {options.method} is unknown, needed one of {', '.join(RECIPES)}")
    if found := _matching(content, options):
        return found
    inner = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}
    nested = {k: found for k, v in inner.items() if (found := _matching(v, options))}
    if len(nested) == 1:
        key, found = nested.popitem()
        return replace(found, path=(key, *found.path))
    if nested:
        raise UserError(
            f"encoders in {some(map(printable, nested), _MOST_LISTED)}: which is meant? save that one alone"
        )
    if options.use_teacher and not any("teacher" in level for level in (content, *inner.values())):
        raise UserError("--use-teacher: there is no 'teacher' in the file; run the same command without it")
    unknown = f"--format {options.format}: no such encoder" if options.format else "unknown kind of weights"
    raise UserError(
        f"{unknown}: {_contents(content)}; known formats are {', '.join(FORMAT_NAMES)} (choose with "
        "--format), and our own checkpoints and encoders"
    )


def _matching(content: Mapping[str, Any], options: ConvertOptions) -> ForeignEncoder | None:
    """The first state_dict under the usual keys that has an encoder of a format, or of the wanted one."""
    for key in ("teacher",) if options.use_teacher else _CONTAINERS:
        inside = content.get(key) if key else content
        state = {k: v.detach() for k, v in inside.items() if is_weight(k, v)} if isinstance(inside, Mapping) else {}
        if found := _under_a_prefix(key, state, options):
            return found
    return None


def _under_a_prefix(key: str, state: dict[str, Tensor], options: ConvertOptions) -> ForeignEncoder | None:
    """An encoder whose names have any prefix: one that all names of a state_dict share, else one of some of them."""
    path, prefix, names = (key,) if key else (), "", {name: name for name in state}
    while names:
        if entry := _format(key, prefix, names, options):
            return ForeignEncoder(entry, path, prefix, names, {}, state)
        shared = {name.partition(".")[0] if "." in name else "" for name in names}
        if len(shared) > 1 or "" in shared:
            break
        prefix += f"{shared.pop()}."
        names = {name.partition(".")[2]: source for name, source in names.items()}
    found = []
    for inner in sorted({match[1] for match in map(_PREFIX.match, names) if match}):
        own = {name.removeprefix(inner): source for name, source in names.items() if name.startswith(inner)}
        if entry := _format(key, prefix + inner, own, options):
            outside = {name: source for name, source in names.items() if not name.startswith(inner)}
            found.append(ForeignEncoder(entry, path, prefix + inner, own, outside, state))
    if len(found) > 1:
        told = some([printable(f.prefix) for f in found], _MOST_LISTED)
        raise UserError(f"encoders with the prefixes {told}: which is meant? save that one alone")
    return found[0] if found else None


def _format(key: str, prefix: str, names: Collection[str], options: ConvertOptions) -> WeightFormat | None:
    """The first format that names without their prefix are of; the wanted one, if they can be of it."""
    fitting = [f for f in FORMATS if _any(names, f.blocks)]
    if options.format is not None:
        return next((f for f in fitting if f.name == options.format), None)
    entry = next((f for f in fitting if f.only(key, prefix, names)), None)
    if entry is not None and entry.name == "timm" and _like_glmae(key, prefix):
        raise UserError(_WHICH)
    return entry


def _contents(content: Mapping[str, Any]) -> str:
    """Where a file's tensors are, and the names of some."""
    places: dict[str, list[str]] = {}
    for key, value in content.items():
        bare = isinstance(value, Tensor)
        inside = [str(key)] if bare else [name for name, _ in tensors_in(value)]
        places.setdefault("" if bare else f"{printable(key)!r} with ", []).extend(inside)
    told = [f"{place}{some(map(printable, names), _MOST_LISTED)}" for place, names in places.items() if names]
    return f"tensors are {'; '.join(told[:_MOST_LISTED])}"
