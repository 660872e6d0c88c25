"""MiM: losses in parts, alignment with the region a view was cut from, curricula. Geometry is in test_nested.py."""

import math
import re

import numpy as np
import pytest
import torch
from array_volume import ArrayVolume
from run_data import TINY_SPEC
from torch.utils.data import default_collate

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import put_tokens
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import MiM
from nnunetv2_hiendmae.pretraining.crops import octant_tokens
from nnunetv2_hiendmae.pretraining.mim import RegionAlignment

CONV_SPEC = EncoderSpec((16, 16, 16), (8, 8, 8), 24, 2, 2, kind="convvit", stem_dims=(6, 12), stem_depths=(1, 1))
specs = pytest.mark.parametrize("spec", [TINY_SPEC, CONV_SPEC], ids=["vit", "convvit"])
alignments = pytest.mark.parametrize("alignment", ["infonce", "byol", "none"])


class WaveVolume(ArrayVolume):
    """Smooth waves, another phase in every sample: each place looks different."""

    def __init__(self, seed):
        axes = np.meshgrid(*[np.linspace(0, 1, 40)] * 3, indexing="ij")
        waves = sum((3 + i) ** -1 * np.sin((5 + 3 * i) * a + seed) for i, a in enumerate(axes)) + axes[0] * axes[1]
        super().__init__(waves.astype(np.float32)[None])


def build(spec=TINY_SPEC, **options) -> MiM:
    torch.manual_seed(0)
    return MiM(spec, decoder_dim=12, decoder_depth=1, decoder_heads=2, **options)


def make_batch(method, samples=3):
    return default_collate([method.views().draw(WaveVolume(s), np.random.default_rng(s)) for s in range(samples)])


def run_parts(method, batch):
    """Sums over all parts of what is logged."""
    totals = {}
    for part in range(method.num_parts):
        for name, value in method(batch, part).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def gradients(method, batch, at_once=False):
    method.zero_grad()
    if at_once:
        run_parts(method, batch)["loss"].backward()
    else:
        for part in range(method.num_parts):
            method(batch, part)["loss"].backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}


@specs
@alignments
def test_parts_add_up(spec, alignment):
    """Backward after every part, of one view, of three or of a whole level, gives the gradients of one backward that
    holds everything: the same sums in another order, so float32 rounding relative to the largest gradient."""
    method = build(spec, alignment=alignment)
    batch, reference = make_batch(method), build(spec, alignment=alignment, views_per_part=99)
    expected, losses = gradients(reference, batch, at_once=True), run_parts(reference, batch)
    scale = max(g.abs().max().item() for g in expected.values())
    for views, parts in ((1, 21), (3, 1 + 2 + 6), (99, 3)):
        method = build(spec, alignment=alignment, views_per_part=views)
        assert method.num_parts == parts
        for name, gradient in gradients(method, batch).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * scale, msg=name)
        for name, value in run_parts(method, batch).items():
            torch.testing.assert_close(value, losses[name], rtol=1e-5, atol=1e-6, msg=name)


@specs
@alignments
def test_every_part_reaches_every_trainable_tensor(spec, alignment):
    """In each part, with weight zero where it is not needed; over all parts no gradient is zero."""
    method = build(spec, alignment=alignment, views_per_part=4)
    batch = make_batch(method)
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    for part in range(method.num_parts):
        found = torch.autograd.grad(method(batch, part)["loss"], list(trainable.values()), allow_unused=True)
        assert None not in found
    zero = [name for name, gradient in gradients(method, batch).items() if not gradient.any()]
    assert zero == []
    heads = {"infonce": 2 * 4, "byol": 2 * 2, "none": 0}[alignment] * 2
    assert sum(name.startswith("align.") for name in trainable) == heads


@alignments
def test_a_part_keeps_no_activations_for_the_next(alignment):
    method = build(alignment=alignment)
    batch = make_batch(method)
    for part in range(method.num_parts):
        method(batch, part)
        assert not any(t.requires_grad for kept in method._regions.values() for t in kept)


def test_losses_are_weighted_and_summed():
    weights = {"level1": 0.5, "level2": 2.0, "level3": 0.7, "align12": 0.3, "align23": 0.0}
    method = build(**{f"weight_{name}": weight for name, weight in weights.items()})
    found = run_parts(method, make_batch(method))
    expected = sum(weight * found[f"loss_{name}"] for name, weight in weights.items())
    torch.testing.assert_close(found["loss"], expected)
    assert set(found) == {"loss", "accuracy_12", "accuracy_23", *(f"loss_{name}" for name in weights)}


def test_permuting_the_batch_permutes_the_losses_of_views_and_nothing_else():
    """For every view on its own; matrix products over other rows may differ in the last bit."""
    method = build(views_per_part=3)
    batch = make_batch(method)
    order = torch.tensor([2, 0, 1])
    permuted = {k: v[order] for k, v in batch.items()}
    ours = [method.per_view(batch, part) for part in range(method.num_parts)]
    theirs = [method.per_view(permuted, part) for part in range(method.num_parts)]
    for part, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        level, chosen = method.parts[part]
        assert f"loss_level{level}" in a
        for name in a:
            assert a[name].shape == (3, len(chosen))
            torch.testing.assert_close(a[name][order], b[name], rtol=1e-5, atol=1e-6)


# with several tokens per octant, too
FINE_SPEC = TINY_SPEC.with_(patch_size=(4, 4, 4))


@pytest.mark.parametrize("spec", [FINE_SPEC, CONV_SPEC], ids=["vit", "convvit"])
def test_the_positive_is_the_region_the_view_came_from(spec):
    """The features that count as a view's origin are those of its octant in level 1, or of its token in the level-2
    view it was cut from, computed here one by one; views of level 3 cross parts and parents."""
    method = build(spec, views_per_part=3)
    batch = make_batch(method)
    seen = {}

    def spy(pair):
        def hook(_module, args):
            seen.setdefault(pair, []).append([t.detach() for t in args])

        return hook

    for pair, head in method.align.items():
        head.register_forward_pre_hook(spy(pair))
    run_parts(method, batch)
    octants = octant_tokens(spec.grid)

    def coarse(image, ids_shuffle, level):
        """Decoder tokens (N, F) of one view in raster order, alone in its batch."""
        features, _ = method.decode(image[None], ids_shuffle[None], method.visible[level])
        return put_tokens(features, ids_shuffle[None])[0].detach()

    def views_in_order(pair, per_volume):
        """(features, regions, origin) of the hook → volume-major lists, parts put together."""
        parts = [[t.unflatten(0, (3, -1)) for t in args] for args in seen[pair]]
        features, regions, origin = (torch.cat(t, dim=1) for t in zip(*parts, strict=True))
        assert origin.shape == (3, per_volume)
        return features, regions, origin

    features, regions, origin = views_in_order("12", 4)
    for b, v in np.ndindex(3, 4):
        tokens = coarse(batch["level1"][b], batch["ids_shuffle1"][b], 1)
        octant = batch["octants"][b, v]
        assert origin[b, v] == octant and regions[b, v].shape == (8, 12)
        torch.testing.assert_close(regions[b, v, octant], tokens[octants[octant]].mean(0), rtol=1e-4, atol=1e-5)
        mean = coarse(batch["level2"][b, v], batch["ids_shuffle2"][b, v], 2).mean(0)
        torch.testing.assert_close(features[b, v], mean, rtol=1e-4, atol=1e-5)

    _, regions, origin = views_in_order("23", 16)
    for b, v in np.ndindex(3, 16):
        parent, patch = v // 4, batch["patches"][b, v // 4, v % 4]
        tokens = coarse(batch["level2"][b, parent], batch["ids_shuffle2"][b, parent], 2)
        assert origin[b, v] == patch and regions[b, v].shape == (spec.num_tokens, 12)
        torch.testing.assert_close(regions[b, v], tokens, rtol=1e-4, atol=1e-5)


def test_infonce_and_byol_are_what_they_are_called():
    features, regions, origin = torch.randn(5, 12), torch.randn(5, 7, 12), torch.tensor([0, 6, 3, 3, 1])
    torch.manual_seed(0)
    head = RegionAlignment("infonce", 12, tau=0.2)
    cosine = torch.cosine_similarity(head.query(features)[:, None], head.key(regions), dim=-1)
    loss, found = head(features, regions, origin)
    expected = torch.stack([-(c / 0.2).log_softmax(0)[o] for c, o in zip(cosine, origin, strict=True)])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(found, (cosine.argmax(1) == origin).float())
    head = RegionAlignment("byol", 12, tau=0.2)
    loss, _ = head(features, regions, origin)
    cosine = torch.cosine_similarity(head.query(features), regions[torch.arange(5), origin], dim=-1)
    torch.testing.assert_close(loss, 2 - 2 * cosine)


@pytest.mark.parametrize("kind", ["infonce", "byol"])
def test_cosines_are_float32_under_autocast(kind):
    """Features of neighbouring tokens differ by less than half precision resolves (2⁻⁸ near 1)."""
    head = RegionAlignment(kind, 12, tau=0.1)
    head.query = head.key = torch.nn.Identity()
    regions = torch.ones(1, 3, 12)
    regions[0, torch.arange(3), torch.arange(3)] += torch.tensor([0.01, 0.02, 0.03])
    features, origin = regions[:, 1], torch.tensor([1])
    exact, _ = head(features, regions, origin)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = head(features, regions, origin)
        rounded = RegionAlignment(kind, 12, tau=0.1)(features, regions, origin)
    assert found.item() == 1
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
    # what the MLPs give is in half precision; from there on it is not
    assert {t.dtype for t in rounded} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("alignment", "steps"), [("infonce", 80), ("byol", 20)])
def test_alignment_learns_where_a_view_comes_from(alignment, steps):
    """AdamW on two crops with fixed masks. The loss falls to less than half of its start. That only masked regions
    become views is learned first, so chance is one of 4 octants and one of 5 tokens, a loss of ln 4 and ln 5:
    "infonce" retrieves twice as many at a loss clearly below (last ten steps; measured: 1.0 and 0.79)."""
    torch.manual_seed(0)
    sizes = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 2, "views_per_part": 16}
    method = MiM(TINY_SPEC, alignment=alignment, weight_align12=10.0, weight_align23=10.0, **sizes)
    batch = make_batch(method, samples=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    log = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = run_parts(method, batch)
        found["loss"].backward()
        optimizer.step()
        log.append({name: float(value) for name, value in found.items()})
    late = {name: np.mean([line[name] for line in log[-10:]]) for name in log[0]}
    for pair, candidates in (("12", 4), ("23", 5)):
        assert late[f"loss_align{pair}"] < 0.5 * log[0][f"loss_align{pair}"]
        if alignment == "infonce":
            assert late[f"accuracy_{pair}"] > 2 / candidates
            assert late[f"loss_align{pair}"] < 0.75 * math.log(candidates)
    assert late["loss_level1"] < log[0]["loss_level1"]


@pytest.mark.parametrize(
    ("curriculum", "level1", "level3"),
    [
        ("concurrent", [1, 1, 1], [1, 1, 1]),
        ("coarse_to_fine", [2, 1 + math.sqrt(0.5), 1], [0, math.sqrt(0.5), 1]),
        ("fine_to_coarse", [0, math.sqrt(0.5), 1], [2, 1 + math.sqrt(0.5), 1]),
    ],
)
def test_curricula(curriculum, level1, level3):
    method = build(curriculum=curriculum, weight_level3=3.0)
    batch = make_batch(method)
    for progress, one, three in zip((0.0, 0.5, 1.0), level1, level3, strict=True):
        method.after_step(progress)
        found = run_parts(method, batch)
        aligned = 0.1 * (found["loss_align12"] + found["loss_align23"])
        expected = one * found["loss_level1"] + found["loss_level2"] + 3 * three * found["loss_level3"] + aligned
        torch.testing.assert_close(found["loss"], expected)
    resumed = build(curriculum=curriculum, weight_level3=3.0)
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(run_parts(resumed, batch)["loss"], found["loss"])


@specs
def test_masked_voxels_change_no_visible_token(spec):
    """Bit-exact, on every level; and the picture of a masked view shows what was visible."""
    method = build(spec).eval()
    batch = make_batch(method)
    made = method.reconstruct(batch)
    assert list(made) == ["level1", "level2", "level3"]
    for level, name in enumerate(made, start=1):
        images, ids_shuffle = (t[:, 0] for t in method.level_views(batch, level, range(1)))
        keep = ids_shuffle[:, : method.visible[level]]
        assert torch.equal(made[name].input, images)
        assert not torch.equal(made[name].masked, images)
        tokens = method.encoder(images, keep)[0]
        assert torch.equal(tokens, method.encoder(made[name].masked, keep)[0])
        assert torch.equal(tokens, method.encoder(made[name].reconstruction, keep)[0])


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"mask_ratio_level1": 0.05}, ("crops_level2", "4", "1 to 1", "octants", "--set crops_level2=")),
        ({"mask_ratio_level1": 1.0}, ("mask_ratio_level1", "1.0", "0 of 8 octants", "--set mask_ratio_level1=")),
        ({"mask_ratio_level2": 1.0}, ("mask_ratio_level2", "0 of 8 tokens", "--set mask_ratio_level2=", "--crop-size")),
        ({"mask_ratio_level3": 0.0}, ("mask_ratio_level3", "0.0", "8 of 8 tokens", "--set mask_ratio_level3=")),
        ({"crops_level2": 5}, ("crops_level2", "5", "1 to 4", "masked octants", "--set crops_level2=")),
        ({"crops_level3": 6}, ("crops_level3", "6", "1 to 5", "masked tokens", "level-2", "--set crops_level3=")),
        ({"crops_level2": 0}, ("crops_level2", "0", "1 to 4", "--set crops_level2=")),
        (
            {f"weight_level{level}": 0.0 for level in (1, 2, 3)} | {"alignment": "none"},
            ("weight_level1", "0.0", "0", "every part of the loss", "--set weight_level1="),
        ),
    ],
)
def test_bad_options(options, facts):
    with pytest.raises(UserError, match="^" + ".*".join(re.escape(fact) for fact in facts)):
        build(**options)


def test_another_crop_gives_no_more_octants():
    with pytest.raises(UserError, match=r"mask_ratio_level1=…$"):
        build(mask_ratio_level1=1.0)
