"""Foreign checkpoints that are understood: one entry each, with everything that is known about it (METHODS §5)."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.layouts import (
    Layout,
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
REORIENTING_READER = "NibabelIOWithReorient"
# attention heads of the usual ViT sizes, tiny to huge
USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}

_DECODER = "the decoder is not used for fine-tuning"
_HEAD = "a head of pretraining or classification is not used for fine-tuning"
_MASK = "nothing is masked in fine-tuning"
# pattern of a name without wrappers, and why such tensors are not read
_MAE_DROPPED = ((r"decoder_.*", _DECODER), (r"mask_token", _MASK))


@dataclass(frozen=True)
class Seen:
    """What preprocessing the volumes of a released encoder went through; all None where nobody says.

    Args:
        spacing_mm: of the resampled volumes, None: native or unknown.
        window_hu: becomes [0, 1].
        orientation: in words.
    """

    spacing_mm: tuple[float, float, float] | None = None
    window_hu: tuple[float, float] | None = None
    image_reader_writer: str | None = None
    orientation: str = "unknown"


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
        known_heads: attention heads of the released sizes, by width.
        dropped: patterns of names that are rightly left out, with the reason.
        zero_qkv_bias: the program has an option without qkv bias; zeros are the same.
        head_on_cls: pattern of names that only come with a CLS token.
    """

    name: str
    title: str
    matches: Callable[[str, Collection[str]], bool]
    layout: Layout
    method: str | None
    axes: str
    known_heads: Mapping[int, int]
    dropped: tuple[tuple[str, str], ...] = _MAE_DROPPED
    seen: Seen = field(default_factory=Seen)
    licence: str = "not known"
    zero_qkv_bias: bool = False
    head_on_cls: str | None = None

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor that is not the encoder's is left out; None: no rule explains it."""
        return next((reason for pattern, reason in self.dropped if re.fullmatch(pattern, name)), None)


def _any(names: Collection[str], pattern: str) -> bool:
    return any(re.match(pattern, n) for n in names)


_BLOCK = r"blocks\.\d+\.(norm|attn|mlp)"
_GLMAE_CONTAINERS = ("student", "teacher")

# in the order in which they are tried; a bare MAE3D and a bare GL-MAE have the same names, see the docstring of `find`
FORMATS: tuple[WeightFormat, ...] = (
    WeightFormat(
        "hiendmae",
        "Hi-End-MAE pretraining checkpoint",
        lambda _key, names: _any(names, rf"encoder\.{_BLOCK}"),
        Layout(hiendmae_name, vit_spec(cls_token=True, cls_row=False), unchanged),
        "hiendmae",
        "xyz",
        {1536: 16, 768: 12},
        dropped=(
            (r"decoder\..*|decoder_pos_embed|encoder_to_decoder\..*", _DECODER),
            (r"mask_token", _MASK),
        ),
        seen=Seen((1.5, 1.5, 1.5), (-175.0, 250.0), REORIENTING_READER, "RAS"),
        licence=APACHE,
    ),
    WeightFormat(
        "mim",
        "MiM pretraining checkpoint (hybrid conv-ViT, any number of alignment heads)",
        lambda _key, names: _any(names, r"blocks4\.\d+\."),
        Layout(mim_name, mim_spec, mim_value),
        "mim",
        "xyz",
        {384: 12, 96: 3},
        dropped=(*_MAE_DROPPED, (r"aggregate_.*", _HEAD)),
        seen=Seen(None, (-1000.0, 1000.0), REORIENTING_READER, "RAS"),
        licence=NONE_STATED,
    ),
    WeightFormat(
        "monai",
        "ViT with MONAI's names, alone or as the encoder of a UNETR",
        lambda _key, names: _any(names, r"(vit\.)?(blocks\.\d+\.mlp\.linear1|patch_embedding)\."),
        Layout(monai_name, vit_spec(cls_token=None, cls_row=False, norm_eps=1e-5), monai_value),
        None,
        "dhw",
        {768: 12},
        dropped=(
            (
                r"(vit\.)?blocks\.\d+\.(norm_cross_attn|cross_attn)\..*",
                "MONAI's ViT creates cross-attention tensors and never uses them",
            ),
            (r"(vit\.)?classification_head\..*", _HEAD),
            (r"(encoder\d+|decoder\d+|out|conv3d_transpose(_1)?)\..*", _DECODER),
        ),
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
        {768: 12, 192: 3},
        dropped=((r"(backbone\.)?decoder_.*", _DECODER), (r"(backbone\.)?mask_token", _MASK), (r"head\..*", _HEAD)),
        seen=Seen(None, (-1000.0, 1000.0), REORIENTING_READER, "RAS"),
        licence=NONE_STATED,
    ),
    WeightFormat(
        "mae3d",
        "MAE3D pretraining checkpoint",
        lambda _key, names: _any(names, _BLOCK) and _any(names, "decoder_"),
        Layout(same_name, vit_spec(cls_token=True, cls_row=True), unchanged),
        "mae3d",
        "xyz",
        USUAL_HEADS,
        licence=NONE_STATED,
    ),
    WeightFormat(
        "timm",
        "ViT with timm's names and a 3D patch embedding",
        lambda _key, names: _any(names, _BLOCK),
        Layout(same_name, vit_spec(cls_token=None, cls_row=None), unchanged),
        None,
        "dhw",
        USUAL_HEADS,
        dropped=((r"(head|head_dist|fc_norm|head_drop)\..*", _HEAD), *_MAE_DROPPED),
        zero_qkv_bias=True,
    ),
)
FORMAT_NAMES = tuple(f.name for f in FORMATS)
# methods that a released or converted encoder may belong to
METHOD_NAMES = tuple(f.method for f in FORMATS if f.method)
DEFAULT_METHOD = "mae3d"

# keys under which programs keep the state_dict, the first that fits is taken; "" is a bare one
_CONTAINERS = ("student", "state_dict", "model", "teacher", "")
# how data-parallel training and compilation rename every tensor
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Found:
    """A state_dict in a file, and what it is.

    Args:
        container: its key in the file, "" if the file is the state_dict.
        names: name without wrappers → name in the state_dict.
        state: the tensors, by their names in the state_dict.
    """

    format: WeightFormat
    container: str
    names: dict[str, str]
    state: dict[str, Tensor]


def find(content: Mapping[str, Any], wanted: str | None = None, teacher: bool = False) -> Found:
    """The encoder's state_dict in a file, recognised by its names.

    MAE3D and a GL-MAE encoder saved without its container and `backbone.` have the same names. Such a file is taken
    as MAE3D, of which the names are the original ones; `wanted="glmae"` says otherwise.

    Args:
        wanted: name of a format, instead of recognising it.
        teacher: take the momentum teacher.

    Raises:
        UserError: unknown names, an unknown format, or no teacher.
    """
    if wanted is not None and wanted not in FORMAT_NAMES:
        raise UserError(f"--format {wanted} is unknown, needed one of {', '.join(FORMAT_NAMES)}")
    states = {key: _tensors(content.get(key) if key else content) for key in _CONTAINERS}
    if teacher:
        if not states["teacher"]:
            raise UserError("--use-teacher: there is no 'teacher' in the file; run the same command without it")
        states = {"teacher": states["teacher"]}
    for container, state in states.items():
        if not state:
            continue
        names = _unwrapped(state)
        for entry in FORMATS:
            if entry.name == wanted or (wanted is None and entry.matches(container, names)):
                return Found(entry, container, names, state)
    raise UserError(f"unknown kind of weights: {_contents(states, content)}; {_known()}")


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {k: v.detach() for k, v in value.items() if is_weight(k, v)}


def is_weight(key: Any, value: Any) -> bool:
    """Whether an entry of a dictionary is one of a state_dict."""
    return isinstance(key, str) and isinstance(value, Tensor)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, str]:
    names = {name: name for name in state}
    while wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = {n.removeprefix(wrapper): source for n, source in names.items()}
    return names


def _contents(states: Mapping[str, Mapping[str, Tensor]], content: Mapping[str, Any]) -> str:
    for container, state in states.items():
        if state:
            more = f" and {len(state) - 5} more" if len(state) > 5 else ""
            return f"{f'{container!r} with ' if container else ''}{', '.join(list(state)[:5])}{more}"
    return f"the entries {', '.join(map(str, list(content)[:8]))}"


def _known() -> str:
    return f"known formats are {', '.join(FORMAT_NAMES)} (choose with --format), and our own checkpoints and encoders"
