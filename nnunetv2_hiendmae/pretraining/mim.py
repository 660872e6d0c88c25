"""MiM: masked autoencoding on three nested levels of one crop, aligned with each other (METHODS §3)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.tokens import put_tokens
from nnunetv2_hiendmae.pretraining.alignment import ALIGNMENTS, RegionAlignment
from nnunetv2_hiendmae.pretraining.checks import require, visible_of
from nnunetv2_hiendmae.pretraining.decoder import MAEDecoder
from nnunetv2_hiendmae.pretraining.masked import patch_targets, picture
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, PretrainRecipe, Reconstruction
from nnunetv2_hiendmae.pretraining.nested import OCTANTS, NestedCrops, cut_blocks, octant_tokens, resize
from nnunetv2_hiendmae.recipes import RECIPES

CURRICULA = ("concurrent", "coarse_to_fine", "fine_to_coarse")
LEVELS = (1, 2, 3)


class MiM(Method):
    """Mask in Mask: one encoder and one decoder for three levels of one crop of twice the encoder's edge.

    Level 1 is the whole crop, halved, with whole octants masked; level 2 are masked octants at full resolution; level
    3 are masked patches of level 2, enlarged. Each level is reconstructed (MSE on masked tokens, patch-normalised);
    levels 1 and 2, and levels 2 and 3, are aligned (see `alignment.RegionAlignment`).

    Memory is bounded by parts (see `Method`): level 1, then the views of level 2, then those of level 3,
    `views_per_part` of every volume at a time. The coarser side of the alignment is detached by definition, so that a
    part needs only values of the parts before it, never their activations.

    Args:
        mask_ratio_level1: share of the 8 octants that is hidden.
        mask_ratio_level2, mask_ratio_level3: share of tokens that is hidden.
        crops_level2: masked octants per volume that become level-2 views.
        crops_level3: masked patches per level-2 view that become level-3 views.
        alignment: "infonce" (ours: the paper's equation is not published), "byol" or "none".
        tau: temperature of "infonce" (ours).
        weight_level1, weight_level2, weight_level3: of the reconstruction losses.
        weight_align12, weight_align23: of the alignment losses.
        curriculum: "concurrent"; "coarse_to_fine" multiplies level 1 by 1 + cos(π/2·t) and level 3 by sin(π/2·t),
            t being the finished fraction of the run; "fine_to_coarse" (ours) exchanges the two.
        foreground_share: of crops that are centred on foreground (ours: see `NestedCrops`).
        decoder_dim, decoder_depth, decoder_heads: of the decoder; the same for both published encoders.
        views_per_part: views of each volume that are in memory together (ours). More is faster on a GPU that a
            micro-batch of volumes does not fill.
    """

    name = "mim"
    title = "MiM"
    source = (
        "Zhuang et al. 2024. A sample is a volume with 21 views: 24 volumes stand for the paper's 512 views. Published "
        "lr: 1e-4 · views / 256"
    )
    citations: ClassVar[tuple[str, ...]] = RECIPES["mim"].citations
    recipe = PretrainRecipe(encoder="convvit_base", epochs=800, warmup_epochs=40, batch_size=24, accumulate=4, lr=2e-4)
    notes: ClassVar[dict[str, str]] = {
        "mask_ratio_level1": "share of octants",
        "mask_ratio_level2": "share of tokens",
        "mask_ratio_level3": "share of tokens",
        "crops_level2": "per volume",
        "crops_level3": "per level-2 view",
        "alignment": "infonce, byol or none; ours, the equation is unpublished",
        "tau": "of infonce, ours",
        "curriculum": f"{', '.join(CURRICULA[:-1])}, or {CURRICULA[-1]}, which is ours",
        "foreground_share": "share of crops, ours",
        "views_per_part": "views of each volume in memory at once, ours",
        "steps_per_epoch": "ours",
        "batch_size": "volumes",
        "accumulate": "micro-batches, ours",
    }

    def __init__(
        self,
        spec: EncoderSpec,
        mask_ratio_level1: float = 0.5,
        mask_ratio_level2: float = 0.6,
        mask_ratio_level3: float = 0.5,
        crops_level2: int = 4,
        crops_level3: int = 4,
        alignment: str = "infonce",
        tau: float = 0.1,
        weight_level1: float = 1.0,
        weight_level2: float = 1.0,
        weight_level3: float = 1.0,
        weight_align12: float = 0.1,
        weight_align23: float = 0.1,
        curriculum: str = "concurrent",
        foreground_share: float = 0.0,
        decoder_dim: int = 576,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        views_per_part: int = 1,
    ):
        super().__init__(spec)
        octants = octant_tokens(spec.grid)
        n = spec.num_tokens
        visible_octants = visible_of(OCTANTS, "mask_ratio_level1", mask_ratio_level1, "octants", mend="")
        self.visible = {
            1: visible_octants * octants.shape[1],
            2: visible_of(n, "mask_ratio_level2", mask_ratio_level2),
            3: visible_of(n, "mask_ratio_level3", mask_ratio_level3),
        }
        for option, value, most, what in (
            ("crops_level2", crops_level2, OCTANTS - visible_octants, "masked octants"),
            ("crops_level3", crops_level3, n - self.visible[2], "masked tokens of a level-2 view"),
        ):
            require(1 <= value <= most, option, value, f"1 to {most} ({what})")
        require(alignment in ALIGNMENTS, "alignment", alignment, f"one of {', '.join(ALIGNMENTS)}")
        require(curriculum in CURRICULA, "curriculum", curriculum, f"one of {', '.join(CURRICULA)}")
        require(0 < tau < math.inf, "tau", tau, "more than 0")
        require(views_per_part >= 1, "views_per_part", views_per_part, "at least 1")
        require(0 <= foreground_share <= 1, "foreground_share", foreground_share, "0 to 1")
        weights = {
            "level1": weight_level1,
            "level2": weight_level2,
            "level3": weight_level3,
            "align12": weight_align12,
            "align23": weight_align23,
        }
        for name, weight in weights.items():
            require(0 <= weight < math.inf, f"weight_{name}", weight, "0 or more")
        reconstructs = weight_level1 + weight_level2 + weight_level3 > 0
        aligns = alignment != "none" and weight_align12 + weight_align23 > 0
        require(reconstructs or aligns, "weight_level1", weight_level1, "more than 0: every part of the loss is off")
        self.weights = {f"loss_{name}": weight for name, weight in weights.items()}
        self.curriculum = curriculum
        self.crops = NestedCrops(
            spec.img_size, spec.grid, visible_octants, self.visible[2], crops_level2, crops_level3, foreground_share
        )
        self.num_views = {1: 1, 2: crops_level2, 3: crops_level2 * crops_level3}
        self.parts = [
            (level, range(start, min(start + views_per_part, self.num_views[level])))
            for level in LEVELS
            for start in range(0, self.num_views[level], views_per_part)
        ]
        self.num_parts = len(self.parts)
        self.encoder = build_encoder(spec)
        self.decoder = MAEDecoder(spec, decoder_dim, decoder_depth, decoder_heads)
        pairs = () if alignment == "none" else ("12", "23")
        self.align = nn.ModuleDict({pair: RegionAlignment(alignment, decoder_dim, tau) for pair in pairs})
        self.register_buffer("octants", octants, persistent=False)
        # in the checkpoint: the curricula depend on it
        self.register_buffer("progress", torch.zeros(()))
        # features of coarser views, for the parts after them
        self._regions: dict[int, list[Tensor]] = {}

    def views(self) -> NestedCrops:
        return self.crops

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """Losses of a part, scaled so that they add up to means over all views."""
        level, chosen = self.parts[part]
        share = len(chosen) / self.num_views[level]
        values = {name: share * per_view.mean() for name, per_view in self.per_view(views, part).items()}
        weights = self.current_weights()
        loss = sum(weights[name] * value for name, value in values.items() if name in weights)
        # every part depends on every trainable parameter, see Method
        for parameter in self.align.parameters():
            loss = loss + 0.0 * parameter.sum()
        return {"loss": loss, **{name: value.detach() for name, value in values.items()}}

    def per_view(self, views: Batch, part: int) -> dict[str, Tensor]:
        """Unweighted losses "loss_…" and retrieval "accuracy_…" (0 or 1) of a part's views, each (B, views)."""
        level, chosen = self.parts[part]
        if part == 0:
            self._regions = {}
        images, orders = self.level_views(views, level, chosen)
        shape = orders.shape[:2]
        orders = orders.flatten(0, 1)
        features, loss = self.reconstruction_loss(images.flatten(0, 1), orders, self.visible[level])
        values = {f"loss_level{level}": loss}
        if self.align and level > 1:
            pair = f"{level - 1}{level}"
            regions, origin = self._candidates(views, level, chosen)
            loss, found = self.align[pair](features.mean(1), regions, origin)
            values |= {f"loss_align{pair}": loss, f"accuracy_{pair}": found}
        if self.align and level < 3:
            self._keep(level, put_tokens(features.detach(), orders).unflatten(0, shape))
        return {name: value.unflatten(0, shape) for name, value in values.items()}

    def level_views(self, views: Batch, level: int, chosen: range) -> tuple[Tensor, Tensor]:
        """Chosen views of a level as the encoder sees them: (B, V, C, *crop), and their token orders (B, V, N)."""
        if level == 1:
            return views["level1"][:, None], views["order1"][:, None]
        start, stop = chosen.start, chosen.stop
        if level == 2:
            return views["level2"][:, start:stop], views["order2"][:, start:stop]
        crops = views["level2"][:, self._parents(chosen)].flatten(0, 1)
        patches = views["patches"].flatten(1)[:, start:stop]
        blocks = cut_blocks(crops, patches.reshape(-1, 1), self.spec.patch_size)[:, 0]
        images = resize(blocks, self.spec.img_size).unflatten(0, patches.shape)
        return images, views["order3"].flatten(1, 2)[:, start:stop]

    def _parents(self, chosen: range) -> list[int]:
        """Level-2 views that level-3 views were cut from."""
        return [view // self.crops.crops_level3 for view in chosen]

    def reconstruction_loss(self, images: Tensor, orders: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Decoder tokens (M, N, F), CLS left out, in the order of `orders`; loss (M,) on masked tokens."""
        features, prediction = self.decode(images, orders, visible)
        target = patch_targets(images, orders, visible, self.spec, normalize=True, unbiased=True)
        return features, F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2))

    def decode(self, images: Tensor, orders: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Decoder tokens (M, N, F) and predicted masked patches (M, N − K, P)."""
        tokens, _ = self.encoder(images, orders[:, :visible])
        features = self.decoder.features(tokens, orders)[:, int(self.spec.cls_token) :]
        return features, self.decoder.head(features[:, visible:])

    def _candidates(self, views: Batch, level: int, chosen: range) -> tuple[Tensor, Tensor]:
        """For each view: features (M, R, F) of the coarser crop's regions, and the region (M,) it was cut from."""
        coarser = torch.cat(self._regions[level - 1], dim=1)
        parents = [0] * len(chosen) if level == 2 else self._parents(chosen)
        origin = views["octants"] if level == 2 else views["patches"].flatten(1)
        return coarser[:, parents].flatten(0, 1), origin[:, chosen.start : chosen.stop].flatten()

    def _keep(self, level: int, features: Tensor) -> None:
        """Keeps features (B, V, N, F), raster order, of the regions that finer views come from: octants or tokens."""
        if level == 1:
            features = features[:, :, self.octants].mean(3)
        self._regions.setdefault(level, []).append(features)

    def current_weights(self) -> dict[str, Tensor | float]:
        """Loss weights at the present state of the curriculum."""
        if self.curriculum == "concurrent":
            return self.weights
        angle = self.progress * (math.pi / 2)
        factors = {"loss_level1": 1 + angle.cos(), "loss_level3": angle.sin()}
        if self.curriculum == "fine_to_coarse":
            factors = dict(zip(factors, reversed(factors.values()), strict=True))
        return {name: weight * factors.get(name, 1.0) for name, weight in self.weights.items()}

    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The first view of each level."""
        made = {}
        for level in LEVELS:
            images, orders = (t[:, 0] for t in self.level_views(views, level, range(1)))
            _, prediction = self.decode(images, orders, self.visible[level])
            made[f"level{level}"] = picture(images, orders, prediction, self.spec, normalize=True, unbiased=True)
        return made
