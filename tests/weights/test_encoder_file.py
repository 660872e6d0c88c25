"""Encoder files: what comes back, what is refused, and how they fit networks that differ from them."""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nnunetv2_hiendmae
from nnunetv2_hiendmae.architectures import EncoderSpec, build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import (
    EncoderMetadata,
    LoadReport,
    load_into,
    read_metadata,
    save_encoder,
    translate_checkpoint,
)
from nnunetv2_hiendmae.weights.encoder_file import write_safetensors
from nnunetv2_hiendmae.weights.report import TensorRecord

SPEC = EncoderSpec((16, 16, 24), (8, 8, 8), embed_dim=24, depth=4, num_heads=2)
METADATA = EncoderMetadata(
    SPEC,
    "hiendmae",
    VolumeFormat((1.5, 1.0, 1.0), (-175.0, 250.0), normalization_schemes=("CTNormalization",), channel_names=("CT",)),
    citations=("@a{b}",),
)


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, build_encoder(SPEC).state_dict(), METADATA)
    return path


def test_round_trip_through_the_public_functions(file):
    encoder, metadata = nnunetv2_hiendmae.load_encoder(file)
    stored = load_file(file)
    assert all(torch.equal(v, stored[k]) for k, v in encoder.state_dict().items())
    assert metadata.version and metadata == read_metadata(file)
    assert {**vars(metadata), "version": ""} == vars(METADATA)
    image = torch.rand(2, 1, 16, 16, 24)
    tokens, taps = encoder(image, torch.tensor([[0, 5, 2], [11, 3, 4]]))
    assert tokens.shape == (2, 4, 24) and [t.shape for t in taps] == [(2, 4, 24)] * 3
    assert nnunetv2_hiendmae.load_report(file).summary() == f"{len(stored)} loaded, 0 adapted, 0 dropped"


def test_an_existing_file_survives_a_failed_write(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    # what every tensor goes through on its way into the file
    monkeypatch.setattr(torch.Tensor, "contiguous", fail)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}; .*df -h"):
        save_encoder(file, build_encoder(SPEC).state_dict(), METADATA)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.unlink(), "hiendmae pretrain or hiendmae convert$"),
        (lambda p: p.write_bytes(b"garbage"), r"\(.*[Hh]eader.*\); download"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"\(.*[Hh]eader.*\); download"),
        (lambda p: save_file({"x": torch.zeros(1)}, p), "make one with: hiendmae convert$"),
        (lambda p: save_file(load_file(p), p, metadata={"hiendmae": "{}"}), r"\(.*spec: .*\); download"),
        (lambda p: save_file(load_file(p), p, metadata={"hiendmae": "[1]"}), r"\(.*description.*\); download"),
    ],
)
def test_what_is_no_encoder_file(file, make, message):
    make(file)
    with pytest.raises(UserError, match=message):
        nnunetv2_hiendmae.load_encoder(file)


@pytest.mark.parametrize(
    "field",
    [
        {"method": 3},
        {"spacing_mm": [1.5, 1.5]},
        {"spacing_mm": [1.5, 1.5, -1]},
        {"spacing_mm": ["1", "1", "1"]},
        {"window_hu": [250, -175]},
        {"window_hu": [float("nan"), 1]},
        {"normalization_schemes": "CTNormalization"},
        {"channel_names": [1]},
        {"image_reader_writer": 7},
        {"citations": [None]},
        {"intensity_offset": True},
        {"notes": {"a": 1}},
        {"training": 5},
        {"spec": {**SPEC.to_dict(), "depth": None}},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_fields_of_the_wrong_kind(file, field):
    header = {**json.loads(METADATA.to_json()), **field}
    save_file(load_file(file), file, metadata={"hiendmae": json.dumps(header)})
    for read in (read_metadata, nnunetv2_hiendmae.load_encoder, translate_checkpoint):
        told = r"spec\.depth: .*None" if "spec" in field else next(iter(field))
        with pytest.raises(UserError, match=rf"{re.escape(str(file))} .*{told}"):
            read(file)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_tensors_never_load_silently(file, data):
    """Deleting, renaming or reshaping any tensor is refused, and the message names one that is wrong."""
    state = load_file(file)
    name = data.draw(st.sampled_from(sorted(state)))
    change = data.draw(st.sampled_from(["delete", "rename", "reshape", "add", "integers"]))
    tensor = state[name] if change == "add" else state.pop(name)
    if change == "rename":
        state[f"{name}_"] = tensor
    elif change == "reshape":
        state[name] = torch.zeros(*tensor.shape, 2)
    elif change == "integers":
        state[name] = tensor.to(torch.int64)
    elif change == "add":
        state["extra"] = torch.zeros(1)
    broken = file.with_name("broken.safetensors")
    save_encoder(broken, state, METADATA)
    with pytest.raises(UserError, match="extra" if change == "add" else name.replace(".", r"\.")):
        nnunetv2_hiendmae.load_encoder(broken)


def parts(path) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_as_the_formats_own_writer_does(tmp_path, dtype):
    """Strided views and mixed types too; our writer only differs in holding one tensor at a time."""
    torch.manual_seed(0)
    tensors = {"b": torch.rand(3, 4).to(dtype), "a": torch.rand(5), "c.ö": torch.rand(()), "d": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "theirs", metadata={"k": 'quoted "é"'})
    strided = {**tensors, "b": tensors["b"].t().contiguous().t()}
    write_safetensors(tmp_path / "ours", dict(reversed(strided.items())), {"k": 'quoted "é"'})
    (ours, numbers), (theirs, same) = (parts(tmp_path / name) for name in ("ours", "theirs"))
    assert numbers == same and len(ours["__metadata__"].pop("hiendmae_sha256")) == 64
    assert list(ours.items()) == list(theirs.items())


def test_the_bytes_of_a_header_with_several_entries_are_always_the_same(tmp_path):
    """The format's own writer puts them in an order of chance."""
    for metadata in ({"format": "pt", "a": "b"}, {"a": "b", "format": "pt"}):
        write_safetensors(tmp_path / "f", {"x": torch.zeros(1)}, metadata)
        assert list(parts(tmp_path / "f")[0]["__metadata__"]) == ["hiendmae_sha256", *metadata]


def test_refuses_to_write_what_the_format_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"x is torch\.complex64"):
        write_safetensors(tmp_path / "f", {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


def test_sixteen_bit_files_load_as_float32(tmp_path, file):
    half = {k: v.half() for k, v in load_file(file).items()}
    path = tmp_path / "half.safetensors"
    save_encoder(path, half, METADATA)
    encoder, _ = nnunetv2_hiendmae.load_encoder(path)
    assert all(v.dtype == torch.float32 and torch.equal(v, half[k].float()) for k, v in encoder.state_dict().items())


CONVVIT = EncoderSpec((32, 32, 32), (16,) * 3, 12, 2, 2, kind="convvit", stem_dims=(2, 4, 6), stem_depths=(1, 1, 1))


def test_a_convvit_of_pretraining_becomes_dense(tmp_path):
    torch.manual_seed(0)
    source, path = build_encoder(CONVVIT), tmp_path / "mim.safetensors"
    save_encoder(path, source.state_dict(), EncoderMetadata(CONVVIT, "mim"))
    target = build_encoder(CONVVIT.with_(dense=True, in_channels=2, img_size=(32, 48, 32), pos_embed="learned"))
    torch.nn.init.constant_(target.rel_pos_bias, 0.25)
    report = load_into(target, path)
    fresh = {r.target for r in report.with_status("fresh")}
    assert fresh == {"rel_pos_bias", *(f"blocks.{i}.ls{j}.gamma" for i in range(2) for j in (1, 2))}
    dropped = {r.source for r in report.with_status("dropped")}
    assert dropped == {k for k in source.state_dict() if k.startswith(("fusions.", "norm."))}
    assert {r.source for r in report.with_status("adapted")} == {"stages.0.embed.proj.weight", "pos_embed"}
    assert {r.target for r in report.records if r.target} == set(target.state_dict())
    assert {r.source for r in report.records if r.source} == set(source.state_dict())
    assert report.summary().endswith("5 fresh") and "fresh: rel_pos_bias (not in pretraining" in report.text()
    assert (target.rel_pos_bias == 0.25).all()
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    torch.testing.assert_close(
        target.stages[0].embed.proj.weight.sum(1, keepdim=True), source.stages[0].embed.proj.weight
    )
    # a dense file keeps its relative positions, resampled for another crop; the other way round there is no way back
    dense = tmp_path / "dense.safetensors"
    spec = target.spec.with_(in_channels=2)
    save_encoder(dense, target.state_dict(), EncoderMetadata(spec, "mim"))
    again = build_encoder(spec.with_(img_size=(32, 32, 32)))
    report = load_into(again, dense)
    assert {r.source for r in report.with_status("adapted")} == {"rel_pos_bias", "pos_embed"}
    assert torch.allclose(again.rel_pos_bias, torch.tensor(0.25)) and not report.with_status("fresh")
    with pytest.raises(UserError, match="dense True in the file, False in the network"):
        load_into(build_encoder(CONVVIT.with_(in_channels=2)), dense)


def test_many_tensors_with_one_reason_share_a_line():
    names = [f"module.decoder.blocks.{i}.weight" for i in range(9)]
    records = [TensorRecord(n, None, "dropped", "why") for n in names]
    report = LoadReport((*records, TensorRecord("a", "b", "adapted", "how")), (("epoch", "3"),))
    assert report.text().splitlines() == [
        "0 loaded, 1 adapted, 9 dropped",
        "  dropped: 9 tensors module.decoder.blocks.* (why)",
        "  adapted: a → b (how)",
        "  not read: epoch (3)",
    ]
    assert [r["source"] for r in report.to_dict()["dropped"]] == names


def test_fits_more_channels_another_grid_and_no_cls(file):
    source, _ = nnunetv2_hiendmae.load_encoder(file)
    target = build_encoder(SPEC.with_(in_channels=3, img_size=(32, 16, 24), cls_token=False, pos_embed="learned"))
    report = load_into(target, file)
    assert {r.source for r in report.with_status("adapted")} == {"patch_embed.proj.weight", "pos_embed"}
    assert [r.source for r in report.with_status("dropped")] == ["cls_token"]
    assert len(report.records) == len(source.state_dict())
    # the same image in all three channels gives what the one channel gave
    image = torch.rand(1, 1, 16, 16, 24)
    ours = target.patch_embed.proj(image.expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(ours, source.patch_embed.proj(image), rtol=1e-5, atol=1e-6)
    assert target.pos_embed.requires_grad and target.pos_embed.shape == (1, 4 * 2 * 3, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5, "taps": (1, 2, 3)}, "depth 4 in the file, 5 in the network"),
        ({"embed_dim": 48}, "embed_dim 24 in the file, 48"),
        ({"num_heads": 4}, "num_heads 2 in the file, 4"),
        ({"patch_size": (8, 8, 4)}, "patch_size"),
    ],
)
def test_another_architecture_is_refused(file, changes, message):
    target = build_encoder(SPEC.with_(**changes))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_into(target, file)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_two_channels_do_not_fit_three(tmp_path):
    spec = SPEC.with_(in_channels=2)
    path = tmp_path / "two.safetensors"
    save_encoder(path, build_encoder(spec).state_dict(), EncoderMetadata(spec, "mae3d"))
    with pytest.raises(UserError, match=r"2 input channels, .*3: only 1"):
        load_into(build_encoder(SPEC.with_(in_channels=3)), path)


def test_the_report_builds_no_encoder(file, monkeypatch):
    monkeypatch.setattr("nnunetv2_hiendmae.weights.encoder_file.build_encoder", None)
    assert nnunetv2_hiendmae.load_report(file).summary().startswith(f"{len(load_file(file))} loaded")
    # a tensor that is not what the header says is told in the same words by the report and by loading
    monkeypatch.undo()
    state = load_file(file)
    state["norm.bias"] = torch.zeros(5)
    save_encoder(file, state, METADATA)
    told = []
    for read in (nnunetv2_hiendmae.load_report, nnunetv2_hiendmae.load_encoder):
        with pytest.raises(UserError, match=r"norm\.bias has shape \(5,\), needed \(24,\)") as caught:
            read(file)
        told.append(str(caught.value))
    assert told[0] == told[1]
