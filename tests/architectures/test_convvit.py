"""ConvViTEncoder: parity with MiM's encoder, masking without leaks, dense maps, initialisation."""

import copy
import math

import pytest
import torch
from authors_names import convvit_state, mim_sizes, statistics
from fixtures_util import Fixture

from nnunetv2_hiendmae.architectures import PRESETS, ConvViTEncoder, EncoderSpec, ViTEncoder, build_encoder
from nnunetv2_hiendmae.architectures.convvit import ConvBlock, channels_last_patches, hidden_voxels, relative_index
from nnunetv2_hiendmae.architectures.spec import num_visible
from nnunetv2_hiendmae.architectures.tokens import patchify

# one convolutional stage: a token is 4³ voxels
SPEC = EncoderSpec((8, 8, 12), (4, 4, 4), 12, 2, 2, kind="convvit", stem_dims=(4,), stem_depths=(2,))
# a token is 16³ voxels, but the 5³ kernels of three stages with two blocks each reach beyond a token
DEEP = EncoderSpec((32, 32, 48), (16, 16, 16), 12, 2, 2, kind="convvit", stem_dims=(4, 4, 8), stem_depths=(2, 1, 2))


def encoder_of(spec):
    torch.manual_seed(0)
    return build_encoder(spec).eval()


# ---- parity -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrain():
    """The fixture, our encoder with its weights, the kept tokens, and our outputs by the names of the recording."""
    fixture = Fixture("mim_pretrain")
    config = fixture.meta["config"]
    spec = EncoderSpec(**mim_sizes(config))
    encoder = build_encoder(spec)
    encoder.load_state_dict(convvit_state(fixture.state_dict()))
    keep = fixture["noise"].argsort(dim=1)[:, : num_visible(spec.num_tokens, config["mask_ratio"])]
    assert keep.shape[1] == config["len_keep"]
    seen, hooks = {}, []

    def record(module, name):
        hooks.append(module.register_forward_hook(lambda _m, _i, out: seen.update({name: out.detach()})))

    for i, stage in enumerate(encoder.stages, start=1):
        record(stage.embed, f"patch_embed{i}")
        record(stage, f"stage{i}")
    first = encoder.blocks[0]
    hooks.append(first.register_forward_pre_hook(lambda _m, args: seen.update(stage4_in=args[0].detach())))
    record(encoder.blocks[-1], "stage4_out")
    with torch.no_grad():
        seen["latent"], taps = encoder(fixture.image, keep)
    assert taps == []
    for hook in hooks:
        hook.remove()
    return fixture, encoder, keep, seen


def volume(tokens, edge):
    return tokens.transpose(1, 2).unflatten(2, (edge, edge, edge))


@pytest.mark.parametrize(("stage", "edge"), [(1, 48), (2, 24), (3, 12)])
def test_convolutional_stages_equal_the_authors(pretrain, stage, edge):
    fixture, encoder, _, seen = pretrain
    out = seen[f"stage{stage}"].movedim(-1, 1)
    maps = {"patch_embed": volume(seen[f"patch_embed{stage}"], edge), "stage": out}
    for name, ours in maps.items():
        fixture.check(f"{name}{stage}_stats", statistics(ours))
        step = edge // 6
        fixture.check(f"{name}{stage}_sub", ours[..., ::step, ::step, ::step])
    fusion = encoder.fusions[stage - 1]
    with torch.no_grad():
        fixture.check(f"stage{stage}_embed", fusion(patchify(out, fusion.patch_size)))


def test_transformer_and_fusion_equal_the_authors(pretrain):
    fixture, encoder, _, seen = pretrain
    with torch.no_grad():
        embedded = volume(encoder.embed(patchify(seen["stage3"].movedim(-1, 1), (2, 2, 2))), 6)
    fixture.check("patch_embed4_sub", embedded)
    fixture.check("patch_embed4_stats", statistics(embedded))
    for name in ("stage4_in", "stage4_out", "latent"):
        fixture.check(name, seen[name])


def test_the_fixture_notices_mistakes(pretrain):
    """Guards the guard: the other epsilon, tanh-GELU or no mask leave the tolerance. The transformer's epsilon does
    not show in these numbers; `test_initialisation` holds it."""
    fixture, encoder, keep, _ = pretrain
    epsilon, gelu = copy.deepcopy(encoder), copy.deepcopy(encoder)
    for module in [*epsilon.stages.modules(), *epsilon.embed.modules()]:
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    for block in gelu.blocks:
        block.mlp.act = torch.nn.GELU("tanh")
    with torch.no_grad():
        unmasked = encoder(fixture.image)[0][:, keep[0]]
        for latent in (epsilon(fixture.image, keep)[0], gelu(fixture.image, keep)[0], unmasked):
            assert (latent - fixture["latent"]).abs().max() > 2 * fixture.tolerance("latent")


def test_presets_have_the_published_sizes():
    """docs/methods.md counts the position table, the fusion convolutions and the final norm with the encoder. Of tiny
    it gives the sum: 2,658,816 for the alignment heads, the decoder of base but for the width of its first layer."""

    def size(preset, **changes):
        with torch.device("meta"):
            return sum(p.numel() for p in build_encoder(PRESETS[preset].with_(**changes)).parameters())

    assert size("convvit_base") == 33_974_544
    assert size("convvit_tiny") == 39_282_052 - 2_658_816 - (34_621_696 - (384 - 96) * 576)
    # 11 blocks: bias of 11³ offsets for 12 heads, two scales; no fusion, no norm
    fusion = 384 * (48 * 8**3 + 96 * 4**3 + 192 * 2**3 + 3)
    dense = 33_974_544 + 11 * (11**3 * 12 + 2 * 384) - fusion - 2 * 384
    assert size("convvit_base", dense=True) == dense


# ---- masking ----------------------------------------------------------------------------------------------------


def changed_where_hidden(x, keep, spec):
    """Every hidden voxel replaced."""
    hidden = hidden_voxels(keep, spec.grid, spec.patch_size[0]).movedim(-1, 1)
    return torch.where(hidden, 5 - 3 * x, x)


def test_patches_of_channels_last_maps_keep_the_layout_of_gradients():
    x = torch.rand(2, 4, 6, 8, 3, requires_grad=True)
    patches = channels_last_patches(x, (2, 2, 2))
    assert torch.equal(patches, patchify(x.movedim(-1, 1), (2, 2, 2)))
    found, values = [], torch.rand_like(patches)
    # an intermediate's gradient is as the backward pass left it
    y = x * 1
    y.register_hook(found.append)
    channels_last_patches(y, (2, 2, 2)).backward(values)
    assert found[0].is_contiguous()
    (expected,) = torch.autograd.grad(patchify(x.movedim(-1, 1), (2, 2, 2)), x, values)
    assert torch.equal(found[0], expected)


def test_hidden_voxels_mark_whole_tokens():
    hidden = hidden_voxels(torch.tensor([[0, 5], [1, 2]]), [1, 2, 3], 2)
    assert hidden.shape == (2, 2, 4, 6, 1)
    by_token = patchify(hidden.movedim(-1, 1), (2, 2, 2))
    expected = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(by_token, expected[:, :, None].expand(-1, -1, 8))


@pytest.mark.parametrize("spec", [SPEC, DEEP], ids=["one stage", "three stages"])
def test_hidden_voxels_have_no_influence(spec, monkeypatch):
    encoder = encoder_of(spec)
    keep = torch.tensor([[0, 7, 4], [11, 2, 3]])
    x = torch.rand(2, 1, *spec.img_size)
    changed = changed_where_hidden(x, keep, spec)
    with torch.no_grad():
        assert torch.equal(encoder(x, keep)[0], encoder(changed, keep)[0])
        # without the mask in the depth-wise branch they would have
        forward = ConvBlock.forward
        monkeypatch.setattr(ConvBlock, "forward", lambda self, x, hidden: forward(self, x, None))
        assert not torch.equal(encoder(x, keep)[0], encoder(changed, keep)[0])


def test_not_even_when_they_are_not_numbers():
    encoder = encoder_of(SPEC)
    keep = torch.tensor([[0, 7, 4]])
    x = torch.rand(1, 1, *SPEC.img_size)
    hidden = hidden_voxels(keep, SPEC.grid, 4).movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(encoder(x, keep)[0], encoder(x.masked_fill(hidden, math.nan), keep)[0])


def test_order_of_the_visible_tokens_is_kept():
    encoder = encoder_of(SPEC)
    x = torch.rand(2, 1, *SPEC.img_size)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    with torch.no_grad():
        raster, shuffled = encoder(x)[0], encoder(x, order)[0]
    expected = torch.stack([raster[b, order[b]] for b in range(2)])
    # attention sums over tokens in another order
    torch.testing.assert_close(shuffled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 7, 4], [11, 2, 3]])], ids=["all", "masked"])
def test_gradient_reaches_every_parameter_in_pretraining(keep):
    encoder = encoder_of(DEEP.with_(pos_embed="learned"))
    tokens, _ = encoder(torch.rand(2, 1, *DEEP.img_size), keep)
    # not a plain sum: the final norm would make its gradient zero
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- dense maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 48), (16, 48, 64)], ids=["crop of the spec", "another crop"])
def test_shapes_of_the_maps(dense, size):
    encoder = encoder_of(DEEP.with_(dense=dense, in_channels=2))
    assert isinstance(encoder, ConvViTEncoder)
    maps = encoder.feature_maps(torch.rand(2, 2, *size))
    halves = [tuple(s // f for s in size) for f in (2, 4, 8, 16)]
    assert [m.shape for m in maps] == [(2, c, *s) for c, s in zip((4, 4, 8, 12), halves, strict=True)]


def test_the_crop_must_fit():
    with pytest.raises(ValueError, match=r"\(32, 24, 48\) is not divisible by the patch \(16, 16, 16\)"):
        encoder_of(DEEP).feature_maps(torch.rand(1, 1, 32, 24, 48))


def test_the_dense_form_has_no_masked_forward():
    encoder = encoder_of(SPEC.with_(dense=True))
    with pytest.raises(ValueError, match="feature_maps, or dense=False"):
        encoder(torch.rand(1, 1, *SPEC.img_size))
    ours, theirs = set(encoder.state_dict()), set(encoder_of(SPEC).state_dict())
    scales = {f"blocks.{i}.ls{k}.gamma" for i in range(2) for k in (1, 2)}
    assert ours - theirs == {"rel_pos_bias"} | scales
    assert theirs - ours == {"fusions.0.proj.weight", "fusions.0.proj.bias", "norm.weight", "norm.bias"}


def test_the_dense_form_starts_as_the_pretrained_one():
    """No bias, unit scales: the maps are those of pretraining without a mask."""
    pretrained, dense = encoder_of(SPEC), encoder_of(SPEC.with_(dense=True))
    state = {k: v for k, v in pretrained.state_dict().items() if k in dense.state_dict()}
    dense.load_state_dict({**dense.state_dict(), **state})
    x = torch.rand(1, 1, *SPEC.img_size)
    with torch.no_grad():
        for ours, theirs in zip(dense.feature_maps(x), pretrained.feature_maps(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_relative_index_names_the_offset():
    grid = [2, 1, 3]
    index = relative_index(grid, torch.device("cpu"))
    places = [(d, h, w) for d in range(2) for h in range(1) for w in range(3)]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            d, h, w = (p - q + g - 1 for p, q, g in zip(a, b, grid, strict=True))
            assert index[i, j] == (d * 1 + h) * 5 + w


def test_relative_bias_moves_attention_and_is_resampled_for_another_crop():
    encoder = encoder_of(SPEC.with_(dense=True))
    x = torch.rand(1, 1, *SPEC.img_size)
    with torch.no_grad():
        before = encoder.feature_maps(x)[-1]
        # one constant per head changes no softmax, on this grid or a resampled one
        encoder.rel_pos_bias += torch.tensor([1.0, -2.0])
        torch.testing.assert_close(encoder.feature_maps(x)[-1], before, atol=1e-5, rtol=1e-5)
        assert all((b == torch.tensor([1.0, -2.0])[:, None, None]).all() for b in encoder._relative_biases([3, 1, 4]))
        torch.nn.init.normal_(encoder.rel_pos_bias)
        assert (encoder.feature_maps(x)[-1] - before).abs().max() > 1e-3


# ---- initialisation, memory format, precision, compilation ------------------------------------------------------


def test_initialisation():
    encoder = encoder_of(SPEC.with_(dense=True, stem_dims=(48,), embed_dim=96))
    bounds = {
        "stages.0.embed.proj.weight": math.sqrt(6 / (48 + 8)),
        "stages.0.blocks.0.pw1.weight": math.sqrt(6 / 96),
        # PyTorch's own for a convolution that reads 5³ numbers
        "stages.0.blocks.0.dw.weight": math.sqrt(1 / 125),
        "embed.proj.weight": math.sqrt(6 / (96 + 48 * 8)),
        "embed_linear.weight": math.sqrt(6 / 192),
    }
    for name, bound in bounds.items():
        assert 0.95 * bound < encoder.get_parameter(name).abs().max() <= bound, name
    assert not encoder.rel_pos_bias.any()
    assert not encoder.pos_embed.requires_grad
    assert (encoder.blocks[0].ls1.gamma == 1).all()
    eps = {name: m.eps for name, m in encoder.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {v for k, v in eps.items() if k.startswith("blocks.")} == {1e-6}
    assert {v for k, v in eps.items() if not k.startswith("blocks.")} == {1e-5}


def test_input_kernel_reads_the_image():
    vit = EncoderSpec((8, 8, 8), (4, 4, 4), 12, 2, 2, in_channels=3)
    for spec, kind in ((vit, ViTEncoder), (SPEC.with_(in_channels=3), ConvViTEncoder)):
        encoder = build_encoder(spec)
        assert isinstance(encoder, kind)
        assert encoder.get_parameter(kind.input_kernel).shape[1] == 3


def test_drop_path_rises_over_all_blocks():
    encoder = encoder_of(SPEC.with_(drop_path_rate=0.3))
    rates = [b.drop_path.drop_prob for b in encoder.stages[0].blocks]
    rates += [b.drop_path1.drop_prob for b in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_channels_last_changes_nothing():
    encoder = encoder_of(DEEP)
    x, keep = torch.rand(1, 1, *DEEP.img_size), torch.tensor([[0, 7, 4]])
    with torch.no_grad():
        expected = encoder(x, keep)[0]
        encoder = encoder.to(memory_format=torch.channels_last_3d)
        ours = encoder(x.to(memory_format=torch.channels_last_3d), keep)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 7, 4]])], ids=["maps", "masked"])
def test_compiles_without_a_graph_break(keep):
    encoder = encoder_of(SPEC.with_(dense=keep is None))
    x = torch.rand(1, 1, *SPEC.img_size)
    run = encoder.feature_maps if keep is None else lambda x: encoder(x, keep)[:1]
    with torch.no_grad():
        for ours, expected in zip(torch.compile(run, fullgraph=True, backend="eager")(x), run(x), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
