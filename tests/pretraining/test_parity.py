"""Our methods against numbers recorded from the authors' programs (tolerances: fixtures_util.Fixture.tolerance)."""

import pytest
import torch
from authors_names import block_outputs, convvit_state, mim_sizes
from fixtures_util import Fixture

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.architectures.tokens import patchify, put_tokens, take_tokens
from nnunetv2_hiendmae.pretraining import MAE3D, HiEndMAE, MiM
from nnunetv2_hiendmae.pretraining.crops import cut_blocks, resize
from nnunetv2_hiendmae.pretraining.masked import patch_targets

MAE_DECODER_NAMES = {
    "mask_token": "decoder.queries.mask_token",
    "decoder_pos_embed": "decoder.queries.pos_embed",
    "decoder_embed.": "decoder.queries.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}
HIENDMAE = ["hiendmae_pretrain_p12", "hiendmae_pretrain_p16", "hiendmae_pretrain_2ch"]


def hiendmae_names(state: dict) -> dict[str, str]:
    """Authors' names → ours, for every tensor of their checkpoint."""
    parts = {
        "mask_token": "queries.mask_token",
        "encoder_pos_embed": "encoder.pos_embed",
        "decoder_pos_embed": "queries.pos_embed",
        "decoder.blocks.": "self_blocks.",
        "decoder.cross_attention_blocks.": "cross_blocks.",
        "decoder.norm.": "norm.",
        "decoder.head.": "head.",
        "encoder_to_decoder.3.": "queries.embed.",
        "encoder_to_decoder.": "tap_embeds.",
        "encoder.": "encoder.",
    }
    norms = {".norm0.": ".norm_self.", ".norm1.": ".norm_cross.", ".norm2.": ".norm_mlp."}
    names = {}
    for name in state:
        theirs, ours = next((t, o) for t, o in parts.items() if name.startswith(t))
        target = ours + name.removeprefix(theirs)
        if theirs == "decoder.cross_attention_blocks.":
            for old, new in norms.items():
                target = target.replace(old, new)
        names[name] = target
    return names


def mae3d_names(state: dict) -> dict[str, str]:
    parts = {**MAE_DECODER_NAMES, "": "encoder."}
    names = {}
    for name in state:
        theirs, ours = next((t, o) for t, o in parts.items() if name.startswith(t))
        names[name] = ours + name.removeprefix(theirs)
    return names


def check_gradients(fixture: Fixture, method, names: dict[str, str]) -> None:
    ours = dict(method.named_parameters())
    norms = []
    for name in fixture.meta["grad_names"]:
        # a tensor that ours does not have is one that the loss does not reach
        gradient = ours[names[name]].grad if name in names else None
        norms.append(torch.tensor(-1.0) if gradient is None else gradient.norm())
    fixture.check("grad_norms", torch.stack(norms))


@pytest.fixture(params=HIENDMAE)
def hiendmae(request):
    fixture = Fixture(request.param)
    config = fixture.meta["config"]
    encoder, decoder = config["encoder"], config["decoder"]
    spec = EncoderSpec(
        config["img_size"],
        config["patch_size"],
        encoder["embed"],
        encoder["depth"],
        encoder["heads"],
        in_channels=config["in_chans"],
    )
    method = HiEndMAE(
        spec,
        mask_ratio=config["mask_ratio"],
        decoder_dim=decoder["embed"],
        decoder_heads=decoder["heads"],
        self_depth=decoder["self_depth"],
    )
    state = fixture.state_dict("module.")
    names = hiendmae_names(state)
    method.load_state_dict({names[k]: v for k, v in state.items()})
    return fixture, method, names


def test_hiendmae_forward(hiendmae):
    fixture, method, _ = hiendmae
    ids_shuffle = fixture["shuffle_indices"]
    visible = fixture.meta["config"]["sel_length"]
    assert method.visible == visible
    tokens, taps = method.encoder(fixture.image, ids_shuffle[:, :visible])
    fixture.check("enc_out", tokens)
    fixture.check("enc_hidden", torch.stack(block_outputs(method.encoder, fixture.image, ids_shuffle[:, :visible])))
    for layer, tap, embed in zip((3, 6, 9), taps, method.tap_embeds, strict=True):
        fixture.check("enc_hidden", tap, fixture["enc_hidden"][layer])
        fixture.check(f"dec_in_{layer}", embed(tap))
    fixture.check("dec_in_12", method.queries(tokens, ids_shuffle))
    fixture.check("dec_out", method.head(method.decode(tokens, taps, ids_shuffle)))


def test_hiendmae_loss_and_gradients(hiendmae):
    fixture, method, names = hiendmae
    loss = method({"image": fixture.image, "ids_shuffle": fixture["shuffle_indices"]})["loss"]
    fixture.check("loss", loss)
    loss.backward()
    check_gradients(fixture, method, names)


def test_hiendmae_reconstruction(hiendmae):
    """Visible patches are the input's; masked ones are the de-normalised prediction."""
    fixture, method, _ = hiendmae
    image, ids_shuffle = fixture.image, fixture["shuffle_indices"]
    made = method.reconstruct({"image": image, "ids_shuffle": ids_shuffle})["crop"]
    patches, given = (patchify(x, method.spec.patch_size) for x in (made.reconstruction, image))
    keep, masked = ids_shuffle[:, : method.visible], ids_shuffle[:, method.visible :]
    torch.testing.assert_close(take_tokens(patches, keep), take_tokens(given, keep), rtol=0, atol=0)
    if "recon_0" in fixture.tensors:
        # the authors' picture uses the unbiased deviation and adds 1e-6 outside the root, and predicts visible
        # patches too: compare the masked ones after undoing the two scales
        hidden = take_tokens(given, masked)[0]
        theirs = fixture["recon_0"][masked[0]] - hidden.mean(-1, keepdim=True)
        ours = take_tokens(patches, masked)[0] - hidden.mean(-1, keepdim=True)
        scale_theirs = hidden.std(-1, keepdim=True) + 1e-6
        scale_ours = (hidden.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        predicted = theirs / scale_theirs * scale_ours
        # a constant patch has no scale to undo: 1e-6 against 1e-3
        textured = hidden.std(-1) > 1e-3
        assert textured.any()
        torch.testing.assert_close(ours[textured], predicted[textured], rtol=1e-4, atol=1e-5)


@pytest.fixture
def mae3d():
    fixture = Fixture("mae3d_pretrain")
    config = fixture.meta["config"]
    decoder = config["decoder"]
    spec = EncoderSpec(config["img_size"], config["patch_size"], config["embed"], config["depth"], config["heads"])
    method = MAE3D(
        spec,
        mask_ratio=config["mask_ratio"],
        decoder_dim=decoder["embed"],
        decoder_depth=decoder["depth"],
        decoder_heads=decoder["heads"],
    )
    state = fixture.state_dict()
    names = mae3d_names(state)
    # their tables carry a zero row for CLS
    assert state["pos_embed"][:, 0].abs().max() == 0 and state["decoder_pos_embed"][:, 0].abs().max() == 0
    method.load_state_dict({names[k]: v[:, 1:] if k.endswith("pos_embed") else v for k, v in state.items()})
    return fixture, method, names


def test_mae3d_forward(mae3d):
    fixture, method, _ = mae3d
    ids_shuffle = fixture["noise"].argsort(dim=1)
    check_mask(fixture, "", ids_shuffle, method.visible)
    tokens, _ = method.encoder(fixture.image, ids_shuffle[:, : method.visible])
    fixture.check("latent", tokens)
    masked = ids_shuffle[:, method.visible :]
    fixture.check("pred", method.predict(fixture.image, ids_shuffle), take_tokens(fixture["pred"], masked))


def test_mae3d_losses_and_gradients(mae3d):
    fixture, method, names = mae3d
    views = {"image": fixture.image, "ids_shuffle": fixture["noise"].argsort(dim=1)}
    loss = method(views)["loss"]
    fixture.check("loss", loss)
    loss.backward()
    check_gradients(fixture, method, names)
    method.normalize_target = False
    fixture.check("loss_no_norm_pix", method(views)["loss"])


def mim(name: str, **options):
    """A MiM fixture, our method with its weights, and the authors' names → ours."""
    fixture = Fixture(name)
    config = fixture.meta["config"]
    decoder = config["decoder"]
    sizes = {f"decoder_{ours}": decoder[theirs] for ours, theirs in (("dim", "embed"), ("depth",) * 2, ("heads",) * 2)}
    method = MiM(EncoderSpec(**mim_sizes(config)), **sizes, alignment="none", **options)
    names, state = {}, {}
    for theirs, tensor in fixture.state_dict().items():
        # their alignment heads belong to a loss of theirs that is not rebuilt here
        if theirs.startswith("aggregate_"):
            continue
        renamed = {f"encoder.{k}": v for k, v in convvit_state({theirs: tensor}).items()}
        if not renamed:
            prefix = next(p for p in MAE_DECODER_NAMES if theirs.startswith(p))
            renamed = {MAE_DECODER_NAMES[prefix] + theirs.removeprefix(prefix): tensor}
        (names[theirs],) = renamed
        state |= renamed
    method.load_state_dict({**state, "progress": torch.zeros(())})
    return fixture, method, names


def check_mask(fixture: Fixture, prefix: str, ids_shuffle: torch.Tensor, visible: int) -> None:
    """The visible ones of a token permutation (B, N) against the recorded mask (1 = removed) and its inverse."""
    mask = torch.ones_like(fixture[f"{prefix}mask"]).scatter(1, ids_shuffle[:, :visible], 0)
    assert torch.equal(mask, fixture[f"{prefix}mask"])
    assert torch.equal(ids_shuffle.argsort(dim=1), fixture[f"{prefix}ids_restore"].long())


def check_prediction(fixture: Fixture, prefix: str, prediction: torch.Tensor) -> None:
    """Pixels (B, N, P) in raster order against the recorded rows and statistics."""
    fixture.check(f"{prefix}pred_mean", prediction.mean(-1))
    fixture.check(f"{prefix}pred_std", prediction.std(-1))
    rows = [0, 1, 5, 6, 35, 36, 107, 108, 215][: fixture[f"{prefix}pred_rows"].shape[1]]
    fixture.check(f"{prefix}pred_rows", prediction[:, rows])


def test_mim_decoder_loss_and_gradients():
    fixture, method, names = mim("mim_pretrain")
    ids_shuffle, visible = fixture["noise"].argsort(dim=1), method.visible[2]
    assert visible == fixture.meta["config"]["len_keep"]
    check_mask(fixture, "", ids_shuffle, visible)
    features, prediction = method.decode(fixture.image, ids_shuffle, visible)
    fixture.check("dec_feature", put_tokens(features, ids_shuffle))
    check_prediction(fixture, "", put_tokens(method.decoder.head(features), ids_shuffle))
    assert torch.equal(prediction, method.decoder.head(features[:, visible:]))
    _, loss = method.reconstruction_loss(fixture.image, ids_shuffle, visible)
    fixture.check("loss", loss.mean())
    loss.mean().backward()
    check_gradients(fixture, method, names)
    plain = patch_targets(fixture.image, ids_shuffle, visible, method.spec, normalize=False, unbiased=True)
    fixture.check("loss_no_norm_pix", (prediction - plain).pow(2).mean())


def test_mim_three_levels():
    """From one crop through resizing, cutting and enlarging to each level's loss, with the authors' choice of blocks
    and masks (which are no true octants) and without their alignment."""
    fixture, method, _ = mim("mim_threelevel", crops_level2=2, crops_level3=2, views_per_part=4)
    ids_shuffle = {name: fixture[f"{name}/ids_restore"].argsort(dim=1) for name in ("up", "mid", "down")}
    crop, octants = method.spec.img_size, fixture["mid/selected"].long()
    views = {
        "level1": resize(fixture.image, crop),
        "level2": cut_blocks(fixture.image, octants, crop),
        "octants": octants,
        "patches": fixture["down/selected"].long()[None],
        "ids_shuffle1": ids_shuffle["up"],
        "ids_shuffle2": ids_shuffle["mid"][None],
        "ids_shuffle3": ids_shuffle["down"].reshape(1, 2, 2, -1),
    }
    losses, total = [], 0.0
    for part, (level, name) in enumerate(((1, "up"), (2, "mid"), (3, "down"))):
        images, ids_shuffle = (
            t.flatten(0, 1) for t in method.level_views(views, level, range(method.num_views[level]))
        )
        fixture.check(f"{name}/img_sub", images[..., ::8, ::8, ::8])
        keep = ids_shuffle[:, : method.visible[level]]
        assert torch.equal(keep, fixture[f"{name}/ids_keep"].long())
        check_mask(fixture, f"{name}/", ids_shuffle, method.visible[level])
        fixture.check(f"{name}/latent", method.encoder(images, keep)[0][:, :16])
        features, _ = method.decode(images, ids_shuffle, method.visible[level])
        check_prediction(fixture, f"{name}/", put_tokens(method.decoder.head(features), ids_shuffle))
        found = method(views, part)
        found["loss"].backward()
        losses.append(found[f"loss_level{level}"])
        total += found["loss"].detach()
    fixture.check("losses", torch.stack(losses), fixture["losses"][:3])
    fixture.check("total", total, fixture["total"] - 0.1 * fixture["losses"][3:].sum())
    # the only weights whose gradient in the authors' run is that of the three reconstructions alone
    recorded = dict(zip(fixture.meta["grad_names"], fixture["grad_norms"], strict=True))
    for theirs, ours in (("decoder_pred.weight", "weight"), ("decoder_pred.bias", "bias")):
        norm = method.decoder.head.get_parameter(ours).grad.norm()
        torch.testing.assert_close(norm, recorded[theirs], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("preset", "parameters"), [("convvit_base", 71_255_056), ("convvit_tiny", 39_282_052)])
def test_mim_released_sizes(preset, parameters):
    with torch.device("meta"):
        method = MiM(PRESETS[preset])
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in method.named_children()}
    assert sum(count.values()) == parameters and count["align"] == 2_658_816
    if preset == "convvit_base":
        assert (count["encoder"], count["decoder"]) == (33_974_544, 34_621_696)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("vit_hiend_p12", 367_973_472), ("vit_hiend_p16", 372_252_448), ("vit_base_p16", 101_860_096)],
)
def test_released_sizes(preset, parameters):
    with torch.device("meta"):
        method = HiEndMAE(PRESETS[preset])
    assert sum(p.numel() for p in method.parameters()) == parameters
    if preset == "vit_hiend_p12":
        count = {n: sum(p.numel() for p in m.parameters()) for n, m in method.named_children()}
        tables = 512 * 1536, 512 * 528
        assert count["encoder"] - tables[0] == 342_638_592
        linears = 4 * (1536 * 528 + 528)
        assert linears == 3_246_144
        assert parameters - 342_638_592 - linears - sum(tables) - 528 == 21_031_440


def test_head_dimension_of_33_runs():
    """The released decoder has 528/16 = 33 channels per head, no multiple of 8: odd for fused attention."""
    spec = EncoderSpec((16, 16, 16), (8, 8, 8), 24, 4, 2)
    method = HiEndMAE(spec, decoder_dim=66, decoder_heads=2)
    loss = method({"image": torch.rand(1, 1, 16, 16, 16), "ids_shuffle": torch.arange(8)[None]})["loss"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(method.cross_blocks[0].cross_attn.q.weight.grad).all()
