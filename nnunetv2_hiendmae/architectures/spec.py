"""What an encoder is: one frozen, self-validating description, stored in weights and in plans."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

ENCODER_KINDS = ("vit", "convvit")
POSITION_KINDS = ("sincos", "learned")


def default_taps(depth: int) -> tuple[int, ...]:
    """0-based blocks whose outputs feed the decoders; (3, 6, 9) for 12 blocks."""
    return (depth // 4, depth // 2, 3 * depth // 4)


def _cube(edge: int) -> tuple[int, int, int]:
    return (edge, edge, edge)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that shapes an encoder's weights. Axes are D, H, W in array order, sizes in voxels.

    Args:
        img_size: crop that the position grid belongs to; each axis a multiple of `patch_size`.
        patch_size: edge of a patch per axis.
        embed_dim: width E.
        depth: transformer blocks.
        kind: "vit" is a plain transformer; "convvit" is MiM's hybrid (METHODS §3), whose convolutional stages
            halve the map before the transformer does it once more.
        taps: 0-based blocks whose outputs are handed out besides the final one; None: `default_taps(depth)` of a
            vit; a convvit has none.
        cls_token: prepend a CLS token (its position is zero); None: only a vit has one.
        pos_embed: "sincos" is a fixed table, "learned" starts as that table and is trained. Fixed is what counts:
            weights with other axes than those they were trained with hold the same table in another order.
        norm_eps: epsilon of every LayerNorm.
        drop_path_rate: stochastic depth, rising linearly from 0 to this over the blocks.
        stem_dims: widths of a convvit's convolutional stages, fine to coarse.
        stem_depths: conv blocks of each of these stages.
        dense: the fine-tuning form of a convvit: relative position bias and LayerScale in the transformer, no
            fusion convolutions, no final norm, hence no masked forward.

    Raises:
        ValueError: a field contradicts another; the message names both.
    """

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

    def __post_init__(self):
        plain = self.kind == "vit"
        if self.taps is None:
            object.__setattr__(self, "taps", default_taps(self.depth) if plain else ())
        if self.cls_token is None:
            object.__setattr__(self, "cls_token", plain)
        for name in ("img_size", "patch_size", "taps", "stem_dims", "stem_depths"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        self._validate()
        if plain:
            self._validate_vit()
        else:
            self._validate_convvit()

    def _validate(self):
        if self.kind not in ENCODER_KINDS:
            raise ValueError(f"unknown encoder kind '{self.kind}', needed one of {ENCODER_KINDS}")
        if len(self.img_size) != 3 or len(self.patch_size) != 3:
            raise ValueError(
                f"img_size {self.img_size} and patch_size {self.patch_size} need D, H, W: 2D is not supported"
            )
        if min(*self.img_size, *self.patch_size) < 1:
            raise ValueError(f"img_size {self.img_size} and patch_size {self.patch_size} must be positive")
        if any(s % p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}")
        if self.in_channels < 1 or self.depth < 1 or self.embed_dim < 1 or self.num_heads < 1:
            raise ValueError("in_channels, depth, embed_dim and num_heads must be at least 1")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if any(not 0 <= t < self.depth for t in self.taps):
            raise ValueError(f"taps {self.taps} must lie in 0..{self.depth - 1} (depth {self.depth})")
        if list(self.taps) != sorted(self.taps):
            raise ValueError(f"taps {self.taps} must not decrease")
        if self.pos_embed not in POSITION_KINDS:
            raise ValueError(f"unknown pos_embed '{self.pos_embed}', needed one of {POSITION_KINDS}")
        if not self.mlp_ratio > 0 or not self.norm_eps > 0:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} and norm_eps {self.norm_eps} must be positive")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {self.drop_path_rate} must lie in [0, 1)")

    def _validate_vit(self):
        if self.stem_dims or self.stem_depths or self.dense:
            raise ValueError("stem_dims, stem_depths and dense belong to kind 'convvit', the kind is 'vit'")

    def _validate_convvit(self):
        if not self.stem_dims or len(self.stem_dims) != len(self.stem_depths):
            raise ValueError(
                f"kind 'convvit' needs stem_dims and stem_depths of one length, at least 1, "
                f"got {self.stem_dims} and {self.stem_depths}"
            )
        if min(*self.stem_dims, *self.stem_depths) < 1:
            raise ValueError(f"stem_dims {self.stem_dims} and stem_depths {self.stem_depths} must be positive")
        if self.patch_size != _cube(2 << len(self.stem_dims)):
            raise ValueError(
                f"{len(self.stem_dims)} convolutional stages and the transformer's need patch_size "
                f"{_cube(2 << len(self.stem_dims))}, got {self.patch_size}"
            )
        if self.cls_token or self.taps:
            raise ValueError(
                f"kind 'convvit' has no CLS token and no taps, got cls_token {self.cls_token}, taps {self.taps}"
            )

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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EncoderSpec":
        """Inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing fields.
        """
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise ValueError(f"unknown encoder fields {sorted(unknown)}, known are {sorted(known)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
        except TypeError as e:
            raise ValueError(f"incomplete encoder description: {e}") from e


def _convvit(width: int, num_heads: int) -> EncoderSpec:
    """MiM's shape: three stages of two conv blocks, each twice as wide as the one before, 11 transformer blocks."""
    return EncoderSpec(
        _cube(96),
        _cube(16),
        embed_dim=width,
        depth=11,
        num_heads=num_heads,
        kind="convvit",
        stem_dims=(width // 8, width // 4, width // 2),
        stem_depths=(2, 2, 2),
    )


PRESETS: dict[str, EncoderSpec] = {
    # ours, for tests and the demo
    "vit_nano_p8": EncoderSpec(_cube(48), _cube(8), embed_dim=96, depth=6, num_heads=4),
    # GL-MAE ViT-T
    "vit_tiny_p16": EncoderSpec(_cube(96), _cube(16), embed_dim=192, depth=12, num_heads=3),
    "vit_small_p16": EncoderSpec(_cube(96), _cube(16), embed_dim=384, depth=12, num_heads=6),
    # Hi-End-MAE "base", GL-MAE ViT-B
    "vit_base_p16": EncoderSpec(_cube(96), _cube(16), embed_dim=768, depth=12, num_heads=12),
    # Hi-End-MAE as released
    "vit_hiend_p12": EncoderSpec(_cube(96), _cube(12), embed_dim=1536, depth=12, num_heads=16),
    "vit_hiend_p16": EncoderSpec(_cube(96), _cube(16), embed_dim=1536, depth=12, num_heads=16),
    # MiM
    "convvit_tiny": _convvit(width=96, num_heads=3),
    "convvit_base": _convvit(width=384, num_heads=12),
}
