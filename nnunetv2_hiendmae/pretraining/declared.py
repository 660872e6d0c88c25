"""The methods as they declare themselves: `hiendmae methods` lists this, and their classes in `METHODS` inherit it.
Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.options import SHARE, option
from nnunetv2_hiendmae.pretraining.declaration import Declaration, MethodOptions, PretrainRecipe

# edges of a global view by those of a local one, as published: 160 and 96 voxels
GLOBAL_TO_LOCAL = 160 / 96
# not published; AdamW's usual rule, per 256 volumes
LR_PER_256 = 1.5e-4
_AS_HIENDMAE = "Training recipe: ours, that of Hi-End-MAE"
# of methods that compare the samples of a micro-batch: all of them at once
_CONTRASTED = PretrainRecipe(batch_size=64)
_CONTRASTED_NOTES = {"batch_size": "each with two views, ours", "accumulate": "each micro-batch is compared by itself"}
_OF_EDGES = "share of the volume's edges"
ALIGNMENTS = ("infonce", "byol", "none")
CURRICULA = ("concurrent", "coarse_to_fine", "fine_to_coarse")


@dataclass(frozen=True)
class MaskedOptions(MethodOptions):
    """`mask_ratio` is the share of tokens that is hidden."""

    mask_ratio: float = option(0.75, **SHARE)


class DeclaredHiEndMAE(Declaration):
    """Hi-End-MAE."""

    name = "hiendmae"
    title = "Hi-End-MAE"
    source = "Tang et al. 2025; decoder and recipe as in the authors' released code"

    @dataclass(frozen=True)
    class Options(MaskedOptions):
        """Width and attention heads of the decoder, and its self-attention blocks before the cross blocks."""

        # None: as released (528 for an encoder of 1536, 384 for 768), else (ours) half of the encoder's width
        decoder_dim: int | None = option(None)
        # None: those of the encoder
        decoder_heads: int | None = option(None)
        self_depth: int = option(2)


class DeclaredMiM(Declaration):
    """Mask in Mask."""

    name = "mim"
    title = "MiM"
    source = (
        "Zhuang et al. 2024. A sample is a volume with 21 views: 24 volumes stand for the paper's 512 views. Published "
        "lr: 1e-4 · views / 256"
    )
    recipe = PretrainRecipe(encoder="convvit_base", epochs=800, warmup_epochs=40, batch_size=24, accumulate=4, lr=2e-4)
    recipe_notes: ClassVar[dict[str, str]] = {
        "steps_per_epoch": "ours",
        "batch_size": "volumes",
        "accumulate": "micro-batches, ours",
    }

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """What is hidden, views per volume, the alignment, weights of all losses, the decoder's size."""

        # share that is hidden
        mask_ratio_level1: float = option(0.5, "share of octants", **SHARE)
        mask_ratio_level2: float = option(0.6, "share of tokens", **SHARE)
        mask_ratio_level3: float = option(0.5, "share of tokens", **SHARE)
        # masked octants and masked patches that become views; the mask ratios say how many there are
        crops_level2: int = option(4, "per volume")
        crops_level3: int = option(4, "per level-2 view")
        alignment: str = option(
            "infonce", "infonce, byol or none; ours, the equation is unpublished", ours=True, choices=ALIGNMENTS
        )
        # temperature
        tau: float = option(0.1, "of infonce", ours=True, above=0)
        # of the reconstruction losses, of the alignment losses
        weight_level1: float = option(1.0, at_least=0)
        weight_level2: float = option(1.0, at_least=0)
        weight_level3: float = option(1.0, at_least=0)
        weight_align12: float = option(0.1, at_least=0)
        weight_align23: float = option(0.1, at_least=0)
        # "coarse_to_fine" multiplies level 1 by 1 + cos(π/2·t) and level 3 by sin(π/2·t), t being the finished
        # fraction of the run; "fine_to_coarse" exchanges the two
        curriculum: str = option(
            CURRICULA[0], f"{', '.join(CURRICULA[:-1])}, or {CURRICULA[-1]}, which is ours", choices=CURRICULA
        )
        # centred on foreground (see `NestedCrops`)
        foreground_share: float = option(0.0, "share of crops", ours=True, **SHARE)
        # the same for both published encoders
        decoder_dim: int = option(576)
        decoder_depth: int = option(8)
        decoder_heads: int = option(16)
        # more is faster on a GPU that a micro-batch of volumes does not fill
        views_per_part: int = option(1, "views of each volume in memory at once", ours=True, at_least=1)

        def __post_init__(self):
            super().__post_init__()
            reconstructs = self.weight_level1 + self.weight_level2 + self.weight_level3 > 0
            aligns = self.alignment != "none" and self.weight_align12 + self.weight_align23 > 0
            self.require(reconstructs or aligns, "weight_level1", "more than 0: every part of the loss is off")


class DeclaredGLMAE(Declaration):
    """Global-local masked autoencoder."""

    name = "glmae"
    title = "GL-MAE"
    source = (
        "Zhuang et al. 2023; an epoch is one pass over the paper's 746 volumes. lr is ours, 1.5e-4 · batch/256: the "
        "published 1e-2 is unstable. Published epochs: 400 (ViT-T), 1000 (ViT-B)"
    )
    recipe = PretrainRecipe(
        epochs=1000, steps_per_epoch=12, warmup_epochs=40, batch_size=64, accumulate=8, lr=LR_PER_256 * 64 / 256
    )
    recipe_notes: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("warmup_epochs", "lr", "weight_decay", "betas"), "ours"),
        "steps_per_epoch": "746 volumes, ours",
        "batch_size": "volumes",
        "accumulate": "micro-batches, ours",
    }

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """Of the student's masked views, of the agreement with the teacher, of the teacher, of the decoder."""

        # share of tokens that the student does not see, in global and local views
        mask_ratio: float = option(0.75, **SHARE)
        # every patch by its own mean and standard deviation (unbiased variance)
        normalize_target: bool = option(True, ours=True)
        global_views: int = option(2, "per volume", ours=True, at_least=1)
        local_views: int = option(4, "per volume", ours=True, at_least=1)
        # local views have the size of the encoder's crop
        global_size: int | tuple[int, int, int] | None = option(
            None, "edge in voxels, or D,H,W; None: crop x 160/96, rounded to the patch"
        )
        # of the box that becomes a view
        global_scale_min: float = option(0.5, _OF_EDGES, above=0, at_most=1)
        global_scale_max: float = option(1.0, _OF_EDGES)
        local_scale_min: float = option(0.25, _OF_EDGES, above=0, at_most=1)
        local_scale_max: float = option(0.5, _OF_EDGES)
        # flips, turns, intensity scale and shift of every view, as in Hi-End-MAE
        augment: bool = option(False, "true or false")
        # of the loss between student and teacher
        consistency_weight: float = option(1.0, at_least=0)
        # of patch tokens, as in the paper's first version, or the CLS token, as in its journal version
        embedding: str = option("mean", "mean or cls", choices=("mean", "cls"))
        # widths of the projection heads
        head_hidden: int = option(2048, ours=True, at_least=1)
        # the softmax of a single logit is 1, whatever the image
        head_dim: int = option(512, at_least=2)
        # that logits are divided by
        student_temperature: float = option(0.1, ours=True, above=0)
        teacher_temperature: float = option(0.04, ours=True, above=0)
        # at step 0; goes to `teacher_temperature` linearly over the warm-up
        teacher_temperature_start: float = option(0.07, ours=True, above=0)
        temperature_warmup: float = option(0.1, "share of the run", ours=True, **SHARE)
        # of the running mean of the teacher's logits; 1 switches centring off
        centre_momentum: float = option(0.9, "per step", ours=True, **SHARE)
        # share of itself that the teacher keeps; rises to 1, as half a cosine
        teacher_momentum: float = option(0.996, "per step, at the start", ours=True, **SHARE)
        decoder_dim: int = option(512)
        decoder_depth: int = option(8)
        decoder_heads: int = option(16)

        def __post_init__(self):
            super().__post_init__()
            for kind in ("global", "local"):
                low, high = self.scale(kind)
                self.require(low <= high <= 1, f"{kind}_scale_max", f"{low} ({kind}_scale_min) to 1")

        def scale(self, kind: str) -> tuple[float, float]:
            """Smallest and largest share of the volume's edges of a "global" or "local" view."""
            return getattr(self, f"{kind}_scale_min"), getattr(self, f"{kind}_scale_max")

        def size(self, spec: EncoderSpec) -> tuple[int, ...]:
            """Edges (D, H, W) of a global view in voxels.

            Raises:
                UserError: `global_size` is no multiple of the encoder's patch.
            """
            given, patch = self.global_size, spec.patch_size
            if given is None:
                pairs = zip(spec.img_size, patch, strict=True)
                return tuple(max(1, round(s * GLOBAL_TO_LOCAL / p)) * p for s, p in pairs)
            size = (given,) * 3 if isinstance(given, int) else tuple(given)
            fits = len(size) == 3 and all(s > 0 and s % p == 0 for s, p in zip(size, patch, strict=True))
            self.require(fits, "global_size", f"one or three positive multiples of the patch {patch}")
            return size


class DeclaredMAE3D(Declaration):
    """The baseline, MAE in 3D."""

    name = "mae3d"
    title = "MAE3D"
    source = f"He et al., CVPR 2022, in 3D; decoder 512 x 8 x 16 as in GL-MAE. {_AS_HIENDMAE}"

    @dataclass(frozen=True)
    class Options(MaskedOptions):
        """Of the target, and the decoder's width, blocks and attention heads."""

        # every patch by its own mean and standard deviation (unbiased variance)
        normalize_target: bool = option(True)
        decoder_dim: int = option(512)
        decoder_depth: int = option(8)
        decoder_heads: int = option(16)


class DeclaredSimMIM(Declaration):
    """A baseline of the papers: mask tokens in the encoder."""

    name = "simmim"
    title = "SimMIM"
    source = f"Xie et al., CVPR 2022, in 3D. {_AS_HIENDMAE}"

    @dataclass(frozen=True)
    class Options(MaskedOptions):
        """What is hidden."""

        mask_ratio: float = option(0.6, "0.75 with mask_edge=1 in Chen et al. 2023, in 3D", **SHARE)
        # hidden are cubes, as published: 32 pixels with patches of 16
        mask_edge: int = option(2, "tokens per edge of a hidden cube; the paper's squares, cubes are ours", at_least=1)


class DeclaredSimCLR(Declaration):
    """A baseline of the papers: contrast of crops."""

    name = "simclr"
    title = "SimCLR"
    source = f"Chen et al., ICML 2020; the two views are crops of one volume. {_AS_HIENDMAE}, without micro-batches"
    recipe = _CONTRASTED
    recipe_notes: ClassVar[dict[str, str]] = _CONTRASTED_NOTES
    compares_samples = True

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """Of the head, and of the loss."""

        # width of the head's output; its hidden layer has the encoder's
        projection_dim: int = option(128, at_least=2)
        # that cosine similarities are divided by
        temperature: float = option(0.1, above=0)


class DeclaredGenesis(Declaration):
    """A baseline of the papers: distorted crops are restored."""

    name = "genesis"
    title = "Models Genesis"
    source = f"Zhou et al., MICCAI 2019; a linear layer restores in place of the U-Net's decoder. {_AS_HIENDMAE}"

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """How often a crop gets each distortion."""

        # windows of local voxels are shuffled
        shuffle: float = option(0.5, "share of crops", **SHARE)
        windows: int = option(1000, "per shuffled crop", at_least=1)
        # a random curve of intensities
        nonlinear: float = option(0.9, "share of crops", **SHARE)
        # boxes are filled with noise, or all that is outside of some boxes
        paint: float = option(0.9, "share of crops", **SHARE)
        paint_outside: float = option(0.8, "share of painted crops, the others are painted inside", **SHARE)


class DeclaredSwinPretexts(Declaration):
    """A baseline of the papers: the pretexts that Swin-UNETR's encoder was trained with."""

    name = "swinpretexts"
    title = "Swin-UNETR's pretexts"
    source = (
        "Tang et al., CVPR 2022, on a ViT: inpainting, rotation, contrast; a linear layer restores in place of a "
        f"decoder. {_AS_HIENDMAE}, without micro-batches"
    )
    recipe = _CONTRASTED
    recipe_notes: ClassVar[dict[str, str]] = _CONTRASTED_NOTES
    compares_samples = True

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """Of the views, of the contrast, and the weights of the three losses."""

        cutout: float = option(0.3, "share of voxels", above=0, below=1)
        # width of what is compared
        projection_dim: int = option(512, at_least=2)
        # that cosine similarities are divided by
        temperature: float = option(0.5, above=0)
        weight_inpainting: float = option(1.0, above=0)
        weight_rotation: float = option(1.0, above=0)
        weight_contrast: float = option(1.0, above=0)


# in the order in which they are listed; after the four methods the baselines of the papers
DECLARED: dict[str, type[Declaration]] = {
    declared.name: declared
    for declared in (
        *(DeclaredHiEndMAE, DeclaredMiM, DeclaredGLMAE, DeclaredMAE3D),
        *(DeclaredSimMIM, DeclaredSimCLR, DeclaredGenesis, DeclaredSwinPretexts),
    )
}
