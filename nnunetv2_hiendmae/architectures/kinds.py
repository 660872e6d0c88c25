"""What is known of every kind of encoder without building one: facts for specs and plans, names and shapes of tensors.
Imports no torch: `hiendmae presets` and `hiendmae inspect` answer at once."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

from nnunetv2_hiendmae.architectures.spec import EncoderSpec, cube, require

Shapes = dict[str, tuple[int, ...]]
# what nnU-Net and nnssl build Primus with
MLP_RATIO, NORM_EPS, LAYER_SCALE = 4 * 2 / 3, 1e-5, 0.1


class Kind:
    """Facts of a kind of encoder; its class, an `Encoder`, inherits them.

    Attributes:
        kind: as in `EncoderSpec.kind`.
        network: dotted name of the segmentation network, as it stands in plans.
        own_networks: others that read it, by their name in `hiendmae plan --network`.
        tokens_per_step: tokens that a crop's axes are multiples of; a crop is more than one such step.
        finetuning: fields of the spec that fine-tuning changes.
        has_taps, has_cls: what it has where the spec does not say.
        own_fields: fields of the spec that not every kind has.
    """

    kind: ClassVar[str]
    network: ClassVar[str]
    own_networks: ClassVar[dict[str, str]] = {}
    tokens_per_step: ClassVar[int] = 1
    finetuning: ClassVar[dict[str, Any]] = {}
    has_taps: ClassVar[bool] = True
    has_cls: ClassVar[bool] = True
    own_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        """Refuses a spec, whose fields are in range, that describes no encoder of this kind (ValueError)."""


class ViT(Kind):
    """A plain transformer."""

    kind = "vit"
    network = "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"


class ConvViT(Kind):
    """MiM's hybrid: convolutional stages, then a transformer; no CLS, no taps."""

    kind = "convvit"
    network = "nnunetv2_hiendmae.architectures.convvit_unetr.ConvViTUNETR"
    # the decoder starts at half the transformer's resolution
    tokens_per_step = 2
    finetuning: ClassVar = {"dense": True}
    has_taps = False
    has_cls = False
    own_fields = ("stem_dims", "stem_depths", "dense")

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        dims, depths, token = spec.stem_dims, spec.stem_depths, cube(2 << len(spec.stem_dims))
        needed = "kind 'convvit' needs stem_dims and stem_depths of one length, at least 1"
        require(0 < len(dims) == len(depths), f"{needed}, got {dims} and {depths}")
        require(min(*dims, *depths) >= 1, f"stem_dims {dims} and stem_depths {depths} must be positive")
        needed = f"{len(dims)} convolutional stages and the transformer's need patch_size {token}"
        require(spec.patch_size == token, f"{needed}, got {spec.patch_size}")
        told = f"kind 'convvit' has no CLS token and no taps, got cls_token {spec.cls_token}, taps {spec.taps}"
        require(not spec.cls_token and not spec.taps, told)


class Primus(Kind):
    """An EVA-02 transformer with rotary positions; no CLS."""

    kind = "primus"
    network = "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"
    own_networks: ClassVar = {"primus": "nnunetv2_hiendmae.architectures.primus_network.PrimusNetwork"}
    has_cls = False
    own_fields = ("register_tokens", "layer_scale", "inner_norm")

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        width = f"embed_dim {spec.embed_dim} over num_heads {spec.num_heads}"
        require(spec.embed_dim // spec.num_heads % 6 == 0, f"kind 'primus': {width} is not divisible by 6")
        require(not spec.cls_token, "kind 'primus' has no CLS token, got cls_token true")
        require(spec.pos_embed == "learned", f"kind 'primus' needs pos_embed 'learned', got '{spec.pos_embed}'")
        require(spec.register_tokens >= 0, f"register_tokens {spec.register_tokens} must not be negative")


# every kind; `ENCODERS` has the classes that build them
KINDS: dict[str, type[Kind]] = {kind.kind: kind for kind in (ViT, ConvViT, Primus)}


def tensor_shapes(spec: EncoderSpec) -> Shapes | None:
    """Names and shapes of a spec's state_dict, in its order; None: only building tells (`ENCODERS`), as nobody wrote
    down those of the kind."""
    return _SHAPES[spec.kind](spec) if spec.kind in _SHAPES else None


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inside: int, outside: int) -> Shapes:
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def _embed(name: str, inside: int, outside: int, patch: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": (outside, inside, *patch), f"{name}.bias": (outside,)}


def _mlp(name: str, width: int, ratio: float) -> Shapes:
    hidden = int(width * ratio)
    return {**_linear(f"{name}.fc1", width, hidden), **_linear(f"{name}.fc2", hidden, width)}


def _block(name: str, spec: EncoderSpec, layer_scale: bool = False) -> Shapes:
    """A transformer block."""
    width = spec.embed_dim
    gammas = [{f"{name}.ls{i}.gamma": (width,)} if layer_scale else {} for i in (1, 2)]
    return {
        **_affine(f"{name}.norm1", width),
        **_linear(f"{name}.attn.qkv", width, 3 * width),
        **_linear(f"{name}.attn.proj", width, width),
        **gammas[0],
        **_affine(f"{name}.norm2", width),
        **_mlp(f"{name}.mlp", width, spec.mlp_ratio),
        **gammas[1],
    }


def _vit(spec: EncoderSpec) -> Shapes:
    width, shapes = spec.embed_dim, {}
    if spec.cls_token:
        shapes["cls_token"] = (1, 1, width)
    shapes["pos_embed"] = (1, spec.num_tokens, width)
    shapes |= _embed("patch_embed.proj", spec.in_channels, width, spec.patch_size)
    for i in range(spec.depth):
        shapes |= _block(f"blocks.{i}", spec)
    return shapes | _affine("norm", width)


def _convvit(spec: EncoderSpec) -> Shapes:
    width, stem, half = spec.embed_dim, spec.stem_dims, cube(2)
    shapes = {"pos_embed": (1, spec.num_tokens, width)}
    if spec.dense:
        shapes["rel_pos_bias"] = (spec.depth, math.prod(2 * g - 1 for g in spec.grid), spec.num_heads)
    for i, (inside, outside, depth) in enumerate(zip((spec.in_channels, *stem), stem, spec.stem_depths, strict=False)):
        stage = f"stages.{i}"
        shapes |= _embed(f"{stage}.embed.proj", inside, outside, half) | _affine(f"{stage}.embed.norm", outside)
        for j in range(depth):
            shapes |= _conv_block(f"{stage}.blocks.{j}", outside, spec.mlp_ratio)
    shapes |= _embed("embed.proj", stem[-1], width, half) | _affine("embed.norm", width)
    shapes |= _linear("embed_linear", width, width)
    for i in range(spec.depth):
        shapes |= _block(f"blocks.{i}", spec, layer_scale=spec.dense)
    if spec.dense:
        return shapes
    for i, inside in enumerate(stem):
        shapes |= _embed(f"fusions.{i}.proj", inside, width, cube(2 << (len(stem) - 1 - i)))
    return shapes | _affine("norm", width)


def _conv_block(name: str, width: int, ratio: float) -> Shapes:
    return {
        **_affine(f"{name}.norm1", width),
        **_linear(f"{name}.pw1", width, width),
        **_embed(f"{name}.dw", 1, width, cube(5)),
        **_linear(f"{name}.pw2", width, width),
        **_affine(f"{name}.norm2", width),
        **_mlp(f"{name}.mlp", width, ratio),
    }


def _primus(spec: EncoderSpec) -> Shapes:
    width, hidden, shapes = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio), {}
    if spec.register_tokens:
        shapes["register_tokens"] = (1, spec.register_tokens, width)
    shapes["pos_embed"] = (1, spec.num_tokens, width)
    shapes |= _embed("patch_embed.proj", spec.in_channels, width, spec.patch_size)
    for block in (f"blocks.{i}" for i in range(spec.depth)):
        if spec.layer_scale:
            shapes |= {f"{block}.gamma_1": (width,), f"{block}.gamma_2": (width,)}
        shapes |= _affine(f"{block}.norm1", width) | _linear(f"{block}.attn.q_proj", width, width)
        shapes[f"{block}.attn.k_proj.weight"] = (width, width)
        shapes |= _linear(f"{block}.attn.v_proj", width, width)
        if spec.inner_norm:
            shapes |= _affine(f"{block}.attn.norm", width)
        shapes |= _linear(f"{block}.attn.proj", width, width) | _affine(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.mlp.fc1_g", width, hidden) | _linear(f"{block}.mlp.fc1_x", width, hidden)
        shapes |= _affine(f"{block}.mlp.norm", hidden) | _linear(f"{block}.mlp.fc2", hidden, width)
    return shapes | _affine("norm", width)


_SHAPES: dict[str, Callable[[EncoderSpec], Shapes]] = {"vit": _vit, "convvit": _convvit, "primus": _primus}
