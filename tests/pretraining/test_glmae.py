"""GL-MAE: what it compares with what, the teacher, and what keeps its output from collapsing."""

import math
import re

import pytest
import torch
from run_data import TINY_OPTIONS, TINY_SPEC
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import normalize_patches, patchify, sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.optim import parameter_groups
from nnunetv2_hiendmae.pretraining import GLMAE
from nnunetv2_hiendmae.pretraining.glmae import Centre, cosine_momentum
from nnunetv2_hiendmae.pretraining.masked import DecoderQueries
from nnunetv2_hiendmae.training.batches import Boxes

WIDE_SPEC = EncoderSpec((16, 16, 24), (8, 8, 8), embed_dim=24, depth=2, num_heads=2, in_channels=2)


def build(spec: EncoderSpec = TINY_SPEC, **options) -> GLMAE:
    torch.manual_seed(0)
    return GLMAE(spec, **{**TINY_OPTIONS["glmae"], **options})


def make_batch(method: GLMAE, samples: int = 3, spread: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Each volume with its own brightness and waves, each view with its own phase and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.linspace(-1, 1, samples)[:, None, None]
    waves = (1 + torch.arange(samples) % 4)[:, None, None]
    batch = {}
    for kind, spec in method.specs.items():
        count = method.counts[kind]
        shape = (samples, count, spec.in_channels, *spec.img_size)
        phase = torch.rand(samples, count, 1, generator=generator) * 2 * math.pi
        along = torch.linspace(0, 2 * math.pi, spec.img_size[0])
        image = spread * (brightness + torch.sin(along * waves + phase))
        batch[kind] = image[:, :, None, :, None, None] + 0.1 * torch.randn(shape, generator=generator)
        ids_shuffle = [torch.randperm(spec.num_tokens, generator=generator) for _ in range(samples * count)]
        batch[f"{kind}_ids_shuffle"] = torch.stack(ids_shuffle).unflatten(0, (samples, count))
    return batch


def all_parts(method: GLMAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses summed over the parts, as the loop does it."""
    totals = {}
    for part in range(method.num_parts):
        for key, value in method(batch, part).items():
            totals[key] = totals.get(key, 0) + value
    return totals


class Fixed(nn.Module):
    """Answers the same logits to every embedding."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def test_consistency_and_entropy_by_hand():
    """Teacher (1/4, 3/4), student (1/8, 7/8): cross-entropy 1/4·ln 8 + 3/4·ln(8/7), entropy 1/4·ln 4 + 3/4·ln(4/3)."""
    method = build(head_dim=2, temperature_warmup=0.0, student_temperature=0.1, teacher_temperature=0.04)
    # what the centre takes away: the teacher's logits are 0 and τ·ln 3 without it
    method.centre.mean.copy_(torch.tensor([0.5, -0.2]))
    method.teacher_head = Fixed(0.5, -0.2 + 0.04 * math.log(3))
    method.head = Fixed(0.3, 0.3 + 0.1 * math.log(7))
    losses = all_parts(method, make_batch(method))
    assert losses["loss_consistency"].item() == pytest.approx(math.log(8) / 4 + 0.75 * math.log(8 / 7), abs=1e-5)
    assert losses["teacher_entropy"].item() == pytest.approx(math.log(4) / 4 + 0.75 * math.log(4 / 3), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"embedding": "cls"}, {"normalize_target": False, "consistency_weight": 0.3}])
def test_losses_by_their_definition(options):
    """Every pair of a teacher's unmasked global and a student's masked view, and every masked patch, one by one."""
    method = build(WIDE_SPEC, local_views=3, **options)
    method.after_step(0.05)
    method.centre.mean.normal_()
    # so that teacher and student differ
    for parameter in method.encoder.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    batch, patch = make_batch(method), WIDE_SPEC.patch_size
    row = 0 if options.get("embedding") == "cls" else slice(1, None)

    def embedding(tokens: Tensor) -> Tensor:
        return tokens[:, row] if row == 0 else tokens[:, row].mean(1)

    pairs, errors = [], {"global": [], "local": []}
    for kind in ("global", "local"):
        for view in range(method.counts[kind]):
            image, ids_shuffle = batch[kind][:, view], batch[f"{kind}_ids_shuffle"][:, view]
            visible = ids_shuffle.shape[1] // 4
            tokens, _ = method.encoder(image, ids_shuffle[:, :visible])
            student = (method.head(embedding(tokens)) / method.options.student_temperature).log_softmax(1)
            for teacher_view in batch["global"].unbind(1):
                logits = method.teacher_head(embedding(method.teacher_encoder(teacher_view)[0])) - method.centre.mean
                # half of the warm-up from 0.07 to 0.04 that the tenth of the run takes
                temperature = (method.options.teacher_temperature_start + method.options.teacher_temperature) / 2
                pairs.append(-((logits / temperature).softmax(1) * student).sum(1).mean())
            grid = [s // p for s, p in zip(image.shape[2:], patch, strict=True)]
            prediction = method.decoder(tokens, ids_shuffle, grid)
            target = patchify(image, patch)
            target = normalize_patches(target, unbiased=True) if method.options.normalize_target else target
            hidden = torch.stack([t[o[visible:]] for t, o in zip(target, ids_shuffle, strict=True)])
            errors[kind].append((prediction - hidden).pow(2).mean())
    losses = all_parts(method, batch)
    expected = {f"loss_reconstruction_{kind}": torch.stack(e).mean() for kind, e in errors.items()}
    expected["loss_consistency"] = torch.stack(pairs).mean()
    weight = method.options.consistency_weight
    expected["loss"] = sum(expected.values()) + (weight - 1) * expected["loss_consistency"]
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"embedding": "cls"}),
        ({"cls_token": False}, {"normalize_target": False}),
        ({"pos_embed": "learned"}, {"global_size": 32}),
        ({"img_size": (16, 24, 16)}, {"global_views": 1, "local_views": 3}),
        (
            {"kind": "convvit", "stem_dims": (6, 12), "stem_depths": (1, 1), "cls_token": False, "taps": ()},
            {"augment": True},
        ),
    ],
)
def test_every_trainable_tensor_gets_a_gradient_in_every_part_and_the_teacher_none(changes, options):
    method = build(TINY_SPEC.with_(**changes), **options)
    batch = make_batch(method)
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert not [n for n in trainable if n.startswith("teacher_")]
    assert {n.split(".")[0] for n in trainable} == {"encoder", "decoder", "head"}
    for part in range(method.num_parts):
        method.zero_grad()
        method(batch, part)["loss"].backward()
        assert not [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert all(p.grad is None for n, p in method.named_parameters() if n.startswith("teacher_"))
    optimized = {id(p) for group in parameter_groups(method, 0.05) for p in group["params"]}
    assert optimized == {id(p) for p in trainable.values()}


def test_without_consistency_every_part_still_reaches_every_tensor():
    """DDP waits for all of them."""
    method = build(consistency_weight=0.0)
    batch = make_batch(method)
    for part in range(method.num_parts):
        method.zero_grad()
        method(batch, part)["loss"].backward()
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_teacher_is_the_moving_average_in_closed_form():
    """t_n = Π m_i · t_0 + Σ (1 − m_i) Π_{j>i} m_j · s_i, with m from 0.9 to 1 as half a cosine."""
    method, steps = build(teacher_momentum=0.9), 5
    student, teacher = nn.ModuleList([method.encoder, method.head]), [method.teacher_encoder, method.teacher_head]
    states = [[p.detach().double() for p in student.parameters()]]
    momenta = []
    for step in range(1, steps + 1):
        for parameter in student.parameters():
            parameter.data.add_(torch.randn(parameter.shape))
        states.append([p.detach().double() for p in student.parameters()])
        momenta.append(1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        method.after_step(step / steps)
    assert momenta[-1] == 1.0
    weights = [math.prod(momenta), *((1 - m) * math.prod(momenta[i + 1 :]) for i, m in enumerate(momenta))]
    for number, value in enumerate(nn.ModuleList(teacher).parameters()):
        expected = sum(w * state[number] for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_momentum_and_temperature_over_the_run():
    assert [cosine_momentum(0.996, p) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    method = GLMAE(TINY_SPEC, decoder_depth=1)
    found = []
    for progress in (0.0, 0.05, 0.1, 1.0):
        method.after_step(progress)
        found.append(method.current_temperature().item())
    assert found == pytest.approx([0.07, 0.055, 0.04, 0.04])
    assert build(temperature_warmup=0.0, teacher_temperature=0.04).current_temperature().item() == pytest.approx(0.04)


def test_centre_moves_once_per_step_by_the_mean_of_the_global_batch():
    """However the batch is split over micro-batches and processes; within a step it stays."""
    steps = torch.randn(2, 8, 2, 5, generator=torch.Generator().manual_seed(3))
    whole, processes = Centre(5, 0.9), [Centre(5, 0.9), Centre(5, 0.9)]
    expected = torch.zeros(5)
    for logits in steps:
        for micro in logits.split(4):
            torch.testing.assert_close(whole(micro), micro - expected)
        for rank, centre in enumerate(processes):
            for micro in logits[4 * rank :][:4].split(2):
                centre(micro)
        seen = [torch.stack(centre._seen).mean(0) for centre in processes]
        for centre in processes:
            centre.synchronize(lambda own, seen=seen: sum(seen) / 2)
        expected = 0.9 * expected + 0.1 * logits.mean((0, 1))
        for centre in (whole, *processes):
            centre.step()
            torch.testing.assert_close(centre.mean, expected)
    still = Centre(5, 1.0)
    still(steps[0])
    still.step()
    assert not still.mean.any()


def test_after_a_step_the_centre_has_moved_by_the_teachers_logits():
    method = build(centre_momentum=0.9)
    batch = make_batch(method)
    views = [method.teacher_head(method.embed(method.teacher_encoder(v)[0])) for v in batch["global"].unbind(1)]
    for half in (slice(0, 2), slice(2, 4)):
        # two micro-batches: the second teacher's output is centred as the first one's
        all_parts(method, {k: torch.cat([v, v[:1]])[half] for k, v in batch.items()})
        assert not method.centre.mean.any()
    method.after_step(0.1)
    seen = torch.stack(views)[:, [0, 1, 2, 0]].mean((0, 1))
    torch.testing.assert_close(method.centre.mean, 0.1 * seen, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_teacher_centre_and_temperature():
    """Weights in another process give the same losses, in the middle of the warm-up of the temperature."""
    method, batch = build(), make_batch(build())
    all_parts(method, batch)
    for parameter in [*method.encoder.parameters(), *method.head.parameters()]:
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    method.after_step(0.05)
    expected = all_parts(method, batch)
    resumed = build()
    before = all_parts(resumed, batch)
    resumed.load_state_dict(method.state_dict())
    found = all_parts(resumed, batch)
    assert all(torch.equal(found[k], expected[k]) and not torch.equal(found[k], before[k]) for k in expected)


def test_student_sees_no_masked_voxel_and_the_teacher_sees_all():
    method = build()
    batch = make_batch(method)
    covered = method.reconstruct(batch)
    for kind in ("global", "local"):
        image, ids_shuffle = batch[kind][:, 0], batch[f"{kind}_ids_shuffle"][:, 0]
        plain, _ = method.predict(kind, image, ids_shuffle)
        masked, _ = method.predict(kind, covered[kind].masked, ids_shuffle)
        assert torch.equal(plain, masked)
    hidden = torch.stack([covered["global"].masked, batch["global"][:, 1]], dim=1)
    assert not torch.allclose(method.teach(hidden), method.teach(batch["global"]), atol=1e-3)


def test_pictures_show_the_first_view_of_each_kind():
    method = build(WIDE_SPEC)
    batch = make_batch(method)
    made = method.reconstruct(batch)
    assert set(made) == {"global", "local"}
    for kind, picture in made.items():
        image, ids_shuffle = batch[kind][:, 0], batch[f"{kind}_ids_shuffle"][:, 0]
        assert torch.equal(picture.input, image) and picture.reconstruction.shape == image.shape
        shown = (patchify(picture.reconstruction, (8, 8, 8)) == patchify(image, (8, 8, 8))).all(2)
        assert all(torch.equal(s.nonzero()[:, 0], o[: len(o) // 4].sort().values) for s, o in zip(shown, ids_shuffle))  # noqa: B905


def train(steps: int = 30, **options) -> list[dict[str, float]]:
    """Eight volumes that differ little, so that one answer for all is tempting; published temperatures."""
    spec = EncoderSpec((16, 16, 16), (8, 8, 8), embed_dim=24, depth=2, num_heads=2)
    tiny = {"head_hidden": 32, "head_dim": 16, "decoder_dim": 24, "teacher_momentum": 0.97}
    temperatures = {n: v for n, v in GLMAE.defaults().items() if "temperature" in n}
    method = build(spec, **{**tiny, **temperatures, **options})
    batches = [make_batch(method, 8, spread=0.05, seed=seed) for seed in (1, 2)]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.0)
    log = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        losses = all_parts(method, batches[step % 2])
        losses["loss"].backward()
        optimizer.step()
        method.after_step((step + 1) / steps)
        log.append({key: value.item() for key, value in losses.items()})
    return log


@pytest.mark.slow
def test_centring_keeps_the_teacher_from_one_answer_for_all():
    """Bounds are shares of ln 16, the entropy of 16 equal outputs. With centring the teacher's entropy stays above a
    tenth (0.13 is the lowest seen) and below three quarters, without it a twentieth is what is left."""
    largest = math.log(16)
    centred = [line["teacher_entropy"] / largest for line in train()]
    assert min(centred) > 0.1 and max(centred) < 0.75
    collapsed = [line["teacher_entropy"] / largest for line in train(centre_momentum=1.0)]
    assert collapsed[-1] < 0.05 < 0.1 < collapsed[0]


def test_decoder_positions_of_another_grid():
    queries = DecoderQueries(TINY_SPEC, 12)
    assert queries.positions() is queries.positions((2, 2, 2)) is queries.pos_embed
    assert torch.equal(queries.positions((3, 4, 5)), sincos_positions((3, 4, 5), 12))
    ids_shuffle = torch.randperm(60)[None]
    x = queries(torch.zeros(1, 16, TINY_SPEC.embed_dim), ids_shuffle, (3, 4, 5))
    embedded = torch.cat([queries.embed.bias.expand(1, 15, -1), queries.mask_token.expand(1, 45, -1)], dim=1)
    torch.testing.assert_close(x[:, 1:] - embedded, sincos_positions((3, 4, 5), 12)[:, ids_shuffle[0]])


@pytest.mark.parametrize(
    ("spec", "given", "expected"),
    [
        (PRESETS["vit_base_p16"], None, (160, 160, 160)),
        # 160 / 12 patches, rounded
        (PRESETS["vit_hiend_p12"], None, (156, 156, 156)),
        (WIDE_SPEC, None, (24, 24, 40)),
        (WIDE_SPEC, 32, (32, 32, 32)),
        (WIDE_SPEC, (16, 32, 24), (16, 32, 24)),
    ],
)
def test_global_size(spec, given, expected):
    with torch.device("meta"):
        method = GLMAE(spec, global_size=given)
    crops = method.views()
    assert crops.global_crop.size == expected and crops.local_crop.size == spec.img_size
    assert crops.global_crop.num_tokens == math.prod(s // p for s, p in zip(expected, spec.patch_size, strict=True))
    assert (crops.global_crop.scale, crops.local_crop.scale) == ((0.5, 1.0), (0.25, 0.5))
    assert (crops.global_views, crops.local_views, method.num_parts) == (2, 4, 6)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"global_size": 20}, ("global_size", "20", "(8, 8, 8)", "--set global_size=")),
        ({"global_size": 0}, ("global_size", "0", "(8, 8, 8)", "--set global_size=")),
        ({"global_size": (16, 16)}, ("global_size", "(16, 16)", "(8, 8, 8)", "--set global_size=")),
        ({"mask_ratio": 1.0}, ("mask_ratio", "1.0", "0 of 27", "global", "--set mask_ratio=", "--crop-size")),
        ({"mask_ratio": 0.9}, ("mask_ratio", "0.9", "0 of 8", "local", "--set mask_ratio=", "--crop-size")),
        ({"global_scale_max": 1.2}, ("global_scale_max", "1.2", "0.5", "global_scale_min", "1", "--set global_scale")),
        ({"local_scale_min": 0.6}, ("local_scale_max", "0.5", "0.6", "local_scale_min", "1", "--set local_scale_max=")),
    ],
)
def test_bad_options(options, facts):
    with pytest.raises(UserError, match="^" + ".*".join(re.escape(fact) for fact in facts)):
        build(**options)


def test_cls_embedding_needs_a_cls_token():
    with pytest.raises(UserError, match=r"^embedding .*cls.*mean.*CLS token.*--encoder.*--set embedding="):
        build(TINY_SPEC.with_(cls_token=False), embedding="cls")


def test_losses_and_pictures_are_the_same_where_boxes_came():
    """Boxes of the size of their views, so that nothing is resized; what resizing does is tested with the views."""
    method, again = build(), build()
    batch = make_batch(method)
    pairs = zip(batch["global"], batch["local"], strict=True)
    sent = {k: v for k, v in batch.items() if k not in ("global", "local")}
    sent["boxes"] = Boxes(tuple((*large, *small) for large, small in pairs))
    for key, value in all_parts(method, batch).items():
        assert torch.equal(value, all_parts(again, sent)[key]), key
    for kind, made in method.reconstruct(batch).items():
        assert torch.equal(made.reconstruction, again.reconstruct(sent)[kind].reconstruction)
    for view in range(method.counts["local"]):
        assert torch.equal(method.images(sent, "local", view)[:, 0], batch["local"][:, view])
