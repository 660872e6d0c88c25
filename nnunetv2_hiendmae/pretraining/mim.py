"""MiM: masked autoencoding on three nested levels of one crop, aligned with each other (docs/methods.md, "MiM")."""

import math
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.architectures.tokens import put_tokens, take_tokens
from nnunetv2_hiendmae.pretraining.crops import OCTANTS, NestedCrops, cut_blocks, octant_tokens, resize
from nnunetv2_hiendmae.pretraining.declared import DeclaredMiM
from nnunetv2_hiendmae.pretraining.masked import MAEDecoder, patch_targets, picture
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction

LEVELS = (1, 2, 3)


class RegionAlignment(nn.Module):
    """Alignment of one pair of levels (the paper's equation is not published, this one is ours).

    "infonce": cosines of query and region keys over τ, cross-entropy with the region of origin; the other regions of
    the same crop are the negatives. Query and keys have an MLP (width-width-width, GELU) each.
    "byol": 2 − 2·cos of query and region of origin. Only the query has an MLP: one on the coarse side would get no
    gradient.

    Args:
        kind: "infonce" or "byol".
        width: of the features.
        tau: temperature of "infonce".
    """

    def __init__(self, kind: str, width: int, tau: float):
        super().__init__()
        self.kind, self.tau = kind, tau
        self.query = Mlp(width, width)
        self.key = Mlp(width, width) if kind == "infonce" else nn.Identity()
        init_transformer(self)

    def forward(self, features: Tensor, regions: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per view, and whether the region of origin is the most similar one.

        Args:
            features: (M, F) of the finer views.
            regions: (M, R, F) of the coarser crops, without gradient.
            origin: (M,) region that each view was cut from.

        Returns:
            (M,) float32 each.
        """
        query, keys = self.query(features).float(), self.key(regions).float()
        # not a matrix product: autocast would round the cosines to half precision, too coarse for neighbouring tokens
        cosines = F.cosine_similarity(query[:, None], keys, dim=-1)
        found = (cosines.detach().argmax(dim=1) == origin).float()
        if self.kind == "infonce":
            return F.cross_entropy(cosines / self.tau, origin, reduction="none"), found
        return 2 - 2 * take_tokens(cosines[:, :, None], origin[:, None])[:, 0, 0], found


class MiM(DeclaredMiM, Method):
    """Mask in Mask: one encoder and one decoder for three levels of one crop of twice the encoder's edge.

    Level 1 is the whole crop, halved, with whole octants masked; level 2 are masked octants at full resolution; level
    3 are masked patches of level 2, enlarged. Each level is reconstructed (MSE on masked tokens, patch-normalised);
    levels 1 and 2, and levels 2 and 3, are aligned (see `RegionAlignment`).

    Memory is bounded by parts (see `Method`): level 1, then the views of level 2, then those of level 3,
    `views_per_part` of every volume at a time. The coarser side of the alignment is detached by definition, so that a
    part needs only values of the parts before it, never their activations.
    """

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        chosen = self.options
        octants = octant_tokens(spec.grid)
        visible_octants = chosen.visible("mask_ratio_level1", OCTANTS, "octants", or_else="")
        self.visible = {
            1: visible_octants * octants.shape[1],
            2: chosen.visible("mask_ratio_level2", spec.num_tokens),
            3: chosen.visible("mask_ratio_level3", spec.num_tokens),
        }
        crops2, crops3 = chosen.crops_level2, chosen.crops_level3
        most2, most3 = OCTANTS - visible_octants, spec.num_tokens - self.visible[2]
        chosen.require(1 <= crops2 <= most2, "crops_level2", f"1 to {most2} (masked octants)")
        chosen.require(1 <= crops3 <= most3, "crops_level3", f"1 to {most3} (masked tokens of a level-2 view)")
        losses = (*(f"level{level}" for level in LEVELS), "align12", "align23")
        self.weights = {f"loss_{name}": getattr(chosen, f"weight_{name}") for name in losses}
        self.crops = NestedCrops(
            spec.img_size, spec.grid, visible_octants, self.visible[2], crops2, crops3, chosen.foreground_share
        )
        self.num_views = {1: 1, 2: crops2, 3: crops2 * crops3}
        self.parts = [
            (level, range(start, min(start + chosen.views_per_part, self.num_views[level])))
            for level in LEVELS
            for start in range(0, self.num_views[level], chosen.views_per_part)
        ]
        self.num_parts = len(self.parts)
        self.encoder = build_encoder(spec)
        self.decoder = MAEDecoder(spec, chosen.decoder_dim, chosen.decoder_depth, chosen.decoder_heads)
        pairs = () if chosen.alignment == "none" else ("12", "23")
        self.align = nn.ModuleDict(
            {pair: RegionAlignment(chosen.alignment, chosen.decoder_dim, chosen.tau) for pair in pairs}
        )
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
        images, ids_shuffle = self.level_views(views, level, chosen)
        shape = ids_shuffle.shape[:2]
        ids_shuffle = ids_shuffle.flatten(0, 1)
        features, loss = self.reconstruction_loss(images.flatten(0, 1), ids_shuffle, self.visible[level])
        values = {f"loss_level{level}": loss}
        if self.align and level > 1:
            pair = f"{level - 1}{level}"
            regions, origin = self._candidates(views, level, chosen)
            loss, found = self.align[pair](features.mean(1), regions, origin)
            values |= {f"loss_align{pair}": loss, f"accuracy_{pair}": found}
        if self.align and level < 3:
            # (B, V, N, F) in raster order, of the regions that finer views come from: octants or tokens
            regions = put_tokens(features.detach(), ids_shuffle).unflatten(0, shape)
            regions = regions[:, :, self.octants].mean(3) if level == 1 else regions
            self._regions.setdefault(level, []).append(regions)
        return {name: value.unflatten(0, shape) for name, value in values.items()}

    def level_views(self, views: Batch, level: int, chosen: range) -> tuple[Tensor, Tensor]:
        """Chosen views of a level as the encoder sees them (B, V, C, *crop), and token permutations (B, V, N)."""
        if level == 1:
            return views["level1"][:, None], views["ids_shuffle1"][:, None]
        start, stop = chosen.start, chosen.stop
        if level == 2:
            return views["level2"][:, start:stop], views["ids_shuffle2"][:, start:stop]
        # not indexed by the list itself, which would be copied to a GPU, and the CPU waits for that
        crops = torch.stack([views["level2"][:, parent] for parent in self._parents(chosen)], 1).flatten(0, 1)
        patches = views["patches"].flatten(1)[:, start:stop]
        blocks = cut_blocks(crops, patches.reshape(-1, 1), self.spec.patch_size)[:, 0]
        images = resize(blocks, self.spec.img_size).unflatten(0, patches.shape)
        return images, views["ids_shuffle3"].flatten(1, 2)[:, start:stop]

    def _parents(self, chosen: range) -> list[int]:
        """Level-2 views that level-3 views were cut from."""
        return [view // self.crops.crops_level3 for view in chosen]

    def reconstruction_loss(self, images: Tensor, ids_shuffle: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Decoder tokens (M, N, F), CLS left out, in the order of `ids_shuffle`; loss (M,) on masked tokens."""
        features, prediction = self.decode(images, ids_shuffle, visible)
        target = patch_targets(images, ids_shuffle, visible, self.spec)
        return features, F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2))

    def decode(self, images: Tensor, ids_shuffle: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Decoder tokens (M, N, F) and predicted masked patches (M, N − K, P)."""
        tokens, _ = self.encoder(images, ids_shuffle[:, :visible])
        features = self.decoder.features(tokens, ids_shuffle)[:, int(self.spec.cls_token) :]
        return features, self.decoder.head(features[:, visible:])

    def _candidates(self, views: Batch, level: int, chosen: range) -> tuple[Tensor, Tensor]:
        """For each view: features (M, R, F) of the coarser crop's regions, and the region (M,) it was cut from."""
        coarser = torch.cat(self._regions[level - 1], dim=1)
        parents = [0] * len(chosen) if level == 2 else self._parents(chosen)
        origin = views["octants"] if level == 2 else views["patches"].flatten(1)
        regions = torch.stack([coarser[:, parent] for parent in parents], 1).flatten(0, 1)
        return regions, origin[:, chosen.start : chosen.stop].flatten()

    def current_weights(self) -> dict[str, Tensor | float]:
        """Loss weights at the present state of the curriculum."""
        if self.options.curriculum == "concurrent":
            return self.weights
        angle = self.progress * (math.pi / 2)
        factors = {"loss_level1": 1 + angle.cos(), "loss_level3": angle.sin()}
        if self.options.curriculum == "fine_to_coarse":
            factors = dict(zip(factors, reversed(factors.values()), strict=True))
        return {name: weight * factors.get(name, 1.0) for name, weight in self.weights.items()}

    def after_step(self, progress: float) -> None:
        self.progress.fill_(progress)

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The first view of each level."""
        made = {}
        for level in LEVELS:
            images, ids_shuffle = (t[:, 0] for t in self.level_views(views, level, range(1)))
            _, prediction = self.decode(images, ids_shuffle, self.visible[level])
            made[f"level{level}"] = picture(images, ids_shuffle, prediction, self.spec)
        return made
