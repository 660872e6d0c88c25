"""SimMIM: mask tokens go through the encoder, a linear layer predicts what they hide (docs/methods.md, "Baselines of
the papers")."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.architectures.layers import PatchEmbed, init_transformer
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.crops import block_tokens
from nnunetv2_hiendmae.pretraining.declared import DeclaredSimMIM
from nnunetv2_hiendmae.pretraining.masked import MaskedCropMethod
from nnunetv2_hiendmae.training.views import Crop, Volume


@dataclass(frozen=True)
class CubeMaskedCrop(Crop):
    """A crop whose tokens are shown and hidden in cubes: as `MaskedCrop`, "ids_shuffle" holds tokens, cube by cube.

    Args:
        grid: of tokens; `edge`: of a cube, in tokens.
    """

    grid: Sequence[int]
    edge: int

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        sample, cubes = super().draw(volume, rng), block_tokens(self.grid, (self.edge,) * 3)
        return {**sample, "ids_shuffle": cubes[torch.from_numpy(rng.permutation(len(cubes)))].flatten()}


class SimMIM(DeclaredSimMIM, MaskedCropMethod):
    """All tokens go through the encoder, the masked ones as a learned token at their position; one linear layer
    predicts their voxels, as they are; mean absolute error."""

    normalize_target = False
    criterion: ClassVar = staticmethod(F.l1_loss)

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        if not isinstance(getattr(self.encoder, "patch_embed", None), PatchEmbed):
            raise UserError(
                f"{self.name} puts mask tokens where patches are embedded, the encoder is of kind '{spec.kind}', whose "
                "convolutions see voxels; choose a vit_… with --encoder (see: hiendmae presets), or another --method"
            )
        edge = self.options.mask_edge
        fits = not any(g % edge for g in spec.grid)
        self.options.require(fits, "mask_edge", f"a divisor of each axis of the grid of {spec.grid} tokens, 1 for one")
        cubes = spec.num_tokens // edge**3
        self.visible = self.options.visible("mask_ratio", cubes, "cubes of tokens") * edge**3
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        self.head = nn.Linear(spec.embed_dim, spec.patch_voxels)
        init_transformer(self.head)
        nn.init.normal_(self.mask_token, std=0.02)

    def views(self) -> CubeMaskedCrop:
        return CubeMaskedCrop(self.spec.img_size, self.spec.grid, self.options.mask_edge)

    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        ids_keep, ids_mask = tk.split_shuffle(ids_shuffle, self.visible)
        hidden = torch.ones_like(ids_shuffle, dtype=torch.bool).scatter(1, ids_keep, False)[:, :, None]

        def hide(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
            return torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)

        # embedded patches have no position yet: every kind of encoder adds it afterwards
        with self.encoder.patch_embed.register_forward_hook(hide):
            tokens, _ = self.encoder(image)
        return self.head(tk.take_tokens(tokens[:, self.encoder.num_prefix_tokens :], ids_mask))
