"""`hiendmae convert` and `inspect`: files that stay, exit codes, our own checkpoints, and damaged tensors."""

import json
import os
import re

import pytest
import torch
from command_line import run
from foreign_files import SPECS, VIT, authors_state, container, random_state, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.weights import (
    ConvertOptions,
    read_metadata,
    translate_checkpoint,
)

OPTIONS = ConvertOptions(num_heads=2)


# ---- the command --------------------------------------------------------------------------------------------------


def test_convert_says_what_it_did(capsys, tmp_path):
    source, output = write_checkpoint(tmp_path / "c.pth", "hiendmae"), tmp_path / "e.safetensors"
    code, out, err = run(capsys, "convert", source, "-o", output, "--num-heads", 2)
    assert code == 0 and not err
    assert "format: hiendmae" in out and "licence: Apache-2.0" in out and "permuted to (z, y, x)" in out
    assert "adapted: module.encoder_pos_embed → pos_embed (axes (x, y, z) → (z, y, x))" in out
    assert "dropped: module.decoder.norm.weight (the decoder is not used for fine-tuning)" in out
    assert "not read: epoch (1000)" in out and f"next: hiendmae plan -d LABELLED_DATASET -w {output}" in out
    code, out, _ = run(capsys, "convert", source, "-o", tmp_path / "j.safetensors", "--num-heads", 2, "--json")
    told = json.loads(out)
    assert told["metadata"]["spec"]["num_heads"] == 2
    assert len(told["report"]["loaded"] + told["report"]["adapted"]) == len(load_file(output))
    assert len(told["report"]["dropped"]) == 3


def test_an_existing_output_needs_force(capsys, tmp_path, monkeypatch):
    source, output = write_checkpoint(tmp_path / "c.pth", "mim"), tmp_path / "e.safetensors"
    output.write_text("precious")
    # refused before the source is read
    monkeypatch.setattr("nnunetv2_hiendmae.weights.convert.read_checkpoint", None)
    code, _, err = run(capsys, "convert", source, "-o", output, "--num-heads", 2)
    assert code == 2 and f"{output} " in err and "--force" in err and output.read_text() == "precious"
    monkeypatch.undo()
    code, *_ = run(capsys, "convert", source, "-o", output, "--num-heads", 2, "--force")
    assert code == 0 and read_metadata(output).method == "mim"
    # a failing conversion leaves it alone
    before = output.read_bytes()
    code, _, err = run(capsys, "convert", source, "-o", output, "--force")
    assert code == 2 and "--num-heads" in err and output.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"c.pth", "e.safetensors"}


def test_a_device_or_pipe_is_never_replaced(capsys, tmp_path):
    """With `-o /dev/null`, root would take the device away from the whole machine."""
    source, pipe = write_checkpoint(tmp_path / "c.pth", "timm"), tmp_path / "pipe"
    os.mkfifo(pipe)
    code, out, err = run(capsys, "convert", source, "-o", pipe, "--num-heads", 2, "--force")
    assert code == 2 and not out and f"{pipe} " in err and len(err.strip().splitlines()) == 1
    with pytest.raises(UserError, match=f"^{re.escape(str(pipe))} .*device, pipe"):
        write_text(pipe, "")
    assert pipe.is_fifo() and {p.name for p in tmp_path.iterdir()} == {"c.pth", "pipe"}


@pytest.mark.parametrize("name", ["c.pth", "link.pth", "sub/../c.pth"])
def test_the_output_is_never_the_input(capsys, tmp_path, name):
    source = write_checkpoint(tmp_path / "c.pth", "timm")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pth").symlink_to(source)
    before = source.read_bytes()
    code, _, err = run(capsys, "convert", source, "-o", tmp_path / name, "--num-heads", 2, "--force")
    assert (
        code == 2
        and str(tmp_path / name) in err
        and " -o" in err
        and "--force" not in err
        and source.read_bytes() == before
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nothing"], "--format nothing .*hiendmae, mim, monai, glmae, mae3d, timm"),
        (["--method", "nothing"], "--method nothing .*hiendmae, mim, glmae, mae3d"),
        (["--method", "mim"], "--method mim: .*hiendmae.*hiendmae"),
        (["--num-heads", "0"], "--num-heads is 0, .*1"),
        (["--img-size", "0", "8", "8"], r"--img-size is \(0, 8, 8\)"),
        (["--use-teacher"], "--use-teacher: .*'teacher'"),
        (["-o", "."], r"-o encoder\.safetensors"),
        (["--format", "mim"], r"--format mim: .*module\.encoder_pos_embed, .* 28 more"),
    ],
)
def test_what_the_user_must_change(capsys, tmp_path, arguments, message):
    source = write_checkpoint(tmp_path / "c.pth", "hiendmae")
    command = ["convert", source, "-o", tmp_path / "e.safetensors", "--num-heads", 2, *arguments]
    code, out, err = run(capsys, *command)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1
    assert re.search(message, err), err
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_a_method_for_weights_that_do_not_tell(tmp_path):
    source = write_checkpoint(tmp_path / "c.pth", "timm")
    done = translate_checkpoint(source, ConvertOptions(num_heads=2, method="glmae"))
    assert done.metadata.method == "glmae" and done.metadata.citations == ()
    assert done.metadata.volume.spacing_mm is None and done.metadata.volume.normalization_schemes == ()


def test_inspect_of_foreign_files(capsys, tmp_path):
    source = write_checkpoint(tmp_path / "c.pth", "glmae", VIT.with_(embed_dim=192, num_heads=3))
    code, out, _ = run(capsys, "inspect", source, "--json")
    about = json.loads(out)
    assert code == 0 and (about["format"], about["container"], about["method"]) == ("glmae", "student", "glmae")
    assert about["spec"]["num_heads"] == 3 and about["loads"].endswith("3 dropped") and about["window_hu"]
    assert len(about["report"]["dropped"]) == 3
    unknown = write_checkpoint(tmp_path / "d.pth", "glmae")
    code, out, _ = run(capsys, "inspect", unknown)
    assert code == 0 and "loads: no" in out and "width 12" in out and "--num-heads" in out
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "e.pth")
    code, _, err = run(capsys, "inspect", tmp_path / "e.pth")
    assert code == 2 and "'state_dict' with fc.weight" in err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_heads": 0}, "--num-heads is 0, .*1"),
        ({"img_size": (8, 8)}, r"--img-size is \(8, 8\)"),
        ({"img_size": (8, 8, -8)}, r"--img-size is \(8, 8, -8\), .*1"),
        ({"axes": "zyx"}, "--axes is zyx, .*xyz, dhw"),
    ],
)
def test_options_are_checked_when_they_are_made(wrong, told):
    """In a notebook no command line has done it before."""
    with pytest.raises(UserError, match=told):
        ConvertOptions(**wrong)
    assert ConvertOptions(img_size=[4, 8, 12]).arguments() == ["--img-size", "4", "8", "12"]


# ---- damaged tensors ----------------------------------------------------------------------------------------------

RESHAPES = {
    "one axis more": lambda t: t[..., None],
    "flat": lambda t: t.reshape(-1),
    "first axes swapped": lambda t: t.transpose(0, 1) if t.ndim > 1 else t,
    "all axes reversed": lambda t: t.permute(*reversed(range(t.ndim))),
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t[:1]]),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8, torch.bool, torch.complex64]


# what tells the kind of file: without its head a MONAI encoder that has lost its CLS token is one that had none, and
# MAE3D without its decoder is timm's
TELLING = {"monai": "head", "mae3d": "decoder_"}


def change(data, state, kind, reshaped):
    """One damage to one tensor; each gets another shape once only: shorter and longer again, it has its own shape."""
    names = sorted(k for k in state if TELLING.get(kind, "head") not in k)
    name = data.draw(st.sampled_from(names))
    damage = data.draw(st.sampled_from(["delete", "rename", "reshape", "dtype"]))
    tensor = state.pop(name)
    if damage == "rename":
        other = data.draw(st.sampled_from([k for k in names if k != name]))
        new = data.draw(st.sampled_from([f"{name}_", f"x.{name}", name.replace("0", "1"), other, name.upper()]))
        state[new] = tensor
    elif damage == "reshape" and name not in reshaped:
        reshaped.add(name)
        changed = RESHAPES[data.draw(st.sampled_from(sorted(RESHAPES)))](tensor)
        # a square matrix transposed, or a vector reversed, is no other shape
        state[name] = tensor if changed.shape == tensor.shape else changed.contiguous()
    elif damage == "dtype":
        # once only: numbers that went through integers are other numbers
        state[name] = tensor.to(data.draw(st.sampled_from(DTYPES))) if tensor.dtype == torch.float32 else tensor


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Per kind: the result of the undamaged file."""
    folder = tmp_path_factory.mktemp("good")
    return {k: translate_checkpoint(write_checkpoint(folder / f"{k}.pth", k), OPTIONS) for k in SPECS}


@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tensors_never_load_silently_wrong(good, tmp_path, kind, data):
    """Either refused, or the result equals that of the undamaged file up to the rounding of number types."""
    state = authors_state(kind, random_state(SPECS[kind]))
    reshaped = set()
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, state, kind, reshaped)
    torch.save(container(kind, state), tmp_path / "c.pth")
    try:
        damaged = translate_checkpoint(tmp_path / "c.pth", OPTIONS)
    except UserError:
        return
    expected = good[kind]
    assert damaged.format == kind and damaged.metadata.spec == expected.metadata.spec
    assert damaged.state.keys() == expected.state.keys()
    for name, tensor in damaged.state.items():
        # bfloat16 keeps 8 bits; CLS is a sum of two numbers of at most 4 that were rounded, and may be near 0
        atol = 2**-5 if name == "cls_token" else 1e-6
        torch.testing.assert_close(tensor.float(), expected.state[name].float(), rtol=2**-8, atol=atol)
    accounted = {r.source for r in damaged.report.records if r.source}
    assert accounted == set(state)
