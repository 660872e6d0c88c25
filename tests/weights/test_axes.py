"""Permuted weights on the permuted volume give what the authors' programs gave on the volume."""

import math
import re

import pytest
import torch
from authors_names import convvit_unetr_state, mim_sizes, unetr_state
from fixtures_util import Fixture

from nnunetv2_hiendmae.architectures import ConvViTUNETR, EncoderSpec, ViTUNETR, build_encoder
from nnunetv2_hiendmae.weights import permute_axes

ORDERS = [(2, 1, 0), (1, 2, 0)]


def permuted_volume(x, order):
    return x.permute(0, 1, *(2 + i for i in order))


def restored_volume(x, order):
    return x.permute(0, 1, *(2 + order.index(i) for i in range(3)))


@pytest.mark.parametrize("order", ORDERS)
def test_whole_unetr_of_glmae(order):
    """A crop that is no cube: every axis must go to its place."""
    fixture = Fixture("glmae_unetr")
    config = fixture.meta["config"]
    spec = {
        "patch_size": config["patch_size"],
        "embed_dim": config["embed"],
        "depth": config["depth"],
        "num_heads": config["heads"],
        "cls_token": False,
    }
    source = EncoderSpec(img_size=config["img_size"], **spec)
    state, moved = permute_axes(unetr_state(fixture.finetune_state()), source, order)
    assert moved.img_size == tuple(config["img_size"][i] for i in order)
    network = ViTUNETR(1, config["out_channels"], decoder_width=4, **{**spec, "img_size": moved.img_size})
    network.load_state_dict(state)
    with torch.no_grad():
        logits = network(permuted_volume(fixture.image, order))
    fixture.check("logits", restored_volume(logits, order))


@pytest.mark.parametrize("name", ["mim_finetune_interp"])
def test_whole_network_of_mim(name):
    """Relative positions, depth-wise kernels, bottleneck and decoder."""
    fixture, order = Fixture(name), (2, 1, 0)
    config = fixture.meta["config"]
    network = ConvViTUNETR(1, config["out_channels"], decoder_width=config["feature_size"], **mim_sizes(config)).eval()
    state, _ = permute_axes(convvit_unetr_state(fixture.finetune_state()), network.spec, order)
    network.load_state_dict(state)
    with torch.no_grad():
        logits = network(permuted_volume(fixture.image, order))
    logits = restored_volume(logits, order)
    fixture.check("logits_sub4", logits[..., ::4, ::4, ::4])
    fixture.check("logits_mid_plane", logits[:, :, logits.shape[2] // 2])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_convvit_of_an_oblong_grid(order, dense):
    """Random tables, so that relative positions are not symmetric."""
    spec = EncoderSpec(
        (32, 48, 64), (16,) * 3, 12, 2, 2, kind="convvit", stem_dims=(2, 4, 6), stem_depths=(1, 1, 1), dense=dense
    )
    torch.manual_seed(0)
    source = build_encoder(spec).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state, moved = permute_axes(source.state_dict(), spec, order)
    target = build_encoder(moved).eval()
    target.load_state_dict(state)
    x = torch.rand(1, 1, *spec.img_size)
    with torch.no_grad():
        if dense:
            for ours, theirs in zip(
                target.feature_maps(permuted_volume(x, order)), source.feature_maps(x), strict=True
            ):
                torch.testing.assert_close(restored_volume(ours, order), theirs, rtol=1e-4, atol=1e-4)
            return
        tokens = target(permuted_volume(x, order))[0].transpose(1, 2).unflatten(2, moved.grid)
        theirs = source(x)[0].transpose(1, 2).unflatten(2, spec.grid)
    torch.testing.assert_close(restored_volume(tokens, order), theirs, rtol=1e-4, atol=1e-4)


def test_patches_that_are_no_cubes_and_back_again():
    spec = EncoderSpec((16, 16, 24), (4, 8, 12), embed_dim=12, depth=1, num_heads=2, in_channels=2)
    state = build_encoder(spec).state_dict()
    there, moved = permute_axes(state, spec, (2, 1, 0))
    assert moved.img_size == (24, 16, 16) and moved.patch_size == (12, 8, 4)
    assert math.prod(there["patch_embed.proj.weight"].shape[2:]) == 4 * 8 * 12
    back, same = permute_axes(there, moved, (2, 1, 0))
    assert same == spec
    assert all(torch.equal(v, state[k]) for k, v in back.items())


def test_refuses_a_wrong_order_and_a_table_of_another_grid():
    spec = EncoderSpec((16, 16, 16), (8, 8, 8), embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"\(0, 0, 1\)"):
        permute_axes({}, spec, (0, 0, 1))
    with pytest.raises(ValueError, match=r"encoder\.pos_embed .*9 .*\(2, 2, 2\)"):
        permute_axes({"encoder.pos_embed": torch.zeros(1, 9, 12)}, spec, (2, 1, 0))


def test_a_tensor_that_nobody_declared_is_an_error():
    """Left as it is, an unknown kernel would read the volume along the wrong axes without a word."""
    spec = EncoderSpec((16, 16, 16), (8, 8, 8), embed_dim=12, depth=1, num_heads=2)
    bare, kernel = build_encoder(spec).state_dict(), torch.zeros(2, 1, 3, 3, 3)
    whole = {**{f"encoder.{k}": v for k, v in bare.items()}, "ups.0.up.weight": kernel, "head.bias": torch.zeros(2)}
    for state in (bare, whole):
        assert permute_axes(state, spec, (2, 1, 0))[0].keys() == state.keys()
    for state, name in (
        (bare, "adapter.weight"),
        (bare, "blocks.0.adapter.weight"),
        (bare, "head.weight"),
        (whole, "encoder.adapter.weight"),
        (whole, "head.scale"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*`axes`"):
            permute_axes({**state, name: kernel}, spec, (2, 1, 0))
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight .*\(12, 1, 8, 8\)"):
        permute_axes({**bare, "patch_embed.proj.weight": torch.zeros(12, 1, 8, 8)}, spec, (2, 1, 0))
