"""Files of our own at the border: checkpoints of runs with student and teacher, encoder files, exports."""

import json
import re

import pytest
import torch
from command_line import run
from foreign_files import SPECS, VIT, random_state, write_run
from run_data import TINY_SPEC, tiny_settings
from safetensors.torch import load_file

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.training.run import save_state
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import (
    ConvertOptions,
    EncoderMetadata,
    convert_checkpoint,
    load_encoder,
    save_encoder,
    translate_checkpoint,
)


@pytest.mark.parametrize("kind", ["mae3d", "mim"])
def test_checkpoint_of_a_run_of_ours(tmp_path, kind):
    spec = SPECS[kind]
    source = write_run(tmp_path / "run", spec)
    done = convert_checkpoint(source, tmp_path / "e.safetensors")
    stored = load_file(done.path)
    assert done.format == "run" and all(torch.equal(v, stored[k]) for k, v in random_state(spec).items())
    assert {r.source for r in done.report.with_status("dropped")} == {"head.weight", "optimizer.state.0"}
    assert done.metadata.spec == spec and done.metadata.volume.spacing_mm is None
    # with the run's encoder file beside it, what it saw is known
    seen = EncoderMetadata(
        spec,
        "mae3d",
        VolumeFormat((2.0, 1.0, 1.0), normalization_schemes=("ZScoreNormalization",), channel_names=("MR",)),
    )
    save_encoder(source.with_name("encoder.safetensors"), random_state(spec), seen)
    assert translate_checkpoint(source).metadata.volume.spacing_mm == (2.0, 1.0, 1.0)
    with pytest.raises(UserError, match=f"{re.escape(str(source))}: --num-heads: "):
        translate_checkpoint(source, ConvertOptions(num_heads=2))
    source.with_name("run.json").unlink()
    with pytest.raises(UserError, match=rf"run\.json is missing.*{re.escape(str(source))}"):
        translate_checkpoint(source)


def test_an_encoder_file_needs_no_conversion(capsys, tmp_path):
    file = tmp_path / "e.safetensors"
    save_encoder(file, random_state(VIT), EncoderMetadata(VIT, "mae3d"))
    code, _, err = run(capsys, "convert", file, "-o", tmp_path / "f.safetensors")
    assert code == 2 and str(file) in err and "--to timm, monai, nnssl or hub-folder" in err
    code, out, _ = run(capsys, "convert", file, "-o", tmp_path / "f.safetensors", "--to", "timm")
    assert code == 0 and "hiendmae plan" not in out


@pytest.fixture
def glmae_run(tmp_path):
    """Folder of a GL-MAE run whose teacher is no longer its student, and the method."""
    settings = tiny_settings("glmae")
    method = settings.build_method()
    torch.nn.init.normal_(method.teacher_encoder.norm.bias)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(settings.to_dict()))
    save_state(folder, {"method": method}, step=6, optimizer={}, precision={})
    return folder, method


def test_student_and_teacher_of_a_run(capsys, glmae_run, tmp_path):
    folder, method = glmae_run
    training = {"step": 3, "cases": 2}
    seen = EncoderMetadata(TINY_SPEC, "glmae", VolumeFormat((2.0, 1.0, 1.0)), training=training)
    save_encoder(folder / "encoder.safetensors", method.encoder.state_dict(), seen)
    source, output = folder / "checkpoint_latest.pth", tmp_path / "teacher.safetensors"
    code, out, err = run(capsys, "convert", source, "-o", output, "--use-teacher")
    assert code == 0, err
    assert "note: weights of the momentum teacher" in out and "(the student; the teacher was asked for)" in out
    encoder, metadata = load_encoder(output)
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in method.teacher_encoder.state_dict().items())
    assert metadata.method == "glmae" and metadata.volume.spacing_mm == (2.0, 1.0, 1.0)
    # of the checkpoint, which may be older or younger than the encoder file beside it
    assert metadata.training == {"step": 6, "cases": 2}
    student = translate_checkpoint(source)
    assert all(torch.equal(v, student.state[k]) for k, v in method.encoder.state_dict().items())
    assert not student.metadata.notes
    details = {r.detail for r in student.report.with_status("dropped") if r.source.startswith("teacher_encoder.")}
    assert details == {"the momentum teacher; --use-teacher takes it"}


@pytest.mark.parametrize("method", ["mae3d", "hiendmae", "mim"])
def test_methods_without_a_teacher_say_so(capsys, tmp_path, method):
    source = write_run(tmp_path / "run", SPECS[method])
    code, out, err = run(capsys, "convert", source, "-o", tmp_path / "e.safetensors", "--use-teacher")
    assert code == 2 and not out and len(err.strip().splitlines()) == 1
    assert "--use-teacher: " in err and "(glmae has)" in err and not (tmp_path / "e.safetensors").exists()


# what convert may be told of foreign files, none of which means anything for ours
HINTS = [
    {"axes": "xyz"},
    {"axes": "dhw"},
    {"num_heads": 2},
    {"img_size": (8, 8, 8)},
    {"format": "timm"},
    {"method": "glmae"},
]


@pytest.mark.parametrize("hint", HINTS, ids=str)
@pytest.mark.parametrize("kind", ["run", "encoder", "timm", "monai"])
def test_what_our_own_files_say_cannot_be_said_otherwise(tmp_path, kind, hint):
    source = write_run(tmp_path / "run", VIT)
    if kind != "run":
        source = convert_checkpoint(source, tmp_path / "e.safetensors").path
    if kind in ("timm", "monai"):
        source = convert_checkpoint(source, tmp_path / "x.safetensors", to=kind).path
    option = f"--{next(iter(hint)).replace('_', '-')}"
    with pytest.raises(UserError, match=f"{re.escape(str(source))}: {option}: "):
        translate_checkpoint(source, ConvertOptions(**hint))
    assert translate_checkpoint(source).format == kind


@pytest.mark.parametrize(
    "settings",
    [
        {"method": 3},
        {"method": ["mae3d"]},
        {"method": None},
        {"spec": {}},
        {"spec": []},
        {"spec": {**VIT.to_dict(), "depth": "2"}},
        {"spec": {**VIT.to_dict(), "img_size": [1e400, 8, 8]}},
        [],
        "text",
    ],
    ids=str,
)
def test_damaged_settings_of_a_run(tmp_path, settings):
    source = write_run(tmp_path / "run", VIT)
    file = source.with_name("run.json")
    if isinstance(settings, dict):
        settings = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"run\.json is damaged: .* encoder\.safetensors"):
        translate_checkpoint(source)
