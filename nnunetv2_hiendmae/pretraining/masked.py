"""Masked autoencoding of one crop: targets, pictures and decoders that methods share, and the baseline MAE3D itself
(docs/methods.md, "MAE3D")."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.architectures.layers import init_transformer, transformer_block
from nnunetv2_hiendmae.pretraining.declared import DeclaredMAE3D, MaskedOptions
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.training.views import MaskedCrop


class DecoderQueries(nn.Module):
    """Encoder tokens brought to the decoder's width, with mask tokens and decoder positions.

    The sequence stays in the order of the permutation: visible tokens first, then masked ones. Attention does
    not mind, and nothing has to be sorted back.
    """

    def __init__(self, spec: EncoderSpec, width: int):
        super().__init__()
        self.prefix = int(spec.cls_token)
        self.grid = spec.grid
        self.embed = nn.Linear(spec.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = tk.sincos_positions(spec.grid, width).to(torch.get_default_device())
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Visible tokens (B, [1+]K, E) and token permutation (B, N) → (B, [1+]N, F); `grid` None: the spec's."""
        x = self.embed(tokens)
        cls, visible = x[:, : self.prefix], x[:, self.prefix :]
        masked = self.mask_token.expand(len(x), ids_shuffle.shape[1] - visible.shape[1], -1).to(x.dtype)
        queries = torch.cat([visible, masked], dim=1) + tk.take_tokens(self.positions(grid), ids_shuffle)
        return torch.cat([cls, queries], dim=1)

    def positions(self, grid: Sequence[int] | None = None) -> Tensor:
        """Position table (1, N, F) of a grid: the spec's own, or a fixed one of that grid."""
        if grid is None or tuple(grid) == self.grid:
            return self.pos_embed
        return _fixed_positions(tuple(grid), self.pos_embed.shape[2], self.pos_embed.device)


@lru_cache(maxsize=16)
def _fixed_positions(grid: tuple[int, int, int], width: int, device: torch.device) -> Tensor:
    return tk.sincos_positions(grid, width).to(device)


class MAEDecoder(nn.Module):
    """The plain decoder of He et al. 2022: self-attention blocks over all tokens, then pixels of the masked ones."""

    def __init__(self, spec: EncoderSpec, width: int, depth: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or width < 1 or width % num_heads or depth < 1:
            raise ValueError(
                f"decoder_dim {width} must be a multiple of decoder_heads {num_heads}, decoder_depth {depth} > 0"
            )
        self.queries = DecoderQueries(spec, width)
        self.blocks = nn.ModuleList(
            transformer_block(width, num_heads, spec.mlp_ratio, spec.norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=spec.norm_eps)
        self.head = nn.Linear(width, spec.patch_voxels)
        init_transformer(self)

    def forward(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Visible tokens (B, [1+]K, E) and token permutation (B, N) → patches of masked tokens (B, N − K, P).

        `grid` (d, h, w) is that of the crop; None: the spec's.
        """
        # the head is the widest layer of all: only what enters the loss goes through it
        return self.head(self.features(tokens, ids_shuffle, grid)[:, tokens.shape[1] :])

    def features(self, tokens: Tensor, ids_shuffle: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The same → decoder tokens (B, [1+]N, F) after the norm, in the order of `ids_shuffle`."""
        x = self.queries(tokens, ids_shuffle, grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MaskedCropMethod(Method):
    """Predicts the masked patches of a crop from its visible ones; `criterion`, MSE, on masked patches only.

    Subclasses build what they predict with after `super().__init__`, which builds the encoder, and implement `predict`.
    """

    Options = MaskedOptions
    # the target, see `patch_targets`
    normalize_target: bool = True
    unbiased_target: ClassVar[bool] = True
    criterion: ClassVar[Callable[[Tensor, Tensor], Tensor]] = staticmethod(F.mse_loss)

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        self.visible = self.options.visible("mask_ratio", spec.num_tokens)
        self.encoder = build_encoder(spec)

    @abstractmethod
    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Crop (B, C, D, H, W) and token permutation (B, N) → predicted masked patches (B, N − K, P)."""

    def views(self) -> MaskedCrop:
        return MaskedCrop(self.spec.img_size, self.spec.num_tokens)

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        image, ids_shuffle = views["image"], views["ids_shuffle"]
        prediction = self.predict(image, ids_shuffle)
        target = patch_targets(image, ids_shuffle, self.visible, self.spec, self.normalize_target, self.unbiased_target)
        return {"loss": self.criterion(prediction.float(), target)}

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        image, ids_shuffle = views["image"], views["ids_shuffle"]
        prediction = self.predict(image, ids_shuffle)
        return {"crop": picture(image, ids_shuffle, prediction, self.spec, self.normalize_target, self.unbiased_target)}


def patch_targets(
    image: Tensor, ids_shuffle: Tensor, visible: int, spec: EncoderSpec, normalize: bool = True, unbiased: bool = True
) -> Tensor:
    """Masked patches of a crop as the loss wants them.

    Args:
        image: (B, C, D, H, W).
        ids_shuffle: (B, N) token permutation; the first `visible` (K) are not masked.
        normalize: each patch by its own mean and standard deviation; `unbiased`: that of its variance.

    Returns:
        (B, N − K, P), float32.
    """
    patches = tk.take_patches(image, spec.patch_size, ids_shuffle[:, visible:]).float()
    return tk.normalize_patches(patches, unbiased) if normalize else patches


def picture(
    image: Tensor,
    ids_shuffle: Tensor,
    prediction: Tensor,
    spec: EncoderSpec,
    normalize: bool = True,
    unbiased: bool = True,
) -> Reconstruction:
    """Crop, crop without its masked patches, and crop with what was predicted for them.

    Args:
        image: (B, C, D, H, W).
        ids_shuffle: (B, N) token permutation, visible ones first.
        prediction: (B, N − K, P) of what `patch_targets` gives with the same `normalize` and `unbiased`; scaled with
            the true mean and spread of its patch where those are normalised.
    """
    visible = ids_shuffle.shape[1] - prediction.shape[1]
    prediction = prediction.float()
    if normalize:
        hidden = patch_targets(image, ids_shuffle, visible, spec, normalize=False)
        mean, deviation = tk.patch_statistics(hidden, unbiased)
        prediction = prediction * deviation + mean
    shown = tk.take_patches(image, spec.patch_size, ids_shuffle[:, :visible]).float()

    def assemble(visible: Tensor, masked: Tensor) -> Tensor:
        tokens = torch.cat([visible, masked], dim=1)
        return tk.unpatchify(tk.put_tokens(tokens, ids_shuffle), spec.grid, spec.patch_size)

    blank = image.float().min().expand_as(prediction)
    hidden = assemble(torch.zeros_like(shown), torch.ones_like(prediction))[:, 0] > 0
    return Reconstruction(image, assemble(shown, blank), assemble(shown, prediction), hidden, normalize)


class MAE3D(DeclaredMAE3D, MaskedCropMethod):
    """Masked autoencoder: encode the visible tokens, decode all of them, MSE on the masked patches."""

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        chosen = self.options
        self.normalize_target = chosen.normalize_target
        self.decoder = MAEDecoder(spec, chosen.decoder_dim, chosen.decoder_depth, chosen.decoder_heads)

    def predict(self, image: Tensor, ids_shuffle: Tensor) -> Tensor:
        tokens, _ = self.encoder(image, ids_shuffle[:, : self.visible])
        return self.decoder(tokens, ids_shuffle)
