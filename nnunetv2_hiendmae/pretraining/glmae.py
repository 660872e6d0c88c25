"""GL-MAE: global and local masked views, and a momentum teacher they should agree with (docs/methods.md, "GL-MAE")."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunetv2_hiendmae.architectures import Encoder, EncoderSpec, build_encoder
from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.pretraining.crops import GlobalLocalCrops, ResizedCrop
from nnunetv2_hiendmae.pretraining.declared import DeclaredGLMAE
from nnunetv2_hiendmae.pretraining.masked import MAEDecoder, patch_targets, picture
from nnunetv2_hiendmae.pretraining.method import Batch, LossDict, Method, Reconstruction
from nnunetv2_hiendmae.training.views import Augmentation, resize_box
from nnunetv2_hiendmae.weights import LoadReport


class ProjectionHead(nn.Sequential):
    """Three linear layers with GELU between them: embedding (B, E) → logits (B, K)."""

    def __init__(self, embed_dim: int, hidden: int, out: int):
        super().__init__(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
        )
        init_transformer(self)


class Centre(nn.Module):
    """Running mean of the teacher's logits, which is subtracted from them.

    Without it the student's easiest answer is one that every image gets. The mean moves once per optimizer step, in
    `step`, by the logits of the whole global batch: it must not depend on how that is split over micro-batches and
    processes. Within a step it stays as it was.

    Args:
        width: K, number of logits.
        momentum: share of the former mean that a step keeps; 1 leaves it at 0, which switches centring off.
    """

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        # of this step; no buffer: DDP overwrites those of other processes by the first one's
        self._seen: list[Tensor] = []

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (…, K) without the mean; remembers them for the next `step`."""
        self._seen.append(logits.detach().flatten(0, -2).mean(0))
        return logits - self.mean

    def synchronize(self, mean_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Replaces what this process has seen in the step by the mean over all processes."""
        if self._seen:
            self._seen = [mean_over_processes(torch.stack(self._seen).mean(0))]

    def step(self) -> None:
        """Moves the mean."""
        if self._seen:
            self.mean.lerp_(torch.stack(self._seen).mean(0), 1 - self.momentum)
            self._seen = []


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher's parameters ← momentum · their own + (1 − momentum) · the student's."""
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def cosine_momentum(start: float, progress: float) -> float:
    """Rises from `start` at progress 0 to 1 at progress 1, as half a cosine."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


class GLMAE(DeclaredGLMAE, Method):
    """Global-local masked autoencoder.

    The student reconstructs masked global and local views of a volume. The teacher, an exponential moving average of
    the student, sees the global views unmasked; the embedding of every student view is drawn to those of all of them.
    One encoder serves both sizes of view, its positions are resampled for the global grid.

    Memory is bounded by parts (see `Method`): the teacher runs once, in the first part, and every view of the student
    is a part of its own. Nothing but the teacher's output, which takes no gradient, goes from part to part.

    `encoder` is the student's and what a run exports; `teacher_encoder` is in the checkpoint.
    """

    def __init__(self, spec: EncoderSpec, **options: Any):
        super().__init__(spec, **options)
        chosen = self.options
        self.specs = {"global": spec.with_(img_size=chosen.size(spec)), "local": spec}
        self.visible = {
            kind: chosen.visible("mask_ratio", view.num_tokens, f"tokens of a {kind} view")
            for kind, view in self.specs.items()
        }
        cls_fits = chosen.embedding != "cls" or spec.cls_token
        chosen.require(cls_fits, "embedding", "mean, or an encoder with a CLS token (--encoder)")
        self.counts = {"global": chosen.global_views, "local": chosen.local_views}
        self.parts = [(kind, view) for kind, count in self.counts.items() for view in range(count)]
        self.num_parts = len(self.parts)
        self.encoder = build_encoder(spec)
        self.decoder = MAEDecoder(spec, chosen.decoder_dim, chosen.decoder_depth, chosen.decoder_heads)
        self.head = ProjectionHead(spec.embed_dim, chosen.head_hidden, chosen.head_dim)
        self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.centre = Centre(chosen.head_dim, chosen.centre_momentum)
        # finished share of the run; in the checkpoint, since the teacher's temperature depends on it
        self.register_buffer("progress", torch.zeros(()))
        self._teacher_output = torch.empty(0)

    def views(self) -> GlobalLocalCrops:
        augmentation = Augmentation() if self.options.augment else None
        crops = {
            kind: ResizedCrop(spec.img_size, spec.num_tokens, self.options.scale(kind), augmentation)
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
            outputs = self.teach(self.images(views, "global"))
            # cross-entropy is linear in its target: the mean over pairs is the one with the mean of the teacher's views
            self._teacher_output = outputs.mean(1)
            measured["teacher_entropy"] = torch.special.entr(outputs).sum(-1).mean()
        image, ids_shuffle = self.images(views, kind, view)[:, 0], views[f"{kind}_ids_shuffle"][:, view]
        tokens, prediction = self.predict(kind, image, ids_shuffle)
        target = patch_targets(image, ids_shuffle, self.visible[kind], self.specs[kind], self.options.normalize_target)
        reconstruction = F.mse_loss(prediction.float(), target) / self.counts[kind]
        logits = self.head(self.embed(tokens)).float() / self.options.student_temperature
        consistency = F.cross_entropy(logits, self._teacher_output) / self.num_parts
        return {
            "loss": reconstruction + self.options.consistency_weight * consistency,
            f"loss_reconstruction_{kind}": reconstruction.detach(),
            "loss_consistency": consistency.detach(),
            **measured,
        }

    @torch.no_grad()
    def images(self, views: Batch, kind: str, view: int | None = None) -> Tensor:
        """Views (B, g, C, D, H, W) of a kind, or one of them (g = 1); resized here where boxes came."""
        chosen = range(self.counts[kind]) if view is None else range(view, view + 1)
        if "boxes" not in views:
            return views[kind][:, chosen.start : chosen.stop]
        first, size = 0 if kind == "global" else self.counts["global"], self.specs[kind].img_size
        sent = [views["boxes"].column(first + number) for number in chosen]
        return torch.stack([torch.stack([resize_box(box, size) for box in boxes]) for boxes in sent], 1)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """Teacher's output (B, g, K) for unmasked global views (B, g, C, D, H, W): probabilities, centred."""
        logits = [self.teacher_head(self.embed(self.teacher_encoder(view)[0])) for view in images.unbind(1)]
        return (self.centre(torch.stack(logits, 1).float()) / self.current_temperature()).softmax(-1)

    def current_temperature(self) -> Tensor:
        """The teacher's, at the present state of the warm-up."""
        start, end = self.options.teacher_temperature_start, self.options.teacher_temperature
        if not self.options.temperature_warmup:
            return torch.full_like(self.progress, end)
        return start + (end - start) * (self.progress / self.options.temperature_warmup).clamp(max=1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Normed tokens (B, [1+]K, E) → embedding of the view (B, E)."""
        if self.options.embedding == "cls":
            return tokens[:, 0]
        return tokens[:, self.encoder.num_prefix_tokens :].mean(1)

    def predict(self, kind: str, image: Tensor, ids_shuffle: Tensor) -> tuple[Tensor, Tensor]:
        """Student's tokens (B, [1+]K, E) and predicted masked patches (B, N − K, P) of a global or local view."""
        tokens, _ = self.encoder(image, ids_shuffle[:, : self.visible[kind]])
        return tokens, self.decoder(tokens, ids_shuffle, self.specs[kind].grid)

    def start_encoder(self, load: Callable[[Encoder], LoadReport]) -> LoadReport:
        report = super().start_encoder(load)
        self.teacher_encoder.load_state_dict(self.encoder.state_dict())
        return report

    def synchronize(self, mean_over_processes) -> None:
        self.centre.synchronize(mean_over_processes)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher and its centre."""
        momentum = cosine_momentum(self.options.teacher_momentum, progress)
        follow(self.teacher_encoder, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        self.centre.step()
        self.progress.fill_(progress)

    @torch.no_grad()
    def reconstruct(self, views: Batch) -> dict[str, Reconstruction]:
        """The first global and the first local view."""
        made = {}
        for kind, spec in self.specs.items():
            image, ids_shuffle = self.images(views, kind, 0)[:, 0], views[f"{kind}_ids_shuffle"][:, 0]
            _, prediction = self.predict(kind, image, ids_shuffle)
            made[kind] = picture(image, ids_shuffle, prediction, spec, self.options.normalize_target)
        return made
