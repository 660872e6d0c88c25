"""Foreign checkpoints → encoder files: parity with the recorded outputs, and the account of every tensor."""

import math
import re
from dataclasses import replace

import pytest
import torch
from fixtures_util import Fixture
from foreign_files import (
    SPECS,
    VIT,
    WITHOUT_PLAN,
    authors_name,
    authors_state,
    container,
    random_state,
    write_checkpoint,
)
from monai.networks.nets import UNETR, MaskedAutoEncoderViT, ViT
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from nnunetv2_hiendmae.architectures import ConvViTEncoder, build_encoder
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.weights import (
    ConvertOptions,
    convert_checkpoint,
    load_encoder,
    load_into,
    load_report,
    translate_checkpoint,
)

FIXTURES = {
    "hiendmae_pretrain_p12": ("hiendmae", "state_dict", 4),
    "hiendmae_finetune": ("hiendmae", "state_dict", 3),
    "glmae_encoder": ("glmae", "student", 4),
    "glmae_unetr": ("glmae", "student", 3),
    "mae3d_pretrain": ("mae3d", "model", 4),
    "mim_pretrain": ("mim", "model", 3),
    "mim_finetune": ("mim", "model", 3),
    "mim_finetune_interp": ("mim", "model", 3),
    "mim_threelevel": ("mim", "model", 3),
}
FACTS = {
    "hiendmae": ((1.5, 1.5, 1.5), (-175.0, 250.0), "NibabelIOWithReorient", "RAS", "Apache-2.0"),
    "mim": (None, (-1000.0, 1000.0), "NibabelIOWithReorient", "RAS", "none stated by the authors"),
    "glmae": (None, (-1000.0, 1000.0), "NibabelIOWithReorient", "RAS", "none stated by the authors"),
    "mae3d": (None, None, None, "unknown", "none stated by the authors"),
}


def transposed(x):
    return x.permute(0, 1, 4, 3, 2)


def raster_transposed(tokens, grid):
    """Tokens of a transposed volume in the raster order of the volume with `grid`."""
    return tokens.unflatten(1, grid[::-1]).permute(0, 3, 2, 1, 4).flatten(1, 3)


# ---- parity and accounts on the authors' own files ----------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_of_the_authors_file_is_accounted_for(name, tmp_path):
    fixture = Fixture(name)
    kind, key, heads = FIXTURES[name]
    source = fixture.write_checkpoint(tmp_path / "any name.pth")
    done = convert_checkpoint(source, tmp_path / "out" / "encoder.safetensors", ConvertOptions(num_heads=heads))
    assert done.format == kind
    content = fixture.checkpoint()
    names = [r.source for r in done.report.records if r.source]
    assert len(names) == len(set(names)) and set(content[key]) <= set(names)
    rest = {n for n in names if n not in content[key]}
    assert all(n.startswith(("teacher.", "dino_loss.")) for n in rest), rest
    with_tensors = {n.split(".")[0] for n in rest}
    assert {n for n, _ in done.report.entries} == set(content) - {key} - with_tensors
    # and every tensor of the target
    stored = load_file(done.path)
    assert sorted(stored) == sorted(r.target for r in done.report.records if r.target)
    assert {r.source for r in done.report.with_status("dropped")} == set(names) - {
        r.source for r in done.report.records if r.target
    }
    assert load_report(done.path).summary() == f"{len(stored)} loaded, 0 adapted, 0 dropped"
    meta = done.metadata
    seen = (
        meta.volume.spacing_mm,
        meta.volume.window_hu,
        meta.volume.image_reader_writer,
        meta.volume.orientation,
        meta.licence,
    )
    assert seen == FACTS[kind]
    assert meta.method == kind and meta.citations[0].startswith("@") and "(x, y, z)" in meta.notes[0]
    assert (meta.source, meta.source_sha256) == (source.name, sha256(source))
    assert meta.volume.channel_names == (("CT",) if meta.volume.window_hu else ())
    encoder, again = load_encoder(done.path)
    assert {**vars(again), "version": ""} == vars(meta)
    assert isinstance(encoder, ConvViTEncoder) == (kind == "mim")


@pytest.mark.parametrize("axes", ["dhw", "xyz"])
@pytest.mark.parametrize("grid", ["same", "grid444", "grid234"])
def test_glmae_features_for_every_grid(tmp_path, grid, axes):
    fixture = Fixture("glmae_encoder")
    source = fixture.write_checkpoint(tmp_path / "c.pth")
    done = convert_checkpoint(source, tmp_path / "e.safetensors", ConvertOptions(num_heads=4, axes=axes))
    encoder, _ = load_encoder(done.path)
    x = fixture[f"{grid}/x_u8"].float() / 255
    size = tuple(s // 16 for s in x.shape[2:])
    with torch.no_grad():
        tokens, _ = encoder(transposed(x) if axes == "xyz" else x)
    cls, patches = tokens[:, 0], tokens[:, 1:]
    positions = encoder.positions(list(size[::-1] if axes == "xyz" else size))
    if axes == "xyz":
        patches, positions = raster_transposed(patches, size), raster_transposed(positions, size)
    fixture.check(f"{grid}/cls_token", cls)
    fixture.check(f"{grid}/patch_features", patches)
    fixture.check(f"{grid}/pos_embed", positions, fixture[f"{grid}/pos_embed"][:, 1:])


def test_glmae_into_a_fine_tuning_encoder_of_another_grid(tmp_path):
    """The way of training: file → network without CLS, another crop."""
    fixture = Fixture("glmae_unetr")
    source = fixture.write_checkpoint(tmp_path / "c.pth")
    done = convert_checkpoint(source, tmp_path / "e.safetensors", ConvertOptions(num_heads=3, axes="dhw"))
    encoder = build_encoder(
        done.metadata.spec.with_(cls_token=False, pos_embed="learned", img_size=fixture.meta["config"]["img_size"])
    )
    report = load_into(encoder, done.path)
    assert [r.source for r in report.with_status("dropped")] == ["cls_token"]
    with torch.no_grad():
        out, taps = encoder(fixture.image)
    fixture.check("vit_pos_embed", encoder.pos_embed)
    fixture.check("vit_out", out)
    fixture.check("vit_skips", torch.stack(taps))


def test_mae3d_latent(tmp_path):
    fixture = Fixture("mae3d_pretrain")
    source = fixture.write_checkpoint(tmp_path / "c.pth")
    encoder, _ = load_encoder(
        convert_checkpoint(source, tmp_path / "e.safetensors", ConvertOptions(num_heads=4, axes="dhw")).path
    )
    keep = fixture["noise"].argsort(dim=1)[:, : fixture.meta["config"]["len_keep"]]
    with torch.no_grad():
        fixture.check("latent", encoder(fixture.image, keep)[0])


def test_teacher_and_student(tmp_path):
    fixture = Fixture("glmae_encoder")
    source = fixture.write_checkpoint(tmp_path / "c.pth")
    content = fixture.checkpoint()
    student = translate_checkpoint(source, ConvertOptions(num_heads=4))
    teacher = translate_checkpoint(source, ConvertOptions(num_heads=4, use_teacher=True))
    for translated, key, prefix in ((student, "student", "module."), (teacher, "teacher", "")):
        theirs = content[key][f"{prefix}backbone.blocks.1.mlp.fc1.weight"]
        assert torch.equal(translated.state["blocks.1.mlp.fc1.weight"], theirs)
    assert not torch.equal(student.state["norm.bias"], teacher.state["norm.bias"])
    assert any("teacher" in note for note in teacher.metadata.notes)
    reasons = {r.detail for r in teacher.report.records if (r.source or "").startswith("student.")}
    assert reasons == {"the student; the teacher was asked for"}
    without = Fixture("mae3d_pretrain").write_checkpoint(tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"--use-teacher: .*'teacher'"):
        translate_checkpoint(without, ConvertOptions(num_heads=4, use_teacher=True))


@pytest.mark.parametrize(("name", "kind"), [("hiendmae_pretrain_p12", "sincos"), ("hiendmae_finetune", "learned")])
def test_positions_are_fixed_or_learned(tmp_path, name, kind):
    """hiendmae_finetune scales the table by 0.02, which makes it one of its own."""
    source = Fixture(name).write_checkpoint(tmp_path / "c.pth")
    translated = translate_checkpoint(source, ConvertOptions(num_heads=FIXTURES[name][2]))
    assert translated.metadata.spec.pos_embed == kind


# ---- names and containers -----------------------------------------------------------------------------------------


def test_the_position_of_cls_is_added_to_the_token(tmp_path):
    """The CLS row is 0.5 in these files; in float16 the sum is kept in float32."""
    source = write_checkpoint(tmp_path / "c.pth", "glmae", dtype=torch.float16)
    translated = translate_checkpoint(source, ConvertOptions(num_heads=2, axes="dhw"))
    state = random_state(VIT, torch.float16)
    assert torch.equal(translated.state["cls_token"], state["cls_token"].float() + 0.5)
    record = next(r for r in translated.report.records if r.target == "cls_token")
    assert record.status == "adapted" and "row 0 of pos_embed" in record.detail
    assert torch.equal(translated.state["pos_embed"], state["pos_embed"])
    assert translated.state["norm.weight"].dtype == torch.float16


def states():
    glmae = authors_state("glmae", random_state(VIT))
    bare = {k.removeprefix("module."): v for k, v in glmae.items()}
    mae3d = authors_state("mae3d", random_state(VIT))
    other = authors_state("mae3d", random_state(VIT, seed=1))
    mim = authors_state("mim", random_state(SPECS["mim"]))
    return {
        "glmae in state_dict": ({"state_dict": glmae}, "glmae"),
        "glmae bare": (bare, "glmae"),
        "glmae student without backbone": (
            {"student": {k.replace("backbone.", ""): v for k, v in glmae.items()}},
            "glmae",
        ),
        "hiendmae without module": (
            {k.removeprefix("module."): v for k, v in authors_state("hiendmae", random_state(VIT)).items()},
            "hiendmae",
        ),
        "compiled and parallel": ({"model": {f"module._orig_mod.{k}": v for k, v in mae3d.items()}}, "mae3d"),
        "mae3d bare": (mae3d, "mae3d"),
        "model_state_dict": ({"model_state_dict": mae3d, "ema": other}, "mae3d"),
        "net": ({"net": mae3d, "averaged": other}, "mae3d"),
        "network": ({"network": mae3d, "best": other}, "mae3d"),
        "one level more": ({"checkpoint": {"model": mae3d, "epoch": 3}, "ema": {"n": 1}}, "mae3d"),
        "under a name of its own": ({"my encoder": mae3d, "args": {"lr": 1}}, "mae3d"),
        "mim without heads": ({"model": {k: v for k, v in mim.items() if "aggregate" not in k}}, "mim"),
        "timm": (authors_state("timm", random_state(VIT)), "timm"),
        "monai in unetr": (
            {
                **{f"vit.{k}": v for k, v in authors_state("monai", random_state(VIT)).items()},
                "encoder1.layer.conv1.conv.weight": torch.zeros(1, 1, 3, 3, 3),
                "out.conv.conv.bias": torch.zeros(1),
            },
            "monai",
        ),
    }


@pytest.mark.parametrize("case", states())
def test_variants_of_names_and_containers(tmp_path, case):
    content, kind = states()[case]
    torch.save(content, tmp_path / "c.pth")
    translated = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, axes="dhw"))
    assert translated.format == kind
    expected = random_state(SPECS[kind])
    if kind in ("glmae", "mae3d", "timm"):
        expected["cls_token"] += 0.5
    assert translated.state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in translated.state.items())
    assert not [r for r in translated.report.records if "unknown" in r.detail]


def test_two_encoders_a_level_deeper_are_not_chosen_from(tmp_path):
    mae3d = authors_state("mae3d", random_state(VIT))
    torch.save({"first": {"model": mae3d}, "second": {"net": mae3d}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="first, second"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


def test_what_lies_beside_a_nested_container_is_accounted_for(tmp_path):
    mae3d = authors_state("mae3d", random_state(VIT))
    content = {"checkpoint": {"model": mae3d, "epoch": 3, "ema": {"n": torch.zeros(1)}}, "lr": 0.1}
    torch.save(content, tmp_path / "c.pth")
    report = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2)).report
    assert dict(report.entries) == {"checkpoint.epoch": "3", "lr": "0.1"}
    assert "checkpoint.ema.n" in {r.source for r in report.with_status("dropped")}


def test_float64_becomes_float32(tmp_path):
    source = write_checkpoint(tmp_path / "c.pth", "hiendmae", dtype=torch.float64)
    done = convert_checkpoint(source, tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    assert {v.dtype for v in load_file(done.path).values()} == {torch.float32}
    assert all("float64 → float32" in r.detail for r in done.report.with_status("adapted"))
    assert not done.report.with_status("loaded")


def test_safetensors_are_read_too(tmp_path):
    save_file(authors_state("hiendmae", random_state(VIT)), tmp_path / "c.safetensors")
    translated = translate_checkpoint(tmp_path / "c.safetensors", ConvertOptions(num_heads=2, axes="dhw"))
    assert all(torch.equal(v, translated.state[k]) for k, v in random_state(VIT).items())


# ---- spec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width", "heads"),
    [
        ("hiendmae", 768, 12),
        ("glmae", 192, 3),
        ("mim", 96, 3),
        ("timm", 384, 6),
        ("monai", 768, 12),
        ("nnssl", 864, 12),
    ],
)
def test_released_numbers_of_heads(tmp_path, kind, width, heads):
    spec = SPECS[kind].with_(embed_dim=width, depth=1, taps=() if kind == "mim" else (0,), num_heads=heads)
    source = write_checkpoint(tmp_path / "c.pth", kind, spec, torch.float16)
    assert translate_checkpoint(source).metadata.spec.num_heads == heads
    assert translate_checkpoint(source, ConvertOptions(num_heads=1)).metadata.spec.num_heads == 1


@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_heads_are_asked_for(tmp_path, kind):
    source = write_checkpoint(tmp_path / "c.pth", kind)
    with pytest.raises(UserError, match=r"width 12 .*--num-heads"):
        translate_checkpoint(source)
    with pytest.raises(UserError, match=r"--num-heads 5 .*12"):
        translate_checkpoint(source, ConvertOptions(num_heads=5))


@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_the_grid_is_never_guessed(tmp_path, kind):
    spec = SPECS[kind]
    spec = spec.with_(img_size=tuple(p * g for p, g in zip(spec.patch_size, (4, 3, 2), strict=True)))
    source = write_checkpoint(tmp_path / "c.pth", kind, spec)
    with pytest.raises(UserError, match=r"24 .*--img-size D H W"):
        translate_checkpoint(source, ConvertOptions(num_heads=2))
    with pytest.raises(UserError, match=r"--img-size .*24 tokens"):
        translate_checkpoint(source, ConvertOptions(num_heads=2, img_size=(96, 96, 96)))
    for axes, size in (("dhw", spec.img_size), ("xyz", spec.img_size[::-1])):
        found = translate_checkpoint(source, ConvertOptions(num_heads=2, img_size=size, axes=axes)).metadata.spec
        assert found.img_size == size


# ---- timm and MONAI -----------------------------------------------------------------------------------------------


def monai_vit(spec, **changes):
    torch.manual_seed(1)
    vit = ViT(
        spec.in_channels,
        spec.img_size,
        spec.patch_size,
        spec.embed_dim,
        int(spec.embed_dim * spec.mlp_ratio),
        spec.depth,
        spec.num_heads,
        **{"proj_type": "conv", "classification": spec.cls_token, "qkv_bias": True, **changes},
    ).eval()
    for name, parameter in vit.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if vit.classification:
        # its tokens are wanted, not its classes
        del vit.classification_head
    return vit


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_monai_gives_the_same_tokens(tmp_path, proj_type, cls_token, qkv_bias):
    spec = VIT.with_(cls_token=cls_token, img_size=(8, 12, 16), in_channels=2)
    vit = monai_vit(spec, proj_type=proj_type, qkv_bias=qkv_bias)
    torch.save({f"vit.{k}": v for k, v in vit.state_dict().items()}, tmp_path / "c.pth")
    options = ConvertOptions(num_heads=2, img_size=spec.img_size)
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", options)
    encoder, metadata = load_encoder(done.path)
    assert metadata.spec.norm_eps == 1e-5 and metadata.spec.img_size == spec.img_size
    assert metadata.method == "monai" and any("--method" in n for n in metadata.notes)
    assert len(done.report.with_status("fresh")) == (0 if qkv_bias else spec.depth)
    x = torch.rand(2, 2, *spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[0], vit(x)[0], rtol=1e-5, atol=1e-5)


def test_the_bias_of_one_block_is_not_made_up(tmp_path):
    state = monai_vit(VIT).state_dict()
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.bias .*--format"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


@pytest.mark.parametrize("cls_token", [True, False])
def test_export_to_monai_loads_strictly(tmp_path, cls_token):
    spec = VIT.with_(cls_token=cls_token, img_size=(8, 12, 8))
    source = tmp_path / "t.pth"
    torch.save(authors_state("timm", random_state(spec)), source)
    options = ConvertOptions(num_heads=2, img_size=spec.img_size)
    encoder, _ = load_encoder(convert_checkpoint(source, tmp_path / "e.safetensors", options).path)
    done = convert_checkpoint(tmp_path / "e.safetensors", tmp_path / "m.safetensors", to="monai")
    assert len(done.report.with_status("fresh")) == 2 * spec.depth
    vit = monai_vit(spec)
    vit.load_state_dict(load_file(done.path))
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    x = torch.rand(2, 1, *spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(vit(x)[0], encoder(x)[0], rtol=1e-5, atol=1e-5)


class Embed3D(torch.nn.Module):
    """What timm's 2D ViT needs for volumes: patches by a convolution, as tokens."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **_):
        super().__init__()
        self.proj = torch.nn.Conv3d(in_chans, embed_dim, patch_size, patch_size)
        self.num_patches = math.prod(s // p for s, p in zip(img_size, patch_size, strict=True))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("cls_token", [True, False])
def test_export_to_timm_loads_strictly(tmp_path, cls_token):
    spec = VIT.with_(cls_token=cls_token, img_size=(8, 12, 16), in_channels=2)
    torch.save(authors_state("timm", random_state(spec)), tmp_path / "c.pth")
    options = ConvertOptions(num_heads=2, img_size=spec.img_size)
    encoder, _ = load_encoder(convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", options).path)
    done = convert_checkpoint(tmp_path / "e.safetensors", tmp_path / "t.safetensors", to="timm")
    vit = VisionTransformer(
        img_size=spec.img_size,
        patch_size=spec.patch_size,
        in_chans=spec.in_channels,
        num_classes=0,
        global_pool="token" if cls_token else "avg",
        class_token=cls_token,
        fc_norm=False,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        embed_layer=Embed3D,
    ).eval()
    vit.load_state_dict(load_file(done.path))
    x = torch.rand(2, 2, *spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(x), encoder(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("to", ["timm", "monai"])
def test_export_and_back_is_the_same_encoder(tmp_path, to, positions):
    """What names cannot tell (heads, an oblong grid, what it saw) travels in the header."""
    spec = VIT.with_(img_size=(8, 12, 4))
    state = random_state(spec)
    if positions == "sincos":
        # of the source's axes: turned round it is no longer the formula, and is fixed all the same
        state["pos_embed"] = sincos_positions(spec.grid, spec.embed_dim)
    source = tmp_path / "h.pth"
    torch.save(container("hiendmae", authors_state("hiendmae", state)), source)
    options = ConvertOptions(num_heads=2, img_size=spec.img_size[::-1])
    first = convert_checkpoint(source, tmp_path / "a.safetensors", options)
    exported = convert_checkpoint(first.path, tmp_path / "b.safetensors", to=to)
    assert exported.format == "encoder"
    back = convert_checkpoint(exported.path, tmp_path / "c.safetensors")
    assert back.format == to
    before, after = load_file(first.path), load_file(back.path)
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    # also what was converted first of all, and that its positions are fixed
    assert first.metadata.source == "h.pth" and first.metadata.source_sha256 == sha256(source)
    assert first.metadata.spec.pos_embed == positions
    assert vars(back.metadata) == {**vars(first.metadata), "version": back.metadata.version}


def test_timm_names_have_a_row_for_cls(tmp_path):
    source = write_checkpoint(tmp_path / "h.pth", "hiendmae")
    done = convert_checkpoint(source, tmp_path / "t.safetensors", ConvertOptions(num_heads=2, axes="dhw"), to="timm")
    table = load_file(done.path)["pos_embed"]
    assert table.shape == (1, 9, 12) and not table[:, 0].any()
    assert torch.equal(table[:, 1:], random_state(VIT)["pos_embed"])
    record = next(r for r in done.report.records if r.target == "pos_embed")
    assert record.source == authors_name("hiendmae", "pos_embed") and record.status == "adapted"


def test_a_convvit_has_no_such_names(tmp_path):
    source = write_checkpoint(tmp_path / "m.pth", "mim")
    with pytest.raises(UserError, match=r"--to timm: .*'convvit'.*--to"):
        convert_checkpoint(source, tmp_path / "t.safetensors", ConvertOptions(num_heads=2), to="timm")
    assert not (tmp_path / "t.safetensors").exists()


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("timm", "blocks.0.ls1.gamma", "{name} .*a {kind} encoder .*--format"),
        ("timm", "norm_pre.weight", "{name} .*a {kind} encoder .*--format"),
        ("timm", "reg_token", "{name} .*a {kind} encoder .*--format"),
        ("timm", "blocks.0.attn.q_norm.weight", "{name} .*a {kind} encoder .*--format"),
        ("hiendmae", "module.encoder.blocks.12.norm1.weight", r"blocks\.2 .*download"),
        ("hiendmae", "module.encoder.anything", "{name} .*a {kind} encoder .*--format"),
        ("mim", "blocks4.0.gamma_1", "{name} .*a {kind} encoder .*--format"),
        ("mim", "blocks4.0.attn.relative_position_bias_table", "{name} .*a {kind} encoder .*--format"),
        ("monai", "blocks.0.attn.rel_pos_embedding.rel_pos_d", "{name} .*a {kind} encoder .*--format"),
        ("glmae", "module.backbone.norm_pre.bias", "{name} .*a {kind} encoder .*--format"),
    ],
)
def test_what_would_change_the_output_is_never_dropped(tmp_path, kind, name, told):
    state = authors_state(kind, random_state(SPECS[kind]))
    state[name] = torch.ones(12)
    torch.save(container(kind, state), tmp_path / "c.pth")
    with pytest.raises(UserError, match=told.format(name=re.escape(name), kind=kind)):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


def test_what_is_outside_the_encoder_is_named(tmp_path):
    """A known head is dropped wherever it is; anything else only beside an encoder with a prefix of its own."""
    for kind, name, reason in (("timm", "projector.0.weight", "a head of"), ("glmae", "module.ema.x", "a prefix of")):
        state = authors_state(kind, random_state(VIT))
        state[name] = torch.ones(12)
        torch.save(container(kind, state), tmp_path / "c.pth")
        report = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2)).report
        record = next(r for r in report.records if r.source == name)
        assert record.status == "dropped" and reason in record.detail
        assert reason in report.text()


@pytest.mark.parametrize("kind", ["mim", "mae3d", "timm", "monai"])
def test_unknown_tensors_are_errors_where_the_encoder_has_no_prefix(tmp_path, kind):
    state = authors_state(kind, random_state(SPECS[kind]))
    state["adapter.down.weight"] = torch.ones(12)
    torch.save(container(kind, state), tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"adapter\.down\.weight .*{kind} .*--format"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.zeros(3), "conv.bias": torch.zeros(3)}, r"conv\.weight, conv\.bias; "),
        ({"weights": {"a": torch.zeros(1)}}, "'weights' with a; "),
        ({"model": {f"layers.{i}": torch.zeros(1) for i in range(9)}}, r"'model' with layers\.0.* and 4 more"),
    ],
)
def test_unknown_kinds_list_what_was_found(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=message) as caught:
        translate_checkpoint(tmp_path / "c.pth")
    assert "hiendmae, mim, monai, glmae, mae3d, timm" in str(caught.value)


def test_a_2d_vit_is_refused(tmp_path):
    state = authors_state("timm", random_state(VIT))
    state["patch_embed.proj.weight"] = torch.zeros(12, 3, 4, 4)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight .*\(12, 3, 4, 4\).* 5 axes.*2D"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


# ---- prefixes, and files that may be of two formats ------------------------------------------------------------------

PREFIXES = ["model.", "net.", "network.", "backbone.", "encoder.", "vit.", "module.model.", "a.b.c."]
# what GL-MAE and others call what they keep
AMBIGUOUS = ["backbone.", "student_backbone.", "model.backbone."]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["monai", "mae3d", "timm", "mim"])
def test_any_prefix_is_taken_off_and_told(tmp_path, kind, prefix, beside):
    """That of all tensors, or that of the encoder alone beside a head."""
    state = {f"{prefix}{k}": v for k, v in authors_state(kind, random_state(SPECS[kind])).items()}
    if beside:
        state["fc.weight"], state["ema.n"] = torch.zeros(3), torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    said = kind if prefix == "backbone." else None
    done = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, axes="dhw", format=said))
    assert done.format == kind
    plain = write_checkpoint(tmp_path / "p.pth", kind)
    expected = translate_checkpoint(plain, ConvertOptions(num_heads=2, axes="dhw", format=said))
    assert all(torch.equal(v, done.state[k]) for k, v in expected.state.items())
    assert len(done.report.records) == len(expected.report.records) + 2 * beside
    own = prefix.removeprefix("module.")
    told = any(own in note for note in done.notes)
    assert told == (not (kind == "monai" and own == "vit."))


@pytest.mark.parametrize(
    ("key", "prefix"), [*(("state_dict", p) for p in AMBIGUOUS), ("teacher", ""), ("student", "module.backbone.")]
)
@pytest.mark.parametrize("head", [False, True])
def test_what_may_be_of_glmae_or_not_is_asked(tmp_path, key, prefix, head):
    """As lightly and DINO save a ViT of timm."""
    state = random_state(VIT)
    state["pos_embed"] = torch.cat([state["cls_token"], state["pos_embed"]], dim=1)
    state = {f"{prefix}{k}": v for k, v in state.items()}
    state |= {"head.mlp.0.bias": torch.zeros(3)} if head else {}
    torch.save({key: state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"x y z.*--format glmae\b.*z y x.*--format timm\b"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
    for name, axes, window in (("glmae", "xyz", (-1000.0, 1000.0)), ("timm", "dhw", None), ("mae3d", "xyz", None)):
        done = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, format=name))
        assert (done.format, done.metadata.volume.window_hu) == (name, window)
        kernel = random_state(VIT)["patch_embed.proj.weight"]
        kernel = kernel.permute(0, 1, 4, 3, 2) if axes == "xyz" else kernel
        assert torch.equal(done.state["patch_embed.proj.weight"], kernel)


def test_two_encoders_of_one_state_dict_are_not_chosen_from(tmp_path):
    state = authors_state("timm", random_state(VIT))
    torch.save({f"{p}.{k}": v for p in ("first", "second") for k, v in state.items()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"first\., second\.: "):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_monais_masked_autoencoder_gives_the_same_tokens(tmp_path, qkv_bias):
    torch.manual_seed(0)
    size = (8, 16, 12)
    vit = MaskedAutoEncoderViT(
        1, size, 4, 24, 48, 3, 2, 0.5, 12, 24, 2, 2, decoder_pos_embed_type="sincos", qkv_bias=qkv_bias
    ).eval()
    for name, parameter in vit.named_parameters():
        if name.endswith("bias") or "norm" in name or name.startswith("blocks.3"):
            torch.nn.init.normal_(parameter, std=0.5)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "c.pth")
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    assert done.metadata.spec.img_size == size and done.metadata.spec.pos_embed == "sincos"
    assert {r.source.partition(".")[0] for r in done.report.with_status("dropped")} == {
        *("mask_tokens", "decoder_pos_embedding", "decoder_embed", "decoder_blocks", "decoder_pred", "blocks"),
    }
    x = torch.rand(2, 1, *size)
    with torch.no_grad():
        tokens = vit.patch_embedding(x)
        expected = vit.blocks(torch.cat([vit.cls_token.expand(2, -1, -1), tokens], dim=1))
        torch.testing.assert_close(load_encoder(done.path)[0](x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 32, 64), (8, 8, 24), (24, 16, 16), (16, 16, 16)])
def test_monais_sincos_positions_tell_their_grid(tmp_path, size):
    """Its channels go axis 1, 0, 2; the table stays as it is."""
    vit = monai_vit(VIT.with_(img_size=size, patch_size=(8, 8, 8), embed_dim=24), pos_embed_type="sincos")
    torch.save(vit.state_dict(), tmp_path / "c.pth")
    done = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
    assert (done.metadata.spec.img_size, done.metadata.spec.pos_embed) == (size, "sincos")
    assert torch.equal(done.state["pos_embed"], vit.state_dict()["patch_embedding.position_embeddings"])


def test_what_older_versions_of_monai_never_used_is_dropped(tmp_path):
    state = UNETR(1, 2, (32, 32, 32), 4, 12, 24, 2).state_dict()
    state |= {"vit.patch_embedding.cls_token": torch.zeros(1, 1, 12), "linear_1.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    done = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
    reasons = {r.source: r.detail for r in done.report.with_status("dropped")}
    assert "never used" in reasons["vit.patch_embedding.cls_token"] and "head" in reasons["linear_1.weight"]
    assert "decoder" in reasons["encoder1.layer.conv1.conv.weight"]


@pytest.mark.parametrize("patch", [(8, 8, 4), (4, 4, 4)])
def test_a_matrix_over_patches_says_all_that_it_hides(tmp_path, patch):
    spec = VIT.with_(img_size=(16, 8, 8), patch_size=patch, in_channels=2, cls_token=False)
    vit = monai_vit(spec, proj_type="perceptron")
    torch.save(vit.state_dict(), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"--(patch|img)-size .*--(patch|img)-size .*--num-heads H"):
        translate_checkpoint(tmp_path / "c.pth")
    given = ConvertOptions(num_heads=2, img_size=spec.img_size)
    if patch == (8, 8, 4):
        with pytest.raises(UserError, match=r"--patch-size D H W$"):
            translate_checkpoint(tmp_path / "c.pth", given)
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", replace(given, patch_size=patch))
    assert done.metadata.spec.patch_size == patch
    x = torch.rand(2, 2, *spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(done.path)[0](x)[0], vit(x)[0], rtol=1e-5, atol=1e-5)


def test_another_patch_than_the_kernels_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "c.pth", "timm")
    with pytest.raises(UserError, match=r"--patch-size .*\(4, 4, 4\)"):
        translate_checkpoint(source, ConvertOptions(num_heads=2, patch_size=(8, 8, 8)))


@pytest.mark.parametrize("ratios", [(2, 3, 4, 4), (4, 4, 4, 2)])
def test_mlp_ratios_that_differ_by_stage_are_told(tmp_path, ratios):
    state = authors_state("mim", random_state(SPECS["mim"]))
    for stage, (ratio, width) in enumerate(zip(ratios, (2, 4, 6, 12), strict=True), 1):
        for leaf in ("fc1.weight", "fc1.bias"):
            for block in range(2 if stage == 4 else 1):
                name = f"blocks{stage}.{block}.mlp.{leaf}"
                state[name] = state[name][: ratio * width]
    torch.save({"model": state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"ratios of its stages differ \({', '.join(map(str, ratios))}\)"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_damage_is_told_first_then_all_that_is_needed(tmp_path, kind):
    spec = SPECS[kind]
    spec = spec.with_(img_size=tuple(p * g for p, g in zip(spec.patch_size, (4, 3, 2), strict=True)))
    state = random_state(spec)
    torch.save(container(kind, authors_state(kind, state)), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"--img-size D H W.*--num-heads H"):
        translate_checkpoint(tmp_path / "c.pth")
    name = "blocks.1.norm2.bias"
    for damaged in (state[name][:5], torch.full((12,), float("nan"))):
        torch.save(container(kind, authors_state(kind, {**state, name: damaged})), tmp_path / "c.pth")
        with pytest.raises(UserError, match=r"norm2\.bias (has shape \(5,\)|holds NaN)") as caught:
            translate_checkpoint(tmp_path / "c.pth")
        assert "--num-heads" not in str(caught.value)
