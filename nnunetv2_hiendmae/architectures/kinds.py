"""What is known of every kind of encoder without building one: facts for specs and plans, names and shapes of tensors.
Imports no torch: `hiendmae presets` and `hiendmae inspect` answer at once."""

import math
from typing import Any, ClassVar

from nnunetv2_hiendmae.architectures.spec import EncoderSpec, cube, require

# name → shape
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

    @classmethod
    def tensor_shapes(cls, spec: EncoderSpec) -> Shapes:
        """Every tensor of the encoder that a spec describes, by its name in the state_dict."""
        raise NotImplementedError


def _layers(weights: Shapes) -> Shapes:
    """Weights and biases of layers, by the shapes of their weights."""
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def _repeated(name: str, count: int, block: Shapes) -> Shapes:
    """The same block so many times, in a list of that name."""
    return {f"{name}.{i}.{inner}": shape for i in range(count) for inner, shape in block.items()}


def _transformer(spec: EncoderSpec, layer_scale: bool = False) -> Shapes:
    """The blocks of `layers.transformer_blocks`."""
    width, hidden = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
    block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm1": (width,), "norm2": (width,)}
    block |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    gammas = {"ls1.gamma": (width,), "ls2.gamma": (width,)} if layer_scale else {}
    return _repeated("blocks", spec.depth, _layers(block) | gammas)


class ViT(Kind):
    """A plain transformer."""

    kind = "vit"
    network = "nnunetv2_hiendmae.architectures.unetr.ViTUNETR"

    @classmethod
    def tensor_shapes(cls, spec: EncoderSpec) -> Shapes:
        width = spec.embed_dim
        layers = {"patch_embed.proj": (width, spec.in_channels, *spec.patch_size), "norm": (width,)}
        tokens = {"pos_embed": (1, spec.num_tokens, width)}
        if spec.cls_token:
            tokens["cls_token"] = (1, 1, width)
        return tokens | _layers(layers) | _transformer(spec)


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

    @classmethod
    def tensor_shapes(cls, spec: EncoderSpec) -> Shapes:
        width, stem, half = spec.embed_dim, spec.stem_dims, cube(2)
        layers = {"embed.proj": (width, stem[-1], *half), "embed.norm": (width,), "embed_linear": (width, width)}
        for i, (inside, own, depth) in enumerate(zip((spec.in_channels, *stem), stem, spec.stem_depths, strict=False)):
            layers |= {f"stages.{i}.embed.proj": (own, inside, *half), f"stages.{i}.embed.norm": (own,)}
            hidden = int(own * spec.mlp_ratio)
            block = {"pw1": (own, own), "dw": (own, 1, *cube(5)), "pw2": (own, own), "norm1": (own,), "norm2": (own,)}
            block |= {"mlp.fc1": (hidden, own), "mlp.fc2": (own, hidden)}
            layers |= _repeated(f"stages.{i}.blocks", depth, block)
        tables = {"pos_embed": (1, spec.num_tokens, width)}
        if spec.dense:
            tables["rel_pos_bias"] = (spec.depth, math.prod(2 * g - 1 for g in spec.grid), spec.num_heads)
        else:
            layers["norm"] = (width,)
            layers |= {f"fusions.{i}.proj": (width, c, *cube(1 << (len(stem) - i))) for i, c in enumerate(stem)}
        return tables | _layers(layers) | _transformer(spec, layer_scale=spec.dense)


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

    @classmethod
    def tensor_shapes(cls, spec: EncoderSpec) -> Shapes:
        width, hidden = spec.embed_dim, int(spec.embed_dim * spec.mlp_ratio)
        layers = {"patch_embed.proj": (width, spec.in_channels, *spec.patch_size), "norm": (width,)}
        tokens = {"pos_embed": (1, spec.num_tokens, width)}
        if spec.register_tokens:
            tokens["register_tokens"] = (1, spec.register_tokens, width)
        block = {f"attn.{part}": (width, width) for part in ("q_proj", "v_proj", "proj")}
        block |= {"norm1": (width,), "norm2": (width,), "mlp.norm": (hidden,), "mlp.fc2": (width, hidden)}
        block |= {"mlp.fc1_g": (hidden, width), "mlp.fc1_x": (hidden, width)}
        if spec.inner_norm:
            block["attn.norm"] = (width,)
        others = {"attn.k_proj.weight": (width, width)}
        if spec.layer_scale:
            others |= {"gamma_1": (width,), "gamma_2": (width,)}
        return tokens | _layers(layers) | _repeated("blocks", spec.depth, _layers(block) | others)


# every kind; `ENCODERS` has the classes that build them
KINDS: dict[str, type[Kind]] = {kind.kind: kind for kind in (ViT, ConvViT, Primus)}
