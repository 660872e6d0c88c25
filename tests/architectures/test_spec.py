"""EncoderSpec: validates itself, survives JSON, and names networks of the published size."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.architectures.spec import default_taps

CUBE = {"img_size": (32, 32, 32), "patch_size": (8, 8, 8), "embed_dim": 24, "depth": 12, "num_heads": 4}
CONVVIT = {**CUBE, "kind": "convvit", "stem_dims": (6, 12), "stem_depths": (2, 1)}


def test_defaults_and_derived_numbers():
    spec = EncoderSpec(**{**CUBE, "img_size": (16, 24, 32), "patch_size": (4, 8, 8)}, in_channels=2)
    assert spec.taps == (3, 6, 9)
    assert spec.grid == (4, 3, 4)
    assert spec.num_tokens == 48
    assert spec.patch_voxels == 4 * 8 * 8 * 2


@pytest.mark.parametrize(("depth", "taps"), [(12, (3, 6, 9)), (6, (1, 3, 4)), (4, (1, 2, 3)), (1, (0, 0, 0))])
def test_default_taps(depth, taps):
    assert default_taps(depth) == taps
    assert EncoderSpec(**{**CUBE, "depth": depth}).taps == taps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cnn"}, "unknown encoder kind 'cnn'"),
        ({"img_size": (32, 32)}, r"img_size \(32, 32\) .*D, H, W"),
        ({"patch_size": (8, 8)}, r"patch_size \(8, 8\) .*D, H, W"),
        ({"img_size": (32, 30, 32)}, r"\(32, 30, 32\) is not divisible by patch_size \(8, 8, 8\)"),
        ({"patch_size": (8, 0, 8)}, r"patch_size \(8, 0, 8\)"),
        ({"in_channels": 0}, "in_channels.* 1$"),
        ({"num_heads": 5}, "embed_dim 24 .*num_heads 5"),
        ({"taps": (3, 6, 12)}, r"taps \(3, 6, 12\) .*0\.\.11"),
        ({"taps": (6, 3, 9)}, r"taps \(6, 3, 9\)"),
        ({"pos_embed": "rope"}, "unknown pos_embed 'rope'"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate 1\.0 .*\[0, 1\)"),
        ({"stem_dims": (6, 12)}, "stem_dims.*'convvit'.*'vit'"),
        ({"stem_depths": (2, 1)}, "stem_depths.*'convvit'.*'vit'"),
        ({"dense": True}, "dense.*'convvit'.*'vit'"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderSpec(**{**CUBE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_dims": (), "stem_depths": ()}, r"stem_dims and stem_depths .* 1, got \(\) and \(\)"),
        ({"stem_depths": (2, 1, 1)}, r"stem_dims and stem_depths .*\(6, 12\) and \(2, 1, 1\)"),
        ({"stem_dims": (6, 0)}, r"stem_dims \(6, 0\)"),
        ({"stem_depths": (0, 1)}, r"stem_depths \(0, 1\)"),
        ({"patch_size": (16, 16, 16)}, r"2 convolutional stages .* need patch_size \(8, 8, 8\), got \(16, 16, 16\)"),
        ({"cls_token": True}, "'convvit'.*cls_token True"),
        ({"taps": (1, 2, 3)}, r"'convvit'.*taps \(1, 2, 3\)"),
    ],
)
def test_contradictions_of_a_convvit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderSpec(**{**CONVVIT, **changes})


def test_a_convvit_is_described_by_what_it_has():
    spec = EncoderSpec(**{**CONVVIT, "stem_dims": [6, 12]}, dense=True)
    assert (spec.stem_dims, spec.taps, spec.cls_token) == ((6, 12), (), False)
    assert EncoderSpec(**CUBE).cls_token is True
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_is_frozen_and_changes_are_validated():
    spec = EncoderSpec(**CUBE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.depth = 3
    assert spec.with_(in_channels=3).in_channels == 3
    with pytest.raises(ValueError, match=r"img_size \(30, 32, 32\) .*\(8, 8, 8\)"):
        spec.with_(img_size=(30, 32, 32))


@settings(deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 5)] * 3),
    patch=st.tuples(*[st.integers(1, 16)] * 3),
    heads=st.integers(1, 4),
    depth=st.integers(1, 12),
    channels=st.integers(1, 4),
    cls_token=st.booleans(),
)
def test_survives_json(grid, patch, heads, depth, channels, cls_token):
    spec = EncoderSpec(
        img_size=tuple(g * p for g, p in zip(grid, patch, strict=True)),
        patch_size=patch,
        embed_dim=6 * heads,
        depth=depth,
        num_heads=heads,
        in_channels=channels,
        cls_token=cls_token,
    )
    assert spec.grid == grid
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_from_dict_names_unknown_and_missing_fields():
    data = EncoderSpec(**CUBE).to_dict()
    with pytest.raises(ValueError, match=r"heads: .*3$"):
        EncoderSpec.from_dict({**data, "heads": 3})
    del data["depth"]
    with pytest.raises(ValueError, match=r"depth: "):
        EncoderSpec.from_dict(data)


def test_presets_survive_json():
    for name, spec in PRESETS.items():
        assert EncoderSpec.from_dict(spec.to_dict()) == spec, name
