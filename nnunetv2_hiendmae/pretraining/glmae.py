"""GL-MAE: global and local masked views, and a momentum teacher they should agree with (METHODS §4)."""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.pretraining.checks import require, visible_of
from nnunetv2_hiendmae.pretraining.decoder import MAEDecoder
from nnunetv2_hiendmae.pretraining.masked import patch_targets, picture
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, PretrainRecipe, Reconstruction
from nnunetv2_hiendmae.pretraining.resized import GlobalLocalCrops, ResizedCrop
from nnunetv2_hiendmae.pretraining.teacher import Centre, ProjectionHead, cosine_momentum, follow
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.training.views import Augmentation

EMBEDDINGS = ("mean", "cls")
# edges of a global view by those of a local one, as published: 160 and 96 voxels
GLOBAL_TO_LOCAL = 160 / 96
# not published; AdamW's usual rule, per 256 volumes
LR_PER_256 = 1.5e-4


class GLMAE(Method):
    """Global-local masked autoencoder.

    The student reconstructs masked global and local views of a volume. The teacher, an exponential moving average of
    the student, sees the global views unmasked; the embedding of every student view is drawn to those of all of them.
    One encoder serves both sizes of view, its positions are resampled for the global grid.

    Memory is bounded by parts (see `Method`): the teacher runs once, in the first part, and every view of the student
    is a part of its own. Nothing but the teacher's output, which takes no gradient, goes from part to part.

    `encoder` is the student's and what a run exports; `teacher_encoder` is in the checkpoint.

    Args:
        mask_ratio: share of tokens that the student does not see, in global and local views.
        normalize_target: per-patch normalisation of the target (unbiased variance).
        global_views, local_views: per volume.
        global_size: edge of a global view in voxels, or (D, H, W); None: the encoder's crop times 160/96, rounded to
            the patch. Local views have the size of the encoder's crop.
        global_scale_min, global_scale_max, local_scale_min, local_scale_max: edges of the box that becomes a view, as
            share of the volume's.
        augment: flips, turns, intensity scale and shift of every view, as in Hi-End-MAE.
        consistency_weight: of the loss between student and teacher.
        embedding: "mean" of the patch tokens (the paper's first version), or "cls" (its journal version).
        head_hidden, head_dim: widths of the projection heads.
        student_temperature, teacher_temperature: that logits are divided by.
        teacher_temperature_start: the teacher's at step 0; it goes to `teacher_temperature` linearly, over the share
            `temperature_warmup` of the run.
        centre_momentum: of the running mean of the teacher's logits; 1 switches centring off.
        teacher_momentum: share of itself that the teacher keeps in a step at the start; rises to 1, as half a cosine.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
    """

    name = "glmae"
    title = "GL-MAE"
    source = (
        "Zhuang et al. 2023; an epoch is one pass over the paper's 746 volumes. lr is ours, 1.5e-4 · batch/256: the "
        "published 1e-2 is unstable. Published epochs: 400 (ViT-T), 1000 (ViT-B)"
    )
    citations: ClassVar[tuple[str, ...]] = RECIPES["glmae"].citations
    recipe = PretrainRecipe(
        epochs=1000,
        steps_per_epoch=12,
        warmup_epochs=40,
        batch_size=64,
        accumulate=8,
        lr=LR_PER_256 * 64 / 256,
        weight_decay=0.05,
    )
    notes: ClassVar[dict[str, str]] = {
        "global_views": "per volume, ours",
        "local_views": "per volume, ours",
        "global_size": "edge in voxels, or D,H,W; None: crop x 160/96, rounded to the patch",
        "global_scale_min": "share of the volume's edges",
        "global_scale_max": "share of the volume's edges",
        "local_scale_min": "share of the volume's edges",
        "local_scale_max": "share of the volume's edges",
        "embedding": "mean or cls",
        "head_hidden": "ours",
        "student_temperature": "ours",
        "teacher_temperature": "ours",
        "teacher_temperature_start": "ours",
        "temperature_warmup": "share of the run, ours",
        "centre_momentum": "per step, ours",
        "teacher_momentum": "per step, at the start, ours",
        "normalize_target": "ours",
        "augment": "true or false",
        "steps_per_epoch": "746 volumes, ours",
        "batch_size": "volumes",
        "accumulate": "micro-batches, ours",
        "lr": "ours",
        "warmup_epochs": "ours",
        "betas": "ours",
        "weight_decay": "ours",
    }

    def __init__(
        self,
        spec: EncoderSpec,
        mask_ratio: float = 0.75,
        normalize_target: bool = True,
        global_views: int = 2,
        local_views: int = 4,
        global_size: int | Sequence[int] | None = None,
        global_scale_min: float = 0.5,
        global_scale_max: float = 1.0,
        local_scale_min: float = 0.25,
        local_scale_max: float = 0.5,
        augment: bool = False,
        consistency_weight: float = 1.0,
        embedding: str = "mean",
        head_hidden: int = 2048,
        head_dim: int = 512,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float = 0.07,
        temperature_warmup: float = 0.1,
        centre_momentum: float = 0.9,
        teacher_momentum: float = 0.996,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__(spec)
        self.specs = {"global": spec.with_(img_size=_global_size(spec, global_size)), "local": spec}
        self.visible = {
            kind: visible_of(view.num_tokens, "mask_ratio", mask_ratio, f"tokens of a {kind} view")
            for kind, view in self.specs.items()
        }
        self.scales = {"global": (global_scale_min, global_scale_max), "local": (local_scale_min, local_scale_max)}
        for kind, (low, high) in self.scales.items():
            require(0 < low <= 1, f"{kind}_scale_min", low, "more than 0, at most 1")
            require(low <= high <= 1, f"{kind}_scale_max", high, f"{low} ({kind}_scale_min) to 1")
        for option, value, least in (
            ("global_views", global_views, 1),
            ("local_views", local_views, 1),
            ("head_hidden", head_hidden, 1),
            # the softmax of a single logit is 1, whatever the image
            ("head_dim", head_dim, 2),
        ):
            require(value >= least, option, value, f"at least {least}")
        for option, value in (
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
            ("teacher_temperature_start", teacher_temperature_start),
        ):
            require(0 < value < math.inf, option, value, "more than 0")
        for option, value in (
            ("temperature_warmup", temperature_warmup),
            ("centre_momentum", centre_momentum),
            ("teacher_momentum", teacher_momentum),
        ):
            require(0 <= value <= 1, option, value, "0 to 1")
        require(0 <= consistency_weight < math.inf, "consistency_weight", consistency_weight, "0 or more")
        require(embedding in EMBEDDINGS, "embedding", embedding, f"one of {', '.join(EMBEDDINGS)}")
        cls_fits = embedding != "cls" or spec.cls_token
        require(cls_fits, "embedding", embedding, "mean, or an encoder with a CLS token (--encoder)")
        self.normalize_target = normalize_target
        self.augmentation = Augmentation() if augment else None
        self.consistency_weight = consistency_weight
        self.embedding = embedding
        self.student_temperature = student_temperature
        self.teacher_temperatures = (teacher_temperature_start, teacher_temperature)
        self.temperature_warmup = temperature_warmup
        self.teacher_momentum = teacher_momentum
        self.counts = {"global": global_views, "local": local_views}
        self.parts = [(kind, view) for kind, count in self.counts.items() for view in range(count)]
        self.num_parts = len(self.parts)
        self.encoder = build_encoder(spec)
        self.decoder = MAEDecoder(spec, decoder_dim, decoder_depth, decoder_heads)
        self.head = ProjectionHead(spec.embed_dim, head_hidden, head_dim)
        self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.centre = Centre(head_dim, centre_momentum)
        # finished share of the run; in the checkpoint, since the teacher's temperature depends on it
        self.register_buffer("progress", torch.zeros(()))
        self._teacher_output = torch.empty(0)

    def views(self) -> GlobalLocalCrops:
        crops = {
            kind: ResizedCrop(spec.img_size, spec.num_tokens, self.scales[kind], self.augmentation)
            for kind, spec in self.specs.items()
        }
        return GlobalLocalCrops(crops["global"], crops["local"], self.counts["global"], self.counts["local"])

    def forward(self, views: Batch, part: int = 0) -> LossDict:
        """Losses of one student view, scaled so that the parts add up to means over all views.

        "loss_reconstruction_global" and "loss_reconstruction_local" are mean squared errors over masked voxels,
        "loss_consistency" is a mean over pairs of a teacher's and a student's view of the same volume, in nats, and
        "teacher_entropy" a mean over the teacher's views, in nats (at most the logarithm of `head_dim`).
        """
        kind, view = self.parts[part]
        measured = {}
        if part == 0:
            outputs = self.teach(views["global"])
            # cross-entropy is linear in its target: the mean over pairs is the one with the mean of the teacher's views
            self._teacher_output = outputs.mean(1)
            measured["teacher_entropy"] = torch.special.entr(outputs).sum(-1).mean()
        image, order = views[kind][:, view], views[f"{kind}_order"][:, view]
        tokens, prediction = self.predict(kind, image, order)
        target = patch_targets(image, order, self.visible[kind], self.specs[kind], self.normalize_target, unbiased=True)
        reconstruction = F.mse_loss(prediction.float(), target) / self.counts[kind]
        logits = self.head(self.embed(tokens)).float() / self.student_temperature
        consistency = F.cross_entropy(logits, self._teacher_output) / self.num_parts
        return {
            "loss": reconstruction + self.consistency_weight * consistency,
            f"loss_reconstruction_{kind}": reconstruction.detach(),
            "loss_consistency": consistency.detach(),
            **measured,
        }

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """Teacher's output (B, g, K) for unmasked global views (B, g, C, D, H, W): probabilities, centred."""
        logits = [self.teacher_head(self.embed(self.teacher_encoder(view)[0])) for view in images.unbind(1)]
        return (self.centre(torch.stack(logits, 1).float()) / self.current_temperature()).softmax(-1)

    def current_temperature(self) -> Tensor:
        """The teacher's, at the present state of the warm-up."""
        start, end = self.teacher_temperatures
        if not self.temperature_warmup:
            return torch.full_like(self.progress, end)
        return start + (end - start) * (self.progress / self.temperature_warmup).clamp(max=1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Normed tokens (B, [1+]K, E) → embedding of the view (B, E)."""
        if self.embedding == "cls":
            return tokens[:, 0]
        return tokens[:, self.encoder.num_prefix_tokens :].mean(1)

    def predict(self, kind: str, image: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Student's tokens (B, [1+]K, E) and predicted masked patches (B, N − K, P) of a global or local view."""
        tokens, _ = self.encoder(image, order[:, : self.visible[kind]])
        return tokens, self.decoder(tokens, order, self.specs[kind].grid)

    def synchronize(self, mean_over_processes) -> None:
        self.centre.synchronize(mean_over_processes)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher and its centre."""
        momentum = cosine_momentum(self.teacher_momentum, progress)
        follow(self.teacher_encoder, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        self.centre.step()
        self.progress.fill_(progress)

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The first global and the first local view."""
        made = {}
        for kind, spec in self.specs.items():
            image, order = views[kind][:, 0], views[f"{kind}_order"][:, 0]
            _, prediction = self.predict(kind, image, order)
            made[kind] = picture(image, order, prediction, spec, self.normalize_target, unbiased=True)
        return made


def _global_size(spec: EncoderSpec, given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        pairs = zip(spec.img_size, spec.patch_size, strict=True)
        return tuple(max(1, round(s * GLOBAL_TO_LOCAL / p)) * p for s, p in pairs)
    size = (given,) * 3 if isinstance(given, int) else tuple(given)
    fits = len(size) == 3 and all(s > 0 and s % p == 0 for s, p in zip(size, spec.patch_size, strict=True))
    require(fits, "global_size", given, f"one or three positive multiples of the patch {spec.patch_size}")
    return size
