"""Files that want to do harm, and files that are damaged: one line each, and nothing is executed."""

import argparse
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import VIT, authors_state, container, random_state, write_checkpoint
from safetensors.torch import save_file

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights import (
    ConvertOptions,
    EncoderMetadata,
    read_metadata,
    save_encoder,
    translate_checkpoint,
)
from nnunetv2_hiendmae.weights.checkpoint_io import read_checkpoint

OPTIONS = ConvertOptions(num_heads=2)
STATE = random_state(VIT)


class Harm:
    """Unpickled the usual way, it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


class Shell:
    """The same through the shell."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


def hostile_contents(harm):
    state = authors_state("hiendmae", random_state(VIT))
    return {
        "toplevel": {**container("hiendmae", state), "extra": harm},
        "in args": {"model": state, "args": argparse.Namespace(epochs=1, hook=harm)},
        "in the state": {"model": {**state, "x": harm}},
        "alone": harm,
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["toplevel", "in args", "in the state", "alone"])
@pytest.mark.parametrize("kind", [Harm, Shell])
def test_nothing_is_executed(tmp_path, capsys, kind, place, legacy):
    marker, file = tmp_path / "pwned_marker", tmp_path / "c.pth"
    content = hostile_contents(kind(marker))[place]
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    for command in (["inspect", str(file)], ["convert", str(file), "-o", str(tmp_path / "e.safetensors")]):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.strip().splitlines()) == 1
        assert ("io.open" if kind is Harm else "posix.system") in err and "nothing in it was executed" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pth"]
    # guards the guard: such a file does create the marker
    if not legacy:
        torch.load(file, weights_only=False)
        assert marker.exists()


def test_the_allow_list_is_not_left_behind(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(write_checkpoint(tmp_path / "c.pth", "mim"))
    assert set(torch.serialization.get_safe_globals()) == before and argparse.Namespace not in before


def test_a_plain_pickle_is_refused_too(tmp_path):
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(Harm(tmp_path / "pwned_marker")))
    with pytest.raises(UserError, match=r"c\.pkl .*nothing in it was executed"):
        read_checkpoint(tmp_path / "c.pkl")
    assert not (tmp_path / "pwned_marker").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("cut", [0.0, 0.02, 0.3, 0.6, 0.999])
def test_truncated_files(tmp_path, cut, legacy):
    file = write_checkpoint(tmp_path / "c.pth", "hiendmae", _use_new_zipfile_serialization=not legacy)
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(UserError, match=r"c\.pth .*\(.+\).*download") as caught:
        translate_checkpoint(file, OPTIONS)
    assert "weights_only" not in str(caught.value)


def test_garbage_and_things_that_are_no_checkpoint(tmp_path):
    file = tmp_path / "c.pth"
    for content in (b"garbage", b"\x80\x02", b"PK\x03\x04", b"\0" * 200, b"x" * 8 + b"{", b"{}"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"c\.pth .*\(.+\).*download"):
            read_checkpoint(file)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} is a folder, .*give one: {re.escape(str(file))}"):
        read_checkpoint(tmp_path)
    for content, message in (
        ([torch.zeros(2)], r"c\.pth .*\blist\b"),
        (torch.zeros(2), r"c\.pth .*\bTensor\b"),
        ({"epoch": 3, "args": {}}, r"c\.pth .*epoch, args$"),
        ({"network_weights": {}}, r"c\.pth holds no tensor, only network_weights$"),
        ({}, r"c\.pth .*empty dictionary$"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=message):
            read_checkpoint(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(12).to_sparse(), "sparse.*float64"),
        (torch.quantize_per_tensor(torch.zeros(12), 0.1, 0, torch.qint8), "quantised.*float64"),
        (torch.zeros(12, device="meta"), "without numbers.*float64"),
        (torch.zeros(12, dtype=torch.int64), "a tensor of int64"),
        (torch.zeros(12, dtype=torch.complex64), "a tensor of complex64"),
        (torch.zeros(1).expand(12), r"a tensor of shape \(12,\) over fewer numbers"),
        (torch.tensor([float("nan")] * 12), "NaN or infinity"),
        (torch.full((12,), float("-inf")), "NaN or infinity"),
        (torch.full((12,), 1e300, dtype=torch.float64), "NaN or infinity"),
    ],
    ids=str,
)
def test_absurd_tensors_are_refused(tmp_path, value, message):
    state = authors_state("hiendmae", random_state(VIT))
    state["module.encoder.norm.weight"] = value
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"module\.encoder\.norm\.weight.*{message}"):
        translate_checkpoint(tmp_path / "c.pth", OPTIONS)


def test_a_container_that_holds_itself(tmp_path):
    content = container("hiendmae", authors_state("hiendmae", random_state(VIT)))
    content["loop"] = content
    torch.save(content, tmp_path / "c.pth")
    assert translate_checkpoint(tmp_path / "c.pth", OPTIONS).format == "hiendmae"


def test_odd_entries_are_accounted_for(tmp_path):
    """Keys that are no text, and tensors in dictionaries inside the state_dict."""
    state = authors_state("hiendmae", random_state(VIT))
    content = {"state_dict": {**state, "meta": {"ema": torch.zeros(2)}, "version": 2, 7: torch.zeros(1)}}
    torch.save(content, tmp_path / "c.pth")
    report = translate_checkpoint(tmp_path / "c.pth", OPTIONS).report
    dropped = {r.source for r in report.with_status("dropped")}
    assert {"state_dict.meta.ema", "state_dict.7"} <= dropped and report.entries == (("state_dict.version", "2"),)


def test_a_cls_token_of_another_shape_is_not_stretched(tmp_path):
    state = authors_state("glmae", random_state(VIT))
    state["module.backbone.cls_token"] = state["module.backbone.cls_token"][..., :1]
    torch.save({"student": state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"cls_token .*\(1, 1, 1\).*\(1, 1, 12\)"):
        translate_checkpoint(tmp_path / "c.pth", OPTIONS)


def test_a_compressed_archive_is_read_as_numbers_not_as_bytes(tmp_path):
    """Mapped into memory, compressed records would be taken for the weights."""
    plain = write_checkpoint(tmp_path / "c.pth", "hiendmae")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(io.BytesIO(plain.read_bytes())) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
        for record in a.infolist():
            b.writestr(record.filename, a.read(record.filename))
    expected = translate_checkpoint(plain, OPTIONS).state
    assert all(torch.equal(v, expected[k]) for k, v in translate_checkpoint(packed, OPTIONS).state.items())


def test_legacy_files_are_read(tmp_path):
    new = write_checkpoint(tmp_path / "new.pth", "glmae")
    old = write_checkpoint(tmp_path / "old.pth", "glmae", _use_new_zipfile_serialization=False)
    expected = translate_checkpoint(new, OPTIONS).state
    assert all(torch.equal(v, expected[k]) for k, v in translate_checkpoint(old, OPTIONS).state.items())


EVIL = "x\x1b[2J\r\n\u202e" + "y" * 5000
# what may stand in a terminal: nothing that moves the cursor or turns text round
HARMLESS = {"\n"}


def printed(capsys, *command) -> str:
    cli.main([str(c) for c in command])
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"state_dict": {**state, f"module.{EVIL}": torch.zeros(2)}},
        lambda state: {"state_dict": {**state, f"module.encoder.{EVIL}": torch.zeros(2)}},
        lambda state: {"state_dict": {**state, f"module.decoder.{EVIL}": torch.zeros(2)}},
        lambda state: {"state_dict": state, EVIL: {"a": torch.zeros(2)}, "note": EVIL},
        lambda state: {EVIL: {"a": torch.zeros(2)}},
        lambda state: {EVIL: 1, "epoch": 2},
        lambda state: {f"{EVIL}{i}": {"x": state} for i in range(3)},
        lambda state: {f"{EVIL}{i}": state for i in range(3)},
        lambda state: {"state_dict": {**state, f"module.encoder.{EVIL}": torch.zeros(2, dtype=torch.int64)}},
    ],
)
def test_names_out_of_files_are_escaped_and_cut(tmp_path, capsys, change):
    torch.save(change(authors_state("hiendmae", random_state(VIT))), tmp_path / "c.pth")
    for command in (["inspect", tmp_path / "c.pth"], ["convert", tmp_path / "c.pth", "-o", tmp_path / "e", "--force"]):
        said = printed(capsys, *command, "--num-heads", 2)
        assert said and all(c.isprintable() or c in HARMLESS for c in said)
        assert "y" * 200 not in said and "\\x1b" in said


def test_metadata_out_of_files_are_escaped(tmp_path, capsys):
    file = tmp_path / "e.safetensors"
    save_encoder(file, random_state(VIT), EncoderMetadata(VIT, EVIL, licence=EVIL, notes=(EVIL,)))
    said = printed(capsys, "inspect", file)
    assert "kind: encoder file" in said and all(c.isprintable() or c in HARMLESS for c in said)
    header = json.dumps({**json.loads(read_metadata(file).to_json()), "window_hu": EVIL})
    save_file({**random_state(VIT), EVIL: torch.zeros(1)}, file, metadata={"hiendmae": header})
    said = printed(capsys, "inspect", file)
    assert "e.safetensors" in said and "window_hu" in said and "y" * 400 not in said
    assert all(c.isprintable() or c in HARMLESS for c in said)
    metadata = EncoderMetadata(VIT, "mae3d")
    for dtype, message in ((torch.int64, "is a tensor of int64"), (torch.float32, "is unexpected")):
        save_encoder(file, {**random_state(VIT), EVIL: torch.zeros(1, dtype=dtype)}, metadata)
        said = printed(capsys, "inspect", file)
        assert message in said and "y" * 200 not in said and all(c.isprintable() or c in HARMLESS for c in said)


# ---- numpy's scalars, and what pretends to be one -----------------------------------------------------------------

SCALARS = [np.float64(0.7), np.float32(0.5), np.int64(-3), np.uint8(7), np.bool_(True), np.str_("né"), np.complex64(1j)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("value", SCALARS, ids=lambda v: type(v).__name__)
def test_numpys_scalars_are_numbers(tmp_path, value, legacy):
    content = {"best": value, "log": [{"x": value}], **container("hiendmae", authors_state("hiendmae", STATE))}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / "c.pth")[0]
    assert read["best"] == read["log"][0]["x"] == value.item() and type(read["best"]) is type(value.item())
    assert translate_checkpoint(tmp_path / "c.pth", OPTIONS).report.entries[0] == ("best", str(value.item()))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_names_of_numpy_1_and_2(tmp_path, module):
    content = {"best": np.float64(0.7), **container("hiendmae", authors_state("hiendmae", STATE))}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    written = np.float64.__reduce__(np.float64(0))[0].__module__.encode()
    (tmp_path / "c.pth").write_bytes((tmp_path / "c.pth").read_bytes().replace(written, module.encode()))
    assert read_checkpoint(tmp_path / "c.pth")[0]["best"] == 0.7


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3),
        np.datetime64("2020-01-01"),
        np.zeros(1, [("a", "f4")])[0],
        np.random.default_rng(0),
        np.ma.masked,
        np.dtype("O").type,
    ],
    ids=lambda v: type(v).__name__,
)
def test_nothing_else_of_numpy_is_read(tmp_path, value):
    torch.save({"x": value, "state_dict": STATE}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth .*nothing in it was executed"):
        read_checkpoint(tmp_path / "c.pth")


class Scalar:
    """Asks numpy's function for something else than a number."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np.float64.__reduce__(np.float64(0))[0], self.arguments


@pytest.mark.parametrize(
    "arguments",
    [(np.dtype("O"), b"x" * 8), (np.dtype("f8"), b"x"), (np.dtype("V8"), b"x" * 8), (np.dtype("f8"),), ("f8", b"")],
    ids=str,
)
def test_scalars_that_are_none(tmp_path, arguments):
    torch.save({"x": Scalar(*arguments), "state_dict": STATE}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth .*nothing in it was executed"):
        read_checkpoint(tmp_path / "c.pth")
