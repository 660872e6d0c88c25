"""Primus files of nnssl and nnU-Net: recorded features, both orders of tokens, other crops, masked passes, and every
way in which a file can say too little or something wrong."""

import json
import re

import pytest
import torch
from foreign_files import write_checkpoint
from primus_util import PrimusFixture

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import build_encoder
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import ConvertOptions, convert_checkpoint, load_encoder, load_into
from nnunetv2_hiendmae.weights.convert import translate_checkpoint

# fixture, its part, checkpoint, order of its tokens, is the number of heads in the file
RECORDED = [
    ("nnssl_evamae", "", "checkpoint.pth", "hwd", False),
    ("nnssl_voco", "", "checkpoint.pth", "hwd", False),
    ("nnssl_simmim", "", "checkpoint.pth", "whd", False),
    ("nnfoundation_vit", "large", "checkpoint_large.pth", "whd", True),
    ("nnfoundation_vit", "small", "checkpoint_small.pth", "whd", True),
    ("primus_dna", "plain", "checkpoint_plain.pth", "whd", False),
    ("primus_dna", "reg", "checkpoint_reg.pth", "whd", False),
]
MASKED = ("nnssl_evamae", "nnfoundation_vit")
recorded = pytest.mark.parametrize(("name", "tag", "file", "order", "knows_heads"), RECORDED, ids=lambda v: str(v))


def hints(fixture, knows_heads):
    spec = fixture.spec
    # nnU-Net's fixtures have no plans
    crop = spec.img_size if "dna" in fixture.path.name else None
    return ConvertOptions(num_heads=None if knows_heads else spec.num_heads, img_size=crop)


def converted(fixture, file, tmp_path, options):
    source = fixture.write(tmp_path / file, file)
    done = convert_checkpoint(source, tmp_path / "encoder.safetensors", options)
    return done, load_encoder(done.path)[0]


def places(fixture, order):
    """Sequence indices of the recording → raster numbers of the same cells."""
    g0, g1, g2 = fixture.config["grid"]
    raster = torch.arange(g0 * g1 * g2).reshape(g0, g1, g2)
    return (raster.transpose(0, 1) if order == "hwd" else raster).reshape(-1)


@recorded
@torch.no_grad()
def test_features_are_the_recorded_ones(name, tag, file, order, knows_heads, tmp_path):
    fixture = PrimusFixture(name, tag)
    done, encoder = converted(fixture, file, tmp_path, hints(fixture, knows_heads))
    spec = done.metadata.spec
    assert spec == fixture.spec and any(note.startswith(f"token order {order}: ") for note in done.metadata.notes)
    features = encoder.feature_maps(fixture.image)[-1]
    prefix = "full/" if "dna" not in name else ""
    fixture.check(f"{prefix}features", features)
    for i, block in enumerate(every_block(encoder).feature_maps(fixture.image)[:-1]):
        if fixture[f"{prefix}block_{i}"] is not None:
            fixture.check(f"{prefix}block_{i}", block)
    if fixture["embed"] is not None:
        fixture.check("embed", torch.nn.functional.conv3d(fixture.image, *patches(encoder), stride=spec.patch_size))
    naive = fixture["naive/features"]
    if naive is not None:
        assert (features - naive).norm() > 0.5 * naive.norm()


def every_block(encoder):
    """The same encoder, each of its blocks a tap."""
    tapped = build_encoder(encoder.spec.with_(taps=tuple(range(encoder.spec.depth)))).eval()
    tapped.load_state_dict(encoder.state_dict())
    return tapped


def patches(encoder):
    return encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias


@pytest.mark.parametrize(("name", "tag", "file", "order", "knows_heads"), [r for r in RECORDED if r[0] in MASKED])
@torch.no_grad()
def test_masked_passes(name, tag, file, order, knows_heads, tmp_path):
    """Kept indices count in the recording's order; the cells that were seen are the truth."""
    fixture = PrimusFixture(name, tag)
    _, encoder = converted(fixture, file, tmp_path, hints(fixture, knows_heads))
    keep = places(fixture, order)[fixture["masked/keep_indices"]]
    seen = torch.zeros_like(fixture["masked/visible"]).flatten(1).scatter(1, keep, 1)
    assert torch.equal(seen, fixture["masked/visible"].flatten(1))
    tokens, blocks = every_block(encoder)(fixture.image, keep)
    fixture.check("masked/encoded", tokens)
    for i, block in enumerate(blocks):
        if fixture[f"masked/block_{i}"] is not None:
            fixture.check(f"masked/block_{i}", block)


@torch.no_grad()
def test_simmims_masked_image(tmp_path):
    """Its mask tokens take the place of embedded patches; all tokens stay."""
    fixture = PrimusFixture("nnssl_simmim")
    _, encoder = converted(fixture, "checkpoint.pth", tmp_path, ConvertOptions(num_heads=2))
    hidden, token = fixture["masked/visible"].flatten(1) == 0, fixture.content()["network_weights"]["mask_token"]
    encoder.patch_embed.register_forward_hook(lambda _, __, tokens: torch.where(hidden[:, :, None], token, tokens))
    fixture.check("masked/features", encoder.feature_maps(fixture.image)[-1])


@torch.no_grad()
def test_another_crop_of_reordered_weights_and_the_training_form(tmp_path):
    fixture = PrimusFixture("nnssl_evamae")
    _, encoder = converted(fixture, "checkpoint.pth", tmp_path, ConvertOptions(num_heads=3))
    fixture.check("other/features", encoder.feature_maps(fixture.image_of("other/x_u8"))[-1])
    # resizing the positions first and loading them then is the same
    resized = build_encoder(encoder.spec.with_(img_size=(24, 40, 16))).eval()
    load_into(resized, tmp_path / "encoder.safetensors")
    fixture.check("other/features", resized.feature_maps(fixture.image_of("other/x_u8"))[-1])
    (tmp_path / "training").mkdir()
    done, encoder = converted(fixture, "checkpoint_training.pth", tmp_path / "training", ConvertOptions(num_heads=1))
    fixture.check("training/features", encoder.feature_maps(fixture.image_of("training/x_u8"))[-1])
    assert "BaseEvaMAETrainer is no SimMIM" in done.metadata.notes[0]


@torch.no_grad()
def test_the_wrong_order_is_far_off_and_only_taken_when_asked_for(tmp_path):
    fixture = PrimusFixture("nnfoundation_vit", "large")
    options = ConvertOptions(token_order="hwd")
    done, encoder = converted(fixture, "checkpoint_large.pth", tmp_path, options)
    right = fixture["full/features"]
    assert (encoder.feature_maps(fixture.image)[-1] - right).norm() > 0.8 * right.norm()
    assert done.metadata.notes[0] == "token order hwd: you said so"
    mae = PrimusFixture("nnssl_evamae")
    options = ConvertOptions(num_heads=3, token_order="whd")
    source = mae.write(tmp_path / "m.pth")
    encoder = load_encoder(convert_checkpoint(source, tmp_path / "n.safetensors", options).path)[0]
    mae.check("naive/features", encoder.feature_maps(mae.image)[-1])


def test_every_tensor_is_accounted_for(tmp_path):
    for name, tag, file, _, knows_heads in RECORDED:
        fixture = PrimusFixture(name, tag)
        source = fixture.write(tmp_path / f"{name}{file}", file)
        done = translate_checkpoint(source, hints(fixture, knows_heads))
        weights = fixture.content(file)["network_weights"]
        told = [r.source for r in done.report.records]
        assert sorted(told) == sorted(weights), name
        ignored = [pattern.replace(".*", r"\..*") for pattern in fixture.meta.get("ignored", ["mask_token"])]
        dropped = {r.source for r in done.report.with_status("dropped")}
        assert all(any(re.fullmatch(p, n) for n in dropped) for p in ignored if ".*" not in p)
        assert not {n for n in dropped if "eva." in n or "down_projection" in n}
        with pytest.raises(UserError, match="would be lost"):
            content = fixture.content(file)
            content["network_weights"][f"{'encoder.' * ('voco' in name)}eva.blocks.0.attn.extra.weight"] = torch.ones(3)
            torch.save(content, tmp_path / "x.pth")
            translate_checkpoint(tmp_path / "x.pth", hints(fixture, knows_heads))


def test_what_the_plan_says_of_images_licence_and_citations(tmp_path):
    mae, options = PrimusFixture("nnssl_evamae"), ConvertOptions(num_heads=3)
    metadata = translate_checkpoint(mae.write(tmp_path / "m.pth"), options).metadata
    zscore = {"normalization_schemes": ("ZScoreNormalization",), "image_reader_writer": "SimpleITKIO"}
    assert metadata.volume == VolumeFormat((1.0, 1.0, 1.0), orientation="as SimpleITKIO reads it", **zscore)
    assert metadata.volume.scheme_of_all == "ZScoreNormalization" and metadata.method == "nnssl"
    assert len(metadata.citations) == 3 and metadata.citations[2].startswith("@article{wald2024openmind")
    assert metadata.licence.startswith("CC-BY-4.0 ") and metadata.source == "m.pth"
    foundation = PrimusFixture("nnfoundation_vit", "large")
    metadata = translate_checkpoint(foundation.write(tmp_path / "f.pth", "checkpoint_large.pth")).metadata
    assert metadata.volume.spacing_mm is None and metadata.licence.startswith("CC-BY-SA-4.0 ")
    assert any("noresample" in note and "--spacing" in note for note in metadata.notes)
    simmim = PrimusFixture("nnssl_simmim")
    notes = translate_checkpoint(simmim.write(tmp_path / "s.pth"), ConvertOptions(num_heads=2)).metadata.notes
    assert any("[160, 160, 160]" in note and "--patch-size" in note for note in notes)
    content = mae.content()
    del content["citations"]
    torch.save(content, tmp_path / "c.pth")
    cited = translate_checkpoint(tmp_path / "c.pth", options).metadata.citations
    assert any("2503.01835" in text for text in cited) and any("2412.17041" in text for text in cited)


@pytest.mark.parametrize(("order", "interpolation"), [(3, "nnunet"), (2, None)])
def test_how_images_were_resampled(tmp_path, order, interpolation):
    def change(content):
        configuration = next(iter(plan_of(content)["pretrain_plan"]["configurations"].values()))
        configuration["resampling_fn_data_kwargs"]["order"] = order

    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, change)
    metadata = translate_checkpoint(source, ConvertOptions(num_heads=3)).metadata
    assert metadata.volume.interpolation == interpolation


@pytest.mark.parametrize("scheme", ["NoNormalization", "CTNormalization", "SomethingElse"])
def test_normalisations_that_nnunet_cannot_do_alike(tmp_path, scheme):
    def change(content):
        next(iter(plan_of(content)["pretrain_plan"]["configurations"].values()))["normalization_schemes"] = [scheme]

    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, change)
    metadata = translate_checkpoint(source, ConvertOptions(num_heads=3)).metadata
    assert metadata.volume.scheme_of_all == (scheme if scheme == "NoNormalization" else None)
    assert sum(scheme in note for note in metadata.notes) == 1


def changed(fixture, tmp_path, change, file="checkpoint.pth"):
    """A file of a fixture after `change(content)`, which may give another content."""
    content = fixture.content(file)
    content = change(content) or content
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def plan_of(content):
    return content["nnssl_adaptation_plan"]


def without_decoder(content):
    weights = content["network_weights"]
    content["network_weights"] = {k: v for k, v in weights.items() if not k.startswith("decoder.")}


def test_a_file_that_cannot_tell_its_order_is_asked_about(tmp_path):
    """SimMIM's looks like VolumeFusion's, without the trainer's name."""
    fixture, options = PrimusFixture("nnssl_simmim"), ConvertOptions(num_heads=2)
    source = changed(fixture, tmp_path, lambda c: c.pop("trainer_name") and None)
    with pytest.raises(UserError, match=r"order of its tokens.*--token-order hwd or --token-order whd"):
        translate_checkpoint(source, options)
    told = ConvertOptions(num_heads=2, token_order="whd")
    state = translate_checkpoint(source, told).state
    original = translate_checkpoint(fixture.write(tmp_path / "o.pth"), options).state
    assert all(torch.equal(v, state[k]) for k, v in original.items())
    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, without_decoder)
    with pytest.raises(UserError, match="order of its tokens"):
        translate_checkpoint(source, ConvertOptions(num_heads=3))
    # a bare state_dict says nothing at all
    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, lambda c: c["network_weights"])
    with pytest.raises(UserError, match="order of its tokens"):
        translate_checkpoint(source, ConvertOptions(num_heads=3))
    options = ConvertOptions(num_heads=3, token_order="hwd", format="nnssl")
    assert translate_checkpoint(source, options).format == "nnssl"


def test_the_prefix_tells_voco_without_its_trainer(tmp_path):
    fixture = PrimusFixture("nnssl_voco")
    source = changed(fixture, tmp_path, lambda c: c.pop("trainer_name") and None)
    done = translate_checkpoint(source, ConvertOptions(num_heads=2))
    assert "VoCo, SimCLR and SwinUNETR" in done.metadata.notes[0]
    assert any("prefix encoder." in note for note in done.metadata.notes)


@torch.no_grad()
@pytest.mark.parametrize("key", ["eva", "encoder.eva", None])
def test_a_plan_whose_key_has_another_prefix_than_the_tensors(tmp_path, key):
    """Released plans were added by a tool that never writes the prefix."""
    fixture = PrimusFixture("nnssl_voco")

    def change(content):
        plan_of(content)["key_to_encoder"] = key
        if key is None:
            del plan_of(content)["key_to_encoder"]

    source = changed(fixture, tmp_path, change)
    done = convert_checkpoint(source, tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    fixture.check("full/features", load_encoder(done.path)[0].feature_maps(fixture.image)[-1])


@pytest.mark.parametrize("key", ["eva", "encoder.eva", "student.eva"])
def test_two_encoders_in_one_file(tmp_path, key):
    fixture = PrimusFixture("nnssl_evamae")

    def change(content):
        plan_of(content)["key_to_encoder"] = key
        weights = content["network_weights"]
        weights |= {f"encoder.{k}": v + 1 for k, v in weights.items() if k.startswith(("eva", "down_projection"))}

    source, options = changed(fixture, tmp_path, change), ConvertOptions(num_heads=3)
    if key == "student.eva":
        with pytest.raises(UserError, match=r"prefixes '' and 'encoder\.': which is meant"):
            translate_checkpoint(source, options)
        return
    done = translate_checkpoint(source, options)
    one = fixture.content()["network_weights"]["down_projection.proj.bias"] + (key != "eva")
    assert torch.equal(done.state["patch_embed.proj.bias"], one)
    assert len(done.report.with_status("dropped")) == 37 + 74


def test_tuples_and_lists_are_the_same(tmp_path):
    fixture, options = PrimusFixture("nnssl_evamae"), ConvertOptions(num_heads=3)
    text = (fixture.path / "adaptation_plan.json").read_text(encoding="utf-8")
    lists = changed(fixture, tmp_path, lambda c: c.update(nnssl_adaptation_plan=json.loads(text)))
    ours, theirs = (translate_checkpoint(p, options) for p in (lists, fixture.write(tmp_path / "t.pth")))
    assert ours.metadata.spec == theirs.metadata.spec and ours.metadata.notes == theirs.metadata.notes


def test_a_grid_that_no_order_can_mend(tmp_path):
    fixture = PrimusFixture("nnssl_voco")

    def change(content):
        plan_of(content)["pretrain_patch_size"] = [32, 16, 32]

    with pytest.raises(UserError, match=r"order hwd on a grid of \(4, 2, 4\).*--token-order whd"):
        translate_checkpoint(changed(fixture, tmp_path, change), ConvertOptions(num_heads=2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p["architecture_plans"].update(arch_class_name="ResEncL"), "nnssl's ResEncL, needed a Primus"),
        (lambda p: p["architecture_plans"].update(arch_class_name="NoSkipResEncL"), "nnssl's NoSkipResEncL"),
        (lambda p: p["architecture_plans"].update(arch_class_name=3), "damaged.*arch_class_name"),
        (lambda p: p.pop("pretrain_plan"), "damaged.*pretrain_plan"),
        (lambda p: p["pretrain_plan"].update(configurations={}), "damaged.*configurations"),
        (lambda p: p["pretrain_plan"].update(transpose_forward=[0, 0, 1]), r"\[0, 0, 1\], which is no order"),
        (lambda p: p["pretrain_plan"]["configurations"]["onemmiso"].update(spacing=[1, 0, 1]), "damaged.*spacing"),
        (lambda p: p["pretrain_plan"]["configurations"]["onemmiso"].update(patch_size=[40, 32, 32]), "64 positions"),
        (lambda p: p["architecture_plans"].update(arch_class_name="PrimusX"), "arch_kwargs.*damaged"),
    ],
)
def test_damaged_plans_and_other_networks_are_named(tmp_path, change, told):
    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, lambda c: change(plan_of(c)) and None)
    with pytest.raises(UserError, match=told) as caught:
        translate_checkpoint(source, ConvertOptions(num_heads=3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(16, 16, 128), (64, 16, 32)])
def test_a_crop_that_contradicts_the_plans(tmp_path, size):
    """As many tokens in another shape: every position would belong to another place."""
    fixture = PrimusFixture("nnssl_evamae")
    source = fixture.write(tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"--img-size .*: the plan in the file says \(32, 32, 32\)"):
        translate_checkpoint(source, ConvertOptions(num_heads=3, img_size=size))
    # a plan whose own crop cannot be is corrected by what is said
    plain = translate_checkpoint(source, ConvertOptions(num_heads=3))

    def broken(content):
        next(iter(plan_of(content)["pretrain_plan"]["configurations"].values()))["patch_size"] = [40, 32, 32]

    source = changed(fixture, tmp_path, broken)
    said = translate_checkpoint(source, ConvertOptions(num_heads=3, img_size=(32, 32, 32)))
    assert all(torch.equal(v, said.state[k]) for k, v in plain.state.items())


def test_axes_are_the_plans_also_without_a_crop(tmp_path):
    def change(content):
        del next(iter(plan_of(content)["pretrain_plan"]["configurations"].values()))["patch_size"]

    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, change)
    with pytest.raises(UserError, match="--axes xyz: the plan"):
        translate_checkpoint(source, ConvertOptions(num_heads=3, axes="xyz"))


@torch.no_grad()
def test_register_tokens_of_a_file_with_plans(tmp_path):
    fixture = PrimusFixture("primus_dna", "reg")
    content = nnunet_checkpoint(fixture.content("checkpoint_reg.pth"), fixture.spec.img_size)
    torch.save({**content, "trainer_name": "nnUNet_Primus_M_Trainer"}, tmp_path / "c.pth")
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    fixture.check("features", load_encoder(done.path)[0].feature_maps(fixture.image)[-1])


def test_positions_that_are_the_formula(tmp_path):
    """A Primus trains its positions, whatever they started from."""
    table = sincos_positions((4, 4, 4), 36)
    change = lambda c: c["network_weights"].update({"eva.pos_embed": table})  # noqa: E731
    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, change)
    done = translate_checkpoint(source, ConvertOptions(num_heads=3, token_order="whd"))
    assert done.metadata.spec.pos_embed == "learned" and torch.equal(done.state["pos_embed"], table)


@pytest.mark.parametrize(
    ("entry", "told"),
    [({"bibtex_citations": "@a{b}"}, "@a{b}"), ({"bibtex_citations": 5, "apa_citations": ["A", 3]}, "A")],
)
def test_citations_of_any_form(tmp_path, entry, told):
    source = changed(PrimusFixture("nnssl_evamae"), tmp_path, lambda c: c.update(citations=[entry]))
    assert translate_checkpoint(source, ConvertOptions(num_heads=3)).metadata.citations == (told,)


def test_sizes_in_a_plan_must_be_those_of_the_tensors(tmp_path):
    fixture = PrimusFixture("nnfoundation_vit", "large")

    def change(content):
        plan_of(content)["architecture_plans"]["arch_kwargs"]["encoder_eva_depth"] = 40

    source = changed(fixture, tmp_path, change, "checkpoint_large.pth")
    with pytest.raises(UserError, match=r"\(36, 8, 8, 8, 40\), its tensors have \(36, 8, 8, 8, 4\)"):
        translate_checkpoint(source)

    def heads(content):
        plan_of(content)["architecture_plans"]["arch_kwargs"]["encoder_eva_numheads"] = 5

    source = changed(fixture, tmp_path, heads, "checkpoint_large.pth")
    with pytest.raises(UserError, match=r"arch_kwargs.*5 heads at width 36"):
        translate_checkpoint(source)


@pytest.mark.parametrize("init_values", [0.1, [0.1], None])
def test_start_values_in_any_form(tmp_path, init_values):
    fixture = PrimusFixture("nnfoundation_vit", "large")

    def change(content):
        plan_of(content)["architecture_plans"]["arch_kwargs"]["init_values"] = init_values

    done = translate_checkpoint(changed(fixture, tmp_path, change, "checkpoint_large.pth"))
    assert done.metadata.spec.layer_scale == 0.1


@pytest.mark.parametrize(
    ("names", "version"),
    [(["stem.blocks.0.conv1.conv.weight", "final_proj.weight"], "V2"), (["proj_to_tokens.0.weight"], "V3")],
)
def test_convolutional_stems_are_refused_by_name(tmp_path, names, version):
    for fixture, file in (
        (PrimusFixture("nnssl_evamae"), "checkpoint.pth"),
        (PrimusFixture("primus_dna", "plain"), ""),
    ):
        file = file or "checkpoint_plain.pth"
        add = lambda c: c["network_weights"].update({f"down_projection.{n}": torch.ones(2) for n in names})  # noqa: E731
        with pytest.raises(UserError, match=f"Primus{version}, whose patches go through convolutions"):
            translate_checkpoint(changed(fixture, tmp_path, add, file), ConvertOptions(num_heads=2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "--num-heads H"),
        ({"num_heads": 4}, "not divisible by 6"),
        ({"num_heads": 3, "format": "timm"}, "--format timm.*nnssl's"),
        ({"num_heads": 3, "method": "mae3d"}, "--method mae3d"),
        ({"num_heads": 3, "axes": "xyz"}, "--axes xyz: the plan"),
        ({"num_heads": 3, "img_size": (16, 16, 16)}, r"the plan in the file says \(32, 32, 32\)"),
        ({"num_heads": 3, "patch_size": (4, 4, 4)}, "patches are"),
        ({"num_heads": 3, "use_teacher": True}, "--use-teacher"),
    ],
)
def test_hints_that_are_missing_or_wrong(tmp_path, options, told):
    source = PrimusFixture("nnssl_evamae").write(tmp_path / "c.pth")
    with pytest.raises(UserError, match=told):
        translate_checkpoint(source, ConvertOptions(**options))


def test_heads_of_a_plan_and_orders_of_other_formats(tmp_path):
    source = PrimusFixture("nnfoundation_vit", "large").write(tmp_path / "c.pth", "checkpoint_large.pth")
    with pytest.raises(UserError, match="--num-heads 6: the plan in the file says 3"):
        translate_checkpoint(source, ConvertOptions(num_heads=6))
    with pytest.raises(UserError, match="--token-order hwd: a mae3d file is no Primus"):
        translate_checkpoint(write_checkpoint(tmp_path / "m.pth", "mae3d"), ConvertOptions(token_order="hwd"))
    with pytest.raises(UserError, match="--token-order is dwh, needed one of hwd, whd"):
        ConvertOptions(token_order="dwh")


@torch.no_grad()
@pytest.mark.parametrize("file", ["checkpoint_plain.pth", "checkpoint_reg.pth"])
def test_arrays_of_another_order(tmp_path, file):
    """`--axes xyz`: the volume seen from the other side gives the same features, registers and all."""
    tag = file.removeprefix("checkpoint_").removesuffix(".pth")
    fixture = PrimusFixture("primus_dna", tag)
    size = fixture.spec.img_size[::-1]
    options = ConvertOptions(num_heads=2, img_size=size, axes="xyz")
    done, encoder = converted(fixture, file, tmp_path, options)
    assert done.metadata.spec.img_size == size
    turned = encoder.feature_maps(fixture.image.permute(0, 1, 4, 3, 2))[-1]
    fixture.check("features", turned.permute(0, 1, 4, 3, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["nnssl_evamae", "nnssl_voco"])
def test_a_program_that_transposed_its_volumes(tmp_path, name):
    """What it saw was volume.permute(forward): the encoder takes the volume itself. Both corrections at once."""
    fixture, forward = PrimusFixture(name), [2, 0, 1]

    def change(content):
        plan = plan_of(content)["pretrain_plan"]
        plan.update(transpose_forward=forward, transpose_backward=[1, 2, 0])
        next(iter(plan["configurations"].values()))["spacing"] = [3, 1, 2]

    source = changed(fixture, tmp_path, change)
    options = ConvertOptions(num_heads=fixture.spec.num_heads)
    done = convert_checkpoint(source, tmp_path / "e.safetensors", options)
    assert done.metadata.volume.spacing_mm == (1.0, 2.0, 3.0)
    back = (0, 1, *(2 + forward.index(i) for i in range(3)))
    ahead = (0, 1, *(2 + i for i in forward))
    volume = fixture.image.permute(back)
    assert torch.equal(volume.permute(ahead), fixture.image)
    features = load_encoder(done.path)[0].feature_maps(volume)[-1]
    fixture.check("full/features", features.permute(ahead))


def test_half_precision_and_mapped_tensors_survive(tmp_path):
    fixture, options = PrimusFixture("nnssl_evamae"), ConvertOptions(num_heads=3)

    def change(content):
        content["network_weights"] = {k: v.half() for k, v in content["network_weights"].items()}

    half = translate_checkpoint(changed(fixture, tmp_path, change), options)
    whole = translate_checkpoint(fixture.write(tmp_path / "w.pth"), options)
    assert all(v.dtype == torch.float16 and torch.equal(v, whole.state[k].half()) for k, v in half.state.items())


def test_the_command_tells_order_and_reason(tmp_path, capsys):
    source = PrimusFixture("nnssl_voco").write(tmp_path / "c.pth")
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "e.safetensors"), "--num-heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "note: token order hwd: VoCoEvaTrainer is no SimMIM" in said and "CC-BY-4.0" in said
    assert cli.main(["inspect", str(source), "--num-heads", "2", "--token-order", "whd"]) == 0
    said = capsys.readouterr().out
    assert "format: nnssl" in said and "--token-order whd" in said.splitlines()[-1]
    assert said.count("token order whd: you said so") == 1
    training = PrimusFixture("nnssl_evamae").write(tmp_path / "t.pth", "checkpoint_training.pth")
    assert cli.main(["inspect", str(training), "--num-heads", "1"]) == 0
    assert "kind: foreign checkpoint" in capsys.readouterr().out


def nnunet_checkpoint(content, crop, forward=(0, 1, 2), scheme="ZScoreNormalization"):
    """What nnU-Net's trainer puts around a network's weights."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "patch_size": list(crop),
        "spacing": [3.0, 1.0, 2.0],
        "normalization_schemes": [scheme, scheme],
        "architecture": {"network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet"},
    }
    stats = {"mean": 90.0, "std": 60.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0}
    plans = {
        "dataset_name": "Dataset007_Liver",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(forward),
        "foreground_intensity_properties_per_channel": {"0": stats, "1": stats},
        "configurations": {"3d_fullres": configuration},
    }
    names = {"channel_names": {"0": "CT", "1": "MR"}}
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": names}
    return {**content, "init_args": arguments, "optimizer_state": {"state": {}}}


@torch.no_grad()
@pytest.mark.parametrize("trainer", ["nnUNet_Primus_M_Trainer", "PretrainedTrainer_Primusx"])
def test_nnunets_own_checkpoint_of_a_primus(tmp_path, trainer):
    fixture = PrimusFixture("primus_dna", "plain")
    content = nnunet_checkpoint(fixture.content("checkpoint_plain.pth"), fixture.spec.img_size)
    torch.save({**content, "trainer_name": trainer}, tmp_path / "c.pth")
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    fixture.check("features", load_encoder(done.path)[0].feature_maps(fixture.image)[-1])
    metadata = done.metadata
    assert (done.format, metadata.method) == ("primus", "supervised") and metadata.spec == fixture.spec
    assert metadata.volume.spacing_mm == (3.0, 1.0, 2.0) and metadata.volume.channel_names == ("CT", "MR")
    assert metadata.volume.scheme_of_all is None
    assert any(f"{trainer} trained on Dataset007_Liver" in note for note in metadata.notes)
    assert any("0.4.3 of June 2025" in note for note in metadata.notes)


@torch.no_grad()
def test_nnunets_checkpoint_whose_plans_transpose(tmp_path):
    fixture, forward = PrimusFixture("primus_dna", "plain"), (1, 2, 0)
    content = nnunet_checkpoint(fixture.content("checkpoint_plain.pth"), fixture.spec.img_size, forward)
    torch.save(content, tmp_path / "c.pth")
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    back = (0, 1, *(2 + forward.index(i) for i in range(3)))
    features = load_encoder(done.path)[0].feature_maps(fixture.image.permute(back))[-1]
    fixture.check("features", features.permute(0, 1, *(2 + i for i in forward)))
    assert done.metadata.volume.spacing_mm == (2.0, 3.0, 1.0)


def test_damaged_plans_of_nnunet_and_older_tokens(tmp_path):
    fixture = PrimusFixture("primus_dna", "plain")
    content = nnunet_checkpoint(fixture.content("checkpoint_plain.pth"), fixture.spec.img_size)
    del content["init_args"]["plans"]["configurations"]["3d_fullres"]["spacing"]
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"damaged .*spacing"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
    # of a grid whose first sides differ, the older order cannot be mended
    content = nnunet_checkpoint(fixture.content("checkpoint_plain.pth"), fixture.spec.img_size)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"order hwd on a grid of \(4, 3, 2\)"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, token_order="hwd"))


def test_parallel_and_compiled_networks_of_nnunet(tmp_path):
    fixture = PrimusFixture("primus_dna", "plain")
    content = fixture.content("checkpoint_plain.pth")
    options = ConvertOptions(num_heads=2, img_size=fixture.spec.img_size)
    plain = translate_checkpoint(fixture.write(tmp_path / "p.pth", "checkpoint_plain.pth"), options)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "network."):
        weights = {f"{prefix}{k}": v for k, v in content["network_weights"].items()}
        torch.save({**content, "network_weights": weights}, tmp_path / "c.pth")
        done = translate_checkpoint(tmp_path / "c.pth", options)
        assert all(torch.equal(v, done.state[k]) for k, v in plain.state.items())
