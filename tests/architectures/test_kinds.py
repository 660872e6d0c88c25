"""A kind of encoder is one class: what it declares is true, and nothing else has to know it."""

import math
import re
from pkgutil import resolve_name

import pytest
import torch
from primus_util import FULL_PRIMUS

from nnunetv2_hiendmae.architectures import ENCODERS, KINDS, PRESETS, EncoderSpec, ViTEncoder, build_encoder
from nnunetv2_hiendmae.architectures.layers import Axes, axes_of
from nnunetv2_hiendmae.weights import EncoderMetadata, load_encoder, permute_axes, save_encoder

SPECS = {
    "vit": EncoderSpec((16, 24, 32), (8, 8, 8), embed_dim=12, depth=4, num_heads=2, in_channels=2),
    "convvit": EncoderSpec(
        *((32, 64, 32), (16, 16, 16), 12, 2, 2),
        kind="convvit",
        in_channels=2,
        stem_dims=(2, 4, 6),
        stem_depths=(1, 1, 1),
    ),
    "primus": FULL_PRIMUS.with_(img_size=(16, 24, 32), in_channels=2),
}


def state_of(spec):
    with torch.device("meta"):
        return build_encoder(spec).state_dict()


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_a_kind_declares_is_true_of_its_tensors(kind):
    encoder, masked = ENCODERS[kind], SPECS[kind]
    dense = masked.with_(**encoder.finetuning)
    for spec in (masked, dense):
        state = state_of(spec)
        for name, tensor in state.items():
            axes = axes_of(name, encoder.axes)
            assert (axes is Axes.KERNEL) == (tensor.ndim == 5), name
            if axes is Axes.ROTARY:
                assert tensor.shape[0] == spec.embed_dim, name
            elif axes not in (Axes.KERNEL, Axes.NONE):
                assert tensor.shape[1] == math.prod(axes.rows(spec.grid)), name
        assert state[encoder.input_kernel].shape[1] == 2
    before, after = state_of(masked).keys(), state_of(dense).keys()
    assert before - after == {k for k in before if encoder.masked_only and re.fullmatch(encoder.masked_only, k)}
    assert after - before == {k for k in after if encoder.dense_only and re.fullmatch(encoder.dense_only, k)}


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_network_of_a_kind_fits_its_steps_and_declares_its_own_tensors(kind):
    encoder, spec = ENCODERS[kind], SPECS[kind].with_(cls_token=False)
    size = tuple(p * encoder.tokens_per_step * n for p, n in zip(spec.patch_size, (1, 2, 1), strict=True))
    fields = {k: v for k, v in spec.with_(img_size=size).to_dict().items() if k != "in_channels"}
    network = resolve_name(encoder.network)(2, 3, decoder_width=4, **fields).eval()
    assert isinstance(network.encoder, encoder)
    with torch.no_grad():
        assert network(torch.rand(1, 2, *size)).shape == (1, 3, *size)
    for name, tensor in network.state_dict().items():
        if not name.startswith("encoder."):
            assert (axes_of(name, network.axes) is Axes.KERNEL) == (tensor.ndim == 5), name


def written_down():
    """Specs of every kind in all its forms, and all presets."""
    for name, preset in PRESETS.items():
        yield pytest.param(preset, id=name)
    for kind, spec in SPECS.items():
        yield pytest.param(spec, id=f"{kind}-masked")
        yield pytest.param(spec.with_(**ENCODERS[kind].finetuning), id=f"{kind}-finetuning")
        yield pytest.param(spec.with_(mlp_ratio=2.7, pos_embed="learned", depth=1, taps=None), id=f"{kind}-other")
    plain = {"register_tokens": 2, "layer_scale": None, "inner_norm": False}
    yield pytest.param(SPECS["primus"].with_(**plain), id="primus-registers")
    yield pytest.param(SPECS["vit"].with_(cls_token=False, img_size=(8, 8, 8)), id="vit-no-cls")
    yield pytest.param(SPECS["convvit"].with_(stem_dims=(5,), stem_depths=(3,), patch_size=(4,) * 3), id="one-stage")


@pytest.mark.parametrize("spec", list(written_down()))
def test_shapes_are_those_of_the_encoder_that_is_built(spec):
    built = {name: tuple(tensor.shape) for name, tensor in state_of(spec).items()}
    assert KINDS[spec.kind].tensor_shapes(spec) == built


class Toy(ViTEncoder):
    """A third kind."""

    kind = "toy"
    has_cls = False
    own_fields = ("stem_dims",)


def test_a_third_kind_is_one_class_and_two_entries(monkeypatch, tmp_path):
    fields = {"img_size": (16, 16, 8), "patch_size": (8, 8, 8), "embed_dim": 12, "depth": 4, "num_heads": 2}
    with pytest.raises(ValueError, match=r"'toy'.*\('vit', 'convvit', 'primus'\)"):
        EncoderSpec(**fields, kind="toy")
    monkeypatch.setitem(KINDS, "toy", Toy)
    monkeypatch.setitem(ENCODERS, "toy", Toy)
    spec = EncoderSpec(**fields, kind="toy", stem_dims=(3,))
    assert spec.cls_token is False and spec.taps == (1, 2, 3)
    with pytest.raises(ValueError, match=r"stem_dims.*'convvit'.*'vit'"):
        EncoderSpec(**fields, stem_dims=(3,))
    state, moved = permute_axes(build_encoder(spec).state_dict(), spec, (2, 1, 0))
    save_encoder(tmp_path / "toy.safetensors", state, EncoderMetadata(moved, "mae3d"))
    encoder, metadata = load_encoder(tmp_path / "toy.safetensors")
    assert isinstance(encoder, Toy) and metadata.spec == moved and moved.img_size == (8, 16, 16)
