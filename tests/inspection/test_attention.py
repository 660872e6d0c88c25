"""`hiendmae attention`: exact weights, at the right place in the image."""

import json

import nibabel
import numpy as np
import pytest
import torch
from nnunet_data import save_tiny_encoder
from oblique_data import MARKED, READERS, WINDOW, marked_world, write_dataset, write_oblique, write_run
from primus_util import FULL_PRIMUS
from run_data import TINY_SPEC
from timm.models.vision_transformer import Block
from torch import nn

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.inspection.attention import decoder_cross_attention, encoder_attention
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder

# a patch is a voxel
FINE = EncoderSpec((8, 8, 8), (1, 1, 1), embed_dim=12, depth=2, num_heads=2)


def reference(query_weight, query_bias, kv_weight, kv_bias, heads, queries, keys, bias=None):
    """Attention weights by torch's own module, (heads, N, M)."""
    width = query_weight.shape[1]
    other = nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([query_weight, kv_weight]))
        other.in_proj_bias.copy_(torch.cat([query_bias, kv_bias]))
        return other(queries, keys, keys, attn_mask=bias, average_attn_weights=False)[1][0]


def of_layer(attn, x, bias=None):
    e = x.shape[2]
    w, b = attn.qkv.weight, attn.qkv.bias
    return reference(w[:e], b[:e], w[e:], b[e:], attn.num_heads, x, x, bias)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return module.eval()


@pytest.mark.parametrize("cls_token", [True, False])
def test_self_attention_is_that_of_the_block(cls_token):
    encoder = randomised(build_encoder(TINY_SPEC.with_(cls_token=cls_token)))
    image = torch.rand(1, 1, 16, 16, 16)
    prefix = int(cls_token)
    with torch.no_grad():
        tokens, kept = None, {}
        for i, block in enumerate(encoder.blocks):
            block.register_forward_pre_hook(lambda _, args, i=i: kept.__setitem__(i, args[0]))
        tokens = encoder(image)[0]
        assert tokens.shape[1] == 8 + prefix
    got = encoder_attention(encoder, image, [0, 3], query=5)
    for i, rows in zip((0, 3), got, strict=True):
        block = encoder.blocks[i]
        full = of_layer(block.attn, block.norm1(kept[i]))
        assert rows.shape == (2, 8 + prefix) and torch.allclose(rows.sum(1), torch.ones(2), atol=1e-6)
        assert torch.allclose(rows, full[:, prefix + 5], atol=1e-6)
        # not the row of a neighbour
        assert not torch.allclose(rows, full[:, prefix + 4], atol=1e-3)
    if cls_token:
        (row,) = encoder_attention(encoder, image, [1], query=None)
        block = encoder.blocks[1]
        assert torch.allclose(row, of_layer(block.attn, block.norm1(kept[1]))[:, 0], atol=1e-6)


def test_relative_positions_count():
    """As a convolutional ViT has it: no CLS, blocks are given a bias."""

    class Encoder(nn.Module):
        num_prefix_tokens, spec = 0, TINY_SPEC

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(12, 3, qkv_bias=True)])

        def feature_maps(self, x):
            return self.blocks[0](x, attn_mask=bias)

    encoder, bias, x = randomised(Encoder()), torch.randn(1, 3, 6, 6), torch.randn(1, 6, 12)
    (row,) = encoder_attention(encoder, x, [0], query=2)
    block = encoder.blocks[0]
    with torch.no_grad():
        assert torch.allclose(row, of_layer(block.attn, block.norm1(x), bias[0])[:, 2], atol=1e-6)
        assert not torch.allclose(row, of_layer(block.attn, block.norm1(x))[:, 2], atol=1e-2)


def test_register_tokens_do_not_count():
    """A primus puts them before the patches: the same rows as without them, less what they get."""
    encoder, image = randomised(build_encoder(FULL_PRIMUS)), torch.rand(1, 1, 16, 16, 16)
    (row,) = encoder_attention(encoder, image, [0], query=3)
    bare = build_encoder(FULL_PRIMUS.with_(register_tokens=0)).eval()
    bare.load_state_dict({k: v for k, v in encoder.state_dict().items() if k != "register_tokens"})
    (expected,) = encoder_attention(bare, image, [0], query=3)
    assert row.shape == (2, 8) and (row.sum(1) < 1).all()
    torch.testing.assert_close(row / row.sum(1, keepdim=True), expected)


def test_a_look_leaves_the_encoder_as_it_was(monkeypatch):
    encoder, image = randomised(build_encoder(TINY_SPEC)), torch.rand(1, 1, 16, 16, 16)
    encoder.blocks[1].attn.fused_attn = False
    with torch.no_grad():
        before = encoder.feature_maps(image)
        encoder_attention(encoder, image, [3, 1, 0], query=0)
        after = encoder.feature_maps(image)
        # an error on the way changes nothing either
        monkeypatch.setattr(encoder, "feature_maps", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder_attention(encoder, image, [0], query=0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [block.attn.fused_attn for block in encoder.blocks] == [True, False, True, True]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())


def test_cross_attention_is_that_of_the_decoder():
    method = randomised(METHODS["hiendmae"](TINY_SPEC, decoder_dim=12, self_depth=1))
    image, ids_shuffle = torch.rand(1, 1, 16, 16, 16), torch.tensor([[3, 6, 0, 1, 2, 7, 5, 4]])
    got = decoder_cross_attention(method, image, ids_shuffle, [0, 2], query=7)
    with torch.no_grad():
        tokens, taps = method.encoder(image, ids_shuffle[:, :2])
        x = method.self_blocks[0](method.queries(tokens, ids_shuffle))
        for i, block in enumerate(method.cross_blocks):
            y = method.tap_embeds[-1 - i](taps[-1 - i])
            x = x + block.self_attn(block.norm_self(x))
            cross = block.cross_attn
            full = reference(
                cross.q.weight, cross.q.bias, cross.kv.weight, cross.kv.bias, 2, block.norm_cross(x), y
            )  # fmt: skip
            if i in (0, 2):
                # token 7 is the sixth of the permutation, after CLS; visible are CLS, 3 and 6
                rows = got[i // 2]
                assert torch.allclose(rows[:, [0, 4, 7]], full[:, 6], atol=1e-6)
                assert torch.allclose(rows.sum(1), torch.ones(2), atol=1e-6)
                assert not rows[:, [1, 2, 3, 5, 6, 8]].any()
            x = x + cross(block.norm_cross(x), y)
            x = x + block.mlp(block.norm_mlp(x))


def save_seeker(path, spec=FINE, **metadata):
    """Encoder file whose tokens all look at the brightest patch: keys grow with brightness, queries are constant."""
    encoder = build_encoder(spec)
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
        encoder.patch_embed.proj.weight[2], encoder.patch_embed.proj.weight[3] = 5, -5
        encoder.patch_embed.proj.bias[:2] = torch.tensor([1.0, -1.0])
        e, per_head = spec.embed_dim, spec.embed_dim // spec.num_heads
        for block in encoder.blocks:
            block.norm1.weight.fill_(1)
            for head in range(spec.num_heads):
                block.attn.qkv.bias[head * per_head] = 60
                block.attn.qkv.weight[e + head * per_head, 2] = 1
    values = {"channel_names": ("CT",), "normalization_schemes": ("CTNormalization",), **metadata}
    volume = VolumeFormat(window_hu=WINDOW, **values)
    save_encoder(path, encoder.state_dict(), EncoderMetadata(spec, "mae3d", volume))
    return path


def attention(*arguments) -> int:
    return cli.main(["attention", *map(str, arguments)])


def brightest_world(path) -> np.ndarray:
    image = nibabel.load(path)
    values = image.get_fdata()
    return nibabel.affines.apply_affine(image.affine, np.unravel_index(values.argmax(), values.shape))


@pytest.mark.parametrize("reader", READERS)
def test_the_map_lies_on_the_image(tmp_path, reader):
    """Both ways to name a voxel lead to the same crop, and the map's peak to the marked voxel of the raw file."""
    image = write_oblique(tmp_path / "image.nii.gz")
    weights = save_seeker(tmp_path / "e.safetensors", spacing_mm=None, image_reader_writer=reader)
    asked = (MARKED[0] - 2, MARKED[1] + 2, MARKED[2] - 1)
    raw = nibabel.load(image)
    point = nibabel.affines.apply_affine(raw.affine, asked[::-1])
    common = ("-w", weights, "--image", image, "--layers", 0, "--heads")
    assert attention(*common, "mean", 1, "--voxel", *asked, "-o", tmp_path / "voxel") == 0
    assert attention(*common, "mean", "--point", *point, "-o", tmp_path / "point") == 0
    for name in ("layer00_mean", "layer00_head01"):
        made = nibabel.load(tmp_path / "voxel" / f"{name}.nii.gz")
        assert made.shape == raw.shape and np.allclose(made.affine, raw.affine, atol=1e-4)
        difference = np.linalg.solve(raw.affine[:3, :3], brightest_world(made.get_filename()) - marked_world(image))
        assert np.abs(difference).max() < 0.01
        # 8³ patches of a voxel: on the grid of the image they are as they were, so they sum to one with CLS
        record = json.loads((tmp_path / "voxel" / "attention.json").read_text())["maps"][name]
        assert made.get_fdata().sum() == pytest.approx(record["sum_over_patches"], abs=1e-5)
        assert record["sum_over_patches"] + record["on_cls"] == pytest.approx(1, abs=1e-5)
        assert (made.get_fdata() > 0).sum() <= 512
        assert (tmp_path / "voxel" / f"{name}.png").stat().st_size > 10_000
    same = (nibabel.load(tmp_path / n / "layer00_mean.nii.gz").get_fdata() for n in ("voxel", "point"))
    assert np.array_equal(*same)


def test_the_map_lies_on_the_image_after_resampling(tmp_path):
    image = write_oblique(tmp_path / "image.nii.gz", blob_mm=3.0)
    spec = FINE.with_(img_size=(24, 16, 16), patch_size=(2, 2, 2))
    weights = save_seeker(
        tmp_path / "e.safetensors", spec, spacing_mm=(1.2, 1.2, 1.2), image_reader_writer="NibabelIOWithReorient"
    )
    assert attention("-w", weights, "--image", image, "--voxel", *MARKED, "--cls", "-o", tmp_path / "out") == 0
    made = nibabel.load(tmp_path / "out" / "layer01_mean.nii.gz")
    difference = np.linalg.solve(made.affine[:3, :3], brightest_world(made.get_filename()) - marked_world(image))
    # half a voxel of the image in its plane is less than a token; along the coarse axis it is a whole one
    assert (np.abs(difference) * (0.8, 1.1, 3.0) <= 1.51).all()
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["query"] == "CLS"


def test_cross_attention_of_a_run(nnunet, tmp_path):
    image = write_dataset(nnunet, "NibabelIOWithReorient", (1.5, 1.5, 1.5))
    run = write_run(tmp_path / "run", TINY_SPEC)
    save_tiny_encoder(
        run / "encoder.safetensors", spec=TINY_SPEC, window_hu=WINDOW, image_reader_writer="NibabelIOWithReorient"
    )
    assert attention(run, "--image", image, "--voxel", *MARKED, "--cross", "-o", tmp_path / "out") == 0
    names = sorted(p.stem for p in (tmp_path / "out").glob("*.png"))
    assert names == ["cross0_layer03_mean", "cross1_layer02_mean", "cross2_layer01_mean"]
    record = json.loads((tmp_path / "out" / "attention.json").read_text())
    for about in record["maps"].values():
        assert about["sum_over_patches"] + about["on_cls"] == pytest.approx(1, abs=1e-5)
    # self-attention of the run's encoder file
    assert attention(run, "--image", image, "--voxel", *MARKED, "-o", tmp_path / "self") == 0
    assert (tmp_path / "self" / "layer03_mean.nii.gz").is_file()


@pytest.mark.parametrize("channels", [1, 2])
def test_encoder_of_unknown_images(nnunet, tmp_path, channels, caplog):
    """A converted encoder may not say how its images were normalised, nor what the channels are."""
    image = write_dataset(nnunet, "SimpleITKIO", (3.0, 1.1, 0.8))
    weights = save_tiny_encoder(
        tmp_path / "e.safetensors", spec=TINY_SPEC.with_(in_channels=channels), spacing_mm=None, window_hu=None,
        normalization_schemes=(), channel_names=(),
    )  # fmt: skip
    query = ["-w", weights, "--voxel", *MARKED, "-o", tmp_path / "out", "--image"]
    assert attention(*query, *[image] * channels) == 0
    assert "z-score" in caplog.text
    assert nibabel.load(tmp_path / "out" / "layer03_mean.nii.gz").get_fdata().max() > 0
    assert attention(*query, *[image] * (channels + 1)) == 2


def test_bad_input(nnunet, tmp_path, capsys):
    image = write_dataset(nnunet, "SimpleITKIO", (3.0, 1.1, 0.8))
    weights = save_seeker(tmp_path / "e.safetensors", spacing_mm=None)
    no_cls = save_seeker(tmp_path / "n.safetensors", FINE.with_(cls_token=False), spacing_mm=None)
    run = write_run(tmp_path / "run", TINY_SPEC, "mae3d")
    save_tiny_encoder(run / "encoder.safetensors", spec=TINY_SPEC)
    file, picture, middle = ["-w", weights], ["--image", image], ["--voxel", 8, 15, 11]
    cases = [
        ([*file, *picture, "--voxel", 8, 15, 22], "--voxel 8 15 22 is outside the image, whose array is 14 26 22"),
        ([*file, *picture, "--voxel", -1, 15, 2], "--voxel -1 15 2 is outside"),
        ([*file, *picture, "--point", 900, 0, 0], "--point 900 0 0 mm is outside"),
        ([*file, *picture, "--voxel", 8, 25, 21], "empty border"),
        ([*file, *picture, *middle, "--layers", 2], "--layers 2 does not exist, the layers of the encoder are 0 to 1"),
        ([*file, *picture, *middle, "--heads", 2], "--heads 2 does not exist, needed 0 to 1 or mean"),
        ([*file, *picture, *middle, "--heads", "max"], "--heads max does not exist"),
        ([*file, "--image", tmp_path / "none.nii.gz", *middle], "none.nii.gz is missing"),
        ([*file, "--image", image, image, *middle], "--image has 2 channels, the encoder takes 1"),
        (["-w", tmp_path / "none.safetensors", *picture, *middle], "no encoder file"),
        (["-w", no_cls, *picture, *middle, "--cls"], "has no CLS token"),
        ([run, *picture, *middle, "--cross"], "a run of mae3d, whose decoder has no cross-attention"),
        ([*file, *picture, *middle, "--cross"], "an encoder file has none"),
        ([run, *file, *picture, *middle], "not both"),
        ([*file, *picture, *middle, "--seed", -1], "--seed is -1"),
    ]
    for arguments, told in cases:
        assert attention(*arguments, "-o", tmp_path / "out") == 2, arguments
        message = capsys.readouterr().err
        assert told in message and len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "out").exists()
