"""The baselines of the papers: their losses against plain formulas, what is drawn, and what is refused."""

import math
import os
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from primus_util import FULL_PRIMUS
from run_data import PLANS, TINY_SPEC, tiny_settings
from test_blocks import HYBRID
from test_loop import cli_arguments
from test_methods import NoiseVolume, make_batch

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS, Method
from nnunetv2_hiendmae.pretraining.genesis import intensity_curve, paint, shuffle_windows
from nnunetv2_hiendmae.pretraining.loop import prepare
from nnunetv2_hiendmae.pretraining.simclr import nt_xent
from nnunetv2_hiendmae.pretraining.steps import Learner, part_processes
from nnunetv2_hiendmae.pretraining.swinpretexts import draw_cutout, turn
from nnunetv2_hiendmae.training.views import unaugmented
from nnunetv2_hiendmae.training.volumes import find_cases

WIDE = TINY_SPEC.with_(img_size=(32, 32, 32))


def build(name: str, spec=TINY_SPEC, **options) -> Method:
    torch.manual_seed(0)
    return METHODS[name](spec, **options)


@pytest.mark.parametrize(("edge", "hidden"), [(1, 39), (2, 40), (4, None)])
def test_simmim_hides_whole_cubes_of_tokens(edge, hidden):
    """Of 64 tokens in 4³: int(64·.4) = 25 stay, or int(8·.4) = 3 cubes of 8; one cube cannot be divided."""
    if hidden is None:
        with pytest.raises(UserError, match=r"mask_ratio 0\.6 leaves 0 of 1 cubes"):
            build("simmim", WIDE, mask_edge=edge)
        return
    method = build("simmim", WIDE, mask_edge=edge)
    batch = make_batch(method, samples=2)
    assert batch["ids_shuffle"].sort(1)[0].eq(torch.arange(64)).all()
    made = method.reconstruct(batch)["crop"]
    cubes = tk.patchify(made.hidden[:, None].float(), (8 * edge,) * 3).mean(2)
    assert set(cubes.unique().tolist()) == {0.0, 1.0} and made.hidden.sum() == 2 * hidden * 8**3
    assert not torch.equal(made.hidden[0], made.hidden[1])


@pytest.mark.parametrize("spec", [WIDE, WIDE.with_(cls_token=False)], ids=["cls", "plain"])
def test_simmim_is_l1_of_masked_voxels_behind_mask_tokens(spec):
    """The encoder's steps one by one, with the token in place of what is hidden, then voxels one by one."""
    method = build("simmim", spec).eval()
    batch = make_batch(method, samples=2)
    image, encoder = batch["image"], method.encoder
    hidden = method.reconstruct(batch)["crop"].hidden
    tokens = encoder.patch_embed(tk.patchify(image, spec.patch_size))
    tokens[tk.patchify(hidden[:, None], spec.patch_size)[..., 0]] = method.mask_token[0, 0]
    tokens = tokens + encoder.pos_embed
    if spec.cls_token:
        tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1)
    for block in encoder.blocks:
        tokens = block(tokens)
    voxels = tk.unpatchify(method.head(encoder.norm(tokens)[:, -64:]), spec.grid, spec.patch_size)
    expected = (voxels - image)[hidden[:, None]].abs().mean()
    torch.testing.assert_close(method(batch)["loss"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [TINY_SPEC, FULL_PRIMUS], ids=["vit", "primus"])
def test_simmim_sees_visible_voxels_alone(spec):
    method = build("simmim", spec, mask_edge=1).eval()
    batch = make_batch(method, samples=1)
    hidden = method.reconstruct(batch)["crop"].hidden[:, None]
    predicted = [
        method.predict(torch.where(where, 0, batch["image"]), batch["ids_shuffle"])
        for where in (torch.zeros_like(hidden), hidden, ~hidden)
    ]
    assert torch.equal(predicted[0], predicted[1]) and not torch.equal(predicted[0], predicted[2])


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("convvit_tiny", {}, r"^simmim .*'convvit'.*--encoder"),
        ("vit_nano_p8", {"mask_edge": 4}, r"^mask_edge is 4, .*\(6, 6, 6\).*--set mask_edge"),
    ],
)
def test_simmim_refuses(preset, options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        METHODS["simmim"](PRESETS[preset], **options)


CONTRASTED = [name for name, method in METHODS.items() if method.compares_samples]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_contrast_pair_by_pair(temperature):
    pairs = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    vectors, found, nearest = pairs.reshape(6, 5).tolist(), [], []
    for i, a in enumerate(vectors):
        others = {}
        for j, b in enumerate(vectors):
            if j != i:
                cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
                others[j] = cosine / temperature
        partner = i + 1 if i % 2 == 0 else i - 1
        found.append(math.log(sum(map(math.exp, others.values()))) - others[partner])
        nearest.append(max(others, key=others.get) == partner)
    loss, accuracy = nt_xent(pairs, temperature)
    assert loss.item() == pytest.approx(np.mean(found), rel=1e-5) and accuracy.item() == pytest.approx(np.mean(nearest))
    # length does not count
    torch.testing.assert_close(nt_xent(3 * pairs, temperature)[0], loss, rtol=1e-5, atol=0)


def test_contrast_of_pairs_that_are_alike_and_opposite():
    """Two pairs, each alike, opposite to each other: ln(1 + 2·exp(−2/τ))."""
    pairs = torch.tensor([[[1.0, 0.0]] * 2, [[-1.0, 0.0]] * 2])
    assert nt_xent(pairs, 0.5)[0].item() == pytest.approx(math.log(1 + 2 * math.exp(-4)), rel=1e-5)


def test_simclr_compares_crops_of_one_volume():
    method = build("simclr")
    drawn = method.views().draw(NoiseVolume(1, 0), np.random.default_rng(0))["images"]
    assert drawn.shape == (2, 1, 16, 16, 16) and not torch.equal(*drawn)
    batch = make_batch(method)
    images = batch["images"].flatten(0, 1)
    embedded = method.encoder(images)[0][:, 1:].mean(1)
    expected = nt_xent(method.head(embedded).reshape(4, 2, 128), 0.1)
    torch.testing.assert_close(method(batch), {"loss": expected[0], "accuracy": expected[1]})


def first_step(name: str, variables: dict[str, str], file: Path) -> None:
    """Losses and gradients of a run's first step, as this process finds them."""
    os.environ.update(variables)
    settings = tiny_settings(name)
    fabric, method = prepare(settings, file.parent)
    learner = Learner.set_up(fabric, settings, method)
    batches = learner.batches(find_cases(settings.datasets, PLANS, "3d_fullres"), range(1))
    measured = learner._backward(batches, 0)
    torch.save((measured, {k: p.grad for k, p in method.named_parameters() if p.requires_grad}), file)
    part_processes(fabric)


@pytest.mark.parametrize("name", CONTRASTED)
def test_two_processes_contrast_the_whole_batch(preprocessed, nnunet, tmp_path, name):
    """Losses and gradients are those of one process, but for the order of sums: to 1e-6 of the loss, to 1e-5 of each
    tensor's largest gradient. Each process by itself would find two samples of four."""
    first_step(name, {}, tmp_path / "one")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": forked.free_port()}
    shared |= {**nnunet.environment, "TORCHELASTIC_RUN_ID": "a", "GROUP_RANK": "0"}
    running = [
        forked.SERVER.Process(
            target=first_step, args=(name, {**shared, "RANK": rank, "LOCAL_RANK": rank}, tmp_path / rank)
        )
        for rank in "01"
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(forked.TIMEOUT_S)
    assert [process.exitcode for process in running] == [0, 0]
    loss, gradients = torch.load(tmp_path / "one")
    for rank in "01":
        measured, found = torch.load(tmp_path / rank)
        assert measured == pytest.approx(loss, abs=1e-6) and found.keys() == gradients.keys()
        wrong = {k: (g - found[k]).abs().max() / g.abs().max() for k, g in gradients.items()}
        # the loss does not depend on the biases of keys: theirs are rounding
        assert max(wrong[k] for k in wrong if not k.endswith("attn.qkv.bias")) < 1e-5


@pytest.mark.parametrize("name", CONTRASTED)
def test_a_sample_alone_has_nothing_to_be_compared_with(preprocessed, tmp_path, capsys, name):
    for batch, parts in ((1, 1), (4, 4)):
        sizes = ["--batch-size", str(batch), "--accumulate", str(parts)]
        assert cli.main([*cli_arguments(name, tmp_path / "run"), *sizes]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--batch-size {batch} in {parts} micro-batches" in error and name in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_compares_goes_on_with_the_same_micro_batches(preprocessed, tmp_path, capsys):
    arguments = [*cli_arguments("simclr", tmp_path / "run"), "--epochs", "1", "--accumulate"]
    assert cli.main([*arguments, "2"]) == 0
    assert cli.main([*arguments, "1", "--c"]) == 2
    assert "accumulate was 2, is 1" in capsys.readouterr().err
    assert cli.main([*arguments, "2", "--c"]) == 0


def test_no_pictures_of_what_reconstructs_nothing(preprocessed, tmp_path, capsys):
    assert cli.main([*cli_arguments("simclr", tmp_path / "run"), "--epochs", "1"]) == 0
    assert cli.main(["reconstruct", str(tmp_path / "run"), "-o", str(tmp_path / "made"), "-device", "cpu"]) == 2
    assert "simclr reconstructs nothing" in capsys.readouterr().err and not (tmp_path / "made").exists()


@pytest.mark.parametrize("seed", range(20))
def test_genesis_curves_are_monotone(seed):
    x, y = intensity_curve(np.random.default_rng(seed))
    assert x[0] == 0 and x[-1] == 1 and (np.diff(x) >= 0).all()
    assert sorted((y[0], y[-1])) == [0, 1] and (np.diff(y) * (y[-1] - y[0]) >= 0).all()


def test_genesis_curves_rise_and_fall():
    falling = [intensity_curve(np.random.default_rng(seed))[1][0] for seed in range(200)]
    # 3 standard deviations of a fair coin
    assert abs(np.mean(falling) - 0.5) < 3 * 0.5 / math.sqrt(200)


@pytest.mark.parametrize("count", [1, 50])
def test_genesis_shuffles_inside_windows(count):
    """The voxels are the same ones, channels move together, and none leaves a tenth of an axis per window."""
    before = np.arange(40**3, dtype=np.float32).reshape(1, 40, 40, 40) + np.array([0, 1e6])[:, None, None, None]
    after = before.copy()
    shuffle_windows(after, count, np.random.default_rng(1))
    assert np.array_equal(np.sort(after.ravel()), np.sort(before.ravel()))
    assert np.array_equal(after[1] - after[0], before[1] - before[0])
    moved = np.argwhere(after[0] != before[0])
    assert 0 < len(moved) <= count * 4**3
    if count == 1:
        assert (np.ptp(moved, axis=0) < 4).all()


@pytest.mark.parametrize("outside", [False, True])
def test_genesis_paints_boxes_or_all_around_them(outside):
    """Of edges 42: up to five boxes of 7 to 14 voxels, or one to five of 18 to 24; what is left is as before."""
    shares = []
    for seed in range(10):
        image = np.full((2, 42, 42, 42), 2.0, np.float32)
        paint(image, outside, np.random.default_rng(seed))
        painted = image[0] != 2
        assert np.array_equal(painted, image[1] != 2) and ((image[:, painted] >= 0) & (image[:, painted] < 1)).all()
        shares.append(painted.mean())
    low, high = (7 / 42) ** 3, 5 * (14 / 42) ** 3
    if outside:
        low, high = 1 - 5 * (24 / 42) ** 3, 1 - (18 / 42) ** 3
    assert all(low <= share <= high or (share == 0 and not outside) for share in shares) and len({*shares}) > 5


def test_genesis_rarely_paints_nothing():
    """Each of up to five boxes is painted with .95: of 400 images 20 have none, within three standard deviations; the
    boxes that all around is painted of are never as few."""

    def unpainted(outside: bool) -> int:
        images = [np.full((1, 12, 12, 12), 2.0, np.float32) for _ in range(400)]
        for seed, image in enumerate(images):
            paint(image, outside, np.random.default_rng(seed))
        return sum(float(image.min()) == 2 for image in images)

    assert abs(unpainted(outside=False) - 20) < 14 and unpainted(outside=True) == 0


@pytest.mark.parametrize("distortion", ["shuffle", "nonlinear", "paint"])
def test_genesis_distorts_as_often_as_it_should(distortion):
    """Alone at .5: half of the crops, within three standard deviations; images are left as they were."""
    chances = {name: 0.5 if name == distortion else 0.0 for name in ("shuffle", "nonlinear", "paint")}
    method, volume, changed = build("genesis", windows=3, **chances), NoiseVolume(1, 0), []
    for seed in range(100):
        drawn = unaugmented(method.views()).draw(volume, np.random.default_rng(seed))
        lower = drawn["lower"].tolist()
        assert np.array_equal(drawn["image"], volume.read(lower, (16, 16, 16)))
        changed.append(not torch.equal(drawn["image"], drawn["distorted"]))
    assert abs(np.mean(changed) - 0.5) < 0.15


def test_genesis_takes_intensities_to_the_unit_interval_and_back():
    """Z-scored MR: distorted intensities stay between the crop's own; channels by themselves."""
    volume = NoiseVolume(2, 0)
    volume.values *= np.array([8.0, 300.0], np.float32)[:, None, None, None]
    volume.values -= 3
    method = build("genesis", TINY_SPEC.with_(in_channels=2), shuffle=0, paint=0.0, nonlinear=1.0)
    drawn = unaugmented(method.views()).draw(volume, np.random.default_rng(0))
    for image, distorted in zip(drawn["image"], drawn["distorted"], strict=True):
        assert not torch.equal(image, distorted)
        assert distorted.min().item() == pytest.approx(image.min().item(), abs=1e-3)
        assert distorted.max().item() == pytest.approx(image.max().item(), rel=1e-4)


def test_genesis_restores_every_voxel():
    method = build("genesis").eval()
    batch = make_batch(method, samples=2)
    made = method.reconstruct(batch)["crop"]
    assert torch.equal(made.input, batch["image"]) and torch.equal(made.masked, batch["distorted"])
    tokens = method.encoder(batch["distorted"])[0][:, 1:]
    torch.testing.assert_close(tk.patchify(made.reconstruction, (8, 8, 8)), method.head(tokens))
    expected = sum(((r - i) ** 2).sum() for r, i in zip(made.reconstruction, made.input, strict=True)) / (2 * 16**3)
    torch.testing.assert_close(method(batch)["loss"], expected)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("shape", [(16, 16, 16), (20, 32, 32)])
def test_pretexts_cut_out_the_share(shape, share):
    cut = [draw_cutout(shape, share, np.random.default_rng(seed)) for seed in range(5)]
    assert {c.sum() for c in cut} == {round(share * math.prod(shape))}
    # everywhere, and not as noise: most neighbours of a hidden voxel are hidden
    assert not np.logical_and.reduce(cut).all() and len({c.tobytes() for c in cut}) == 5
    assert min(c[1:][c[:-1]].mean() for c in cut) > 0.6


def test_pretexts_turn_about_the_first_axis_and_back():
    """The patient's long axis is the first one of nnU-Net's arrays; one quarter turn takes rows to columns."""
    images = torch.rand(4, 2, 3, 6, 6)
    turns = torch.arange(4)
    turned = turn(images, turns)
    assert torch.equal(turn(turned, -turns), images) and torch.equal(turned[0], images[0])
    assert torch.equal(turned[1], images[1].transpose(-1, -2).flip(-2))
    assert torch.equal(turned[2], images[2].flip(-1, -2))
    # slices stay slices
    torch.testing.assert_close(turned.mean((3, 4)), images.mean((3, 4)))


def test_pretexts_draw_every_turn():
    views, volume = build("swinpretexts").views(), NoiseVolume(1, 0)
    turns = [views.draw(volume, np.random.default_rng(seed))["turns"].tolist() for seed in range(50)]
    # 100 draws of four: 3 standard deviations of each count
    counts = np.bincount(np.ravel(turns), minlength=4)
    assert len(counts) == 4 and (abs(counts - 25) < 13).all() and any(a != b for a, b in turns)


def test_pretexts_are_the_sum_of_three_losses():
    """View by view, from the encoder's tokens."""
    method = build("swinpretexts", weight_inpainting=2.0, weight_rotation=3.0, weight_contrast=5.0).eval()
    batch = make_batch(method, samples=3)
    absolute, told, embedded = [], [], []
    for sample in range(3):
        for view in range(2):
            k = batch["turns"][sample, view]
            turned = torch.rot90(batch["image"][sample], int(k), (2, 3))
            tokens = method.encoder((turned * ~batch["hidden"][sample, view])[None])[0][0, 1:]
            voxels = tk.unpatchify(method.inpainting(tokens)[None], (2, 2, 2), (8, 8, 8))[0]
            absolute.append((voxels - turned).abs().mean())
            told.append(-method.rotation(tokens.mean(0)).log_softmax(0)[k])
            embedded.append(method.contrast(tokens.mean(0)))
    contrast, _ = nt_xent(torch.stack(embedded).reshape(3, 2, -1), 0.5)
    parts = [torch.stack(absolute).mean(), torch.stack(told).mean(), contrast]
    found = method(batch)
    named = [found[f"loss_{name}"] for name in ("inpainting", "rotation", "contrast")]
    torch.testing.assert_close(named, [p.detach() for p in parts])
    torch.testing.assert_close(found["loss"], 2 * parts[0] + 3 * parts[1] + 5 * parts[2])


def test_pretexts_show_the_crop_as_it_lies():
    """A picture's letters and NIfTI files are those of the crop, so what was turned is turned back."""
    method = build("swinpretexts").eval()
    batch = make_batch(method)
    assert batch["turns"][:, 0].any()
    made = method.reconstruct(batch)["crop"]
    assert torch.equal(made.input, batch["image"])
    hidden = made.hidden[:, None]
    assert torch.equal(made.masked[~hidden], made.input[~hidden]) and not made.masked[hidden].any()
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=1e-3)
    # a head that predicts the place in the view shows how the prediction was turned
    with torch.no_grad():
        method.inpainting.weight.zero_()
        method.inpainting.bias.copy_(tk.patchify(torch.arange(512.0).reshape(1, 1, 8, 8, 8), (8, 8, 8))[0, 0])
    ramp = torch.arange(512.0).reshape(8, 8, 8).tile(2, 2, 2)
    for made, k in zip(method.reconstruct(batch)["crop"].reconstruction[:, 0], batch["turns"][:, 0], strict=True):
        assert torch.equal(made, torch.rot90(ramp, -int(k), (1, 2)))


def test_pretexts_need_a_crop_that_is_square_in_plane():
    with torch.device("meta"), pytest.raises(UserError, match=r"swinpretexts .*\(16, 16, 24\).*--crop-size"):
        METHODS["swinpretexts"](TINY_SPEC.with_(img_size=(16, 16, 24)))


@pytest.mark.parametrize("name", ["simclr", "genesis", "swinpretexts"])
def test_hybrids_learn_too(name):
    """Every tensor gets a gradient, as several processes need it."""
    method = build(name, HYBRID)
    method(make_batch(method, samples=2))["loss"].backward()
    assert not [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
