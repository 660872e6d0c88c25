"""What an encoder is: one frozen, self-validating description, stored in weights and in plans."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from nnunetv2_hiendmae.schemas import CLOSED, validated

POSITION_KINDS = ("sincos", "learned")
# no number of an encoder comes near it, and products of a few such numbers are still numbers
_LARGEST = 2**31
# fields that 0.1 did not know: left out of the JSON form where they are at their default, so that its runs and plans,
# whose settings are compared in this form, go on
_SINCE_0_1 = ("register_tokens", "layer_scale", "inner_norm")


def default_taps(depth: int) -> tuple[int, ...]:
    """0-based blocks whose outputs feed the decoders; (3, 6, 9) for 12 blocks."""
    return (depth // 4, depth // 2, 3 * depth // 4)


def cube(edge: int) -> tuple[int, int, int]:
    """Three equal axes."""
    return (edge, edge, edge)


def require(fine: bool, told: str) -> None:
    """Raises ValueError with what is told, unless fine."""
    if not fine:
        raise ValueError(told)


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """K = int(N·(1 − ratio)), in floating point as the authors compute it (30 tokens at .9 give 2)."""
    return int(num_tokens * (1 - mask_ratio))


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that shapes an encoder's weights. Axes are D, H, W in array order, sizes in voxels.

    Args:
        img_size: crop that the position grid belongs to; each axis a multiple of `patch_size`.
        patch_size: edge of a patch per axis.
        embed_dim: width E.
        depth: transformer blocks.
        kind: "vit" is a plain transformer; "convvit" is MiM's hybrid, whose convolutional stages halve the map before
            the transformer does it once more; "primus" is an EVA-02 transformer with rotary positions.
        taps: 0-based blocks whose outputs are handed out besides the final one; None: `default_taps(depth)`; a
            convvit has none.
        cls_token: prepend a CLS token (its position is zero); None: only a vit has one.
        pos_embed: "sincos" is a fixed table, "learned" starts as that table and is trained. Fixed is what counts:
            weights with other axes than those they were trained with hold the same table in another order.
        norm_eps: epsilon of every LayerNorm.
        drop_path_rate: stochastic depth, rising linearly from 0 to this over the blocks.
        stem_dims: widths of a convvit's convolutional stages, fine to coarse.
        stem_depths: conv blocks of each of these stages.
        dense: the fine-tuning form of a convvit: relative position bias and LayerScale in the transformer, no
            fusion convolutions, no final norm, hence no masked forward.
        register_tokens: tokens of a primus that belong to no place; no output has them.
        layer_scale: start of LayerScale's γ in a primus; None: it has none.
        inner_norm: whether a primus norms what its attention gives, before projecting it.

    Raises:
        ValueError: a field contradicts another; the message names both.
    """

    __pydantic_config__: ClassVar = CLOSED
    img_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    embed_dim: int
    depth: int
    num_heads: int
    kind: str = "vit"
    in_channels: int = 1
    mlp_ratio: float = 4.0
    taps: tuple[int, ...] | None = None
    cls_token: bool | None = None
    pos_embed: str = "sincos"
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    stem_dims: tuple[int, ...] = ()
    stem_depths: tuple[int, ...] = ()
    dense: bool = False
    register_tokens: int = 0
    layer_scale: float | None = None
    inner_norm: bool = False

    def __post_init__(self):
        # that module imports this one
        from nnunetv2_hiendmae.architectures.kinds import KINDS

        require(self.kind in KINDS, f"unknown encoder kind '{self.kind}', needed one of {tuple(KINDS)}")
        if self.taps is None:
            object.__setattr__(self, "taps", default_taps(self.depth) if KINDS[self.kind].has_taps else ())
        if self.cls_token is None:
            object.__setattr__(self, "cls_token", KINDS[self.kind].has_cls)
        for name in ("img_size", "patch_size", "taps", "stem_dims", "stem_depths"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        self._validate()
        own = KINDS[self.kind].own_fields
        for kind, facts in KINDS.items():
            told = f"{', '.join(facts.own_fields)} belong to kind '{kind}', the kind is '{self.kind}'"
            require(not any(getattr(self, name) for name in facts.own_fields if name not in own), told)
        KINDS[self.kind].check_spec(self)

    def _validate(self):
        sizes = f"img_size {self.img_size} and patch_size {self.patch_size}"
        require(len(self.img_size) == len(self.patch_size) == 3, f"{sizes} need D, H, W: 2D is not supported")
        require(min(*self.img_size, *self.patch_size) >= 1, f"{sizes} must be positive")
        whole = not any(s % p for s, p in zip(self.img_size, self.patch_size, strict=True))
        require(whole, f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}")
        counts = (self.in_channels, self.depth, self.embed_dim, self.num_heads)
        require(min(counts) >= 1, "in_channels, depth, embed_dim and num_heads must be at least 1")
        require(max(*counts, *self.img_size) <= _LARGEST, f"a size is more than {_LARGEST}, which no encoder has")
        whole = self.embed_dim % self.num_heads == 0
        require(whole, f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        inside = all(0 <= t < self.depth for t in self.taps)
        require(inside, f"taps {self.taps} must lie in 0..{self.depth - 1} (depth {self.depth})")
        require(list(self.taps) == sorted(self.taps), f"taps {self.taps} must not decrease")
        known = self.pos_embed in POSITION_KINDS
        require(known, f"unknown pos_embed '{self.pos_embed}', needed one of {POSITION_KINDS}")
        positive = self.mlp_ratio > 0 and self.norm_eps > 0
        require(positive, f"mlp_ratio {self.mlp_ratio} and norm_eps {self.norm_eps} must be positive")
        require(0 <= self.drop_path_rate < 1, f"drop_path_rate {self.drop_path_rate} must lie in [0, 1)")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens per axis of a crop of `img_size`."""
        return tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))

    @property
    def num_tokens(self) -> int:
        """Patch tokens of a crop, CLS not counted."""
        return math.prod(self.grid)

    @property
    def patch_voxels(self) -> int:
        """Values per patch P = p_d·p_h·p_w·C."""
        return math.prod(self.patch_size) * self.in_channels

    def with_(self, **changes: Any) -> "EncoderSpec":
        """Copy with some fields changed, validated anew."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form (tuples become lists)."""
        said = {k: v for k, v in asdict(self).items() if v or k not in _SINCE_0_1}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EncoderSpec":
        """Inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing fields, or a value of another type.
        """
        return validated(cls, json.dumps(data))
