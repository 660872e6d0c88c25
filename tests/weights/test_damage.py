"""Encoder files that changed after they were written, or whose header lies about what is in them."""

import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from foreign_files import CONVVIT, PRIMUS, VIT, random_state, write_checkpoint, write_run
from safetensors.torch import load_file, save_file

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import build_encoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights import (
    ConvertOptions,
    EncoderMetadata,
    check_encoder_file,
    convert_checkpoint,
    load_encoder,
    load_into,
    load_report,
    read_metadata,
    save_encoder,
    translate_checkpoint,
)

READERS = (check_encoder_file, load_encoder, load_report, translate_checkpoint, lambda p: load_into(_encoder(), p))


def _encoder():
    return build_encoder(VIT)


@pytest.fixture
def file(tmp_path):
    save_encoder(tmp_path / "e.safetensors", random_state(VIT), EncoderMetadata(VIT, "mae3d"))
    return tmp_path / "e.safetensors"


def test_one_flipped_bit_anywhere_is_noticed(file):
    assert check_encoder_file(file).method == "mae3d"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header, 5), *range(header, len(content), 997), len(content) - 1]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"e\.safetensors"):
            check_encoder_file(file)


def test_every_reader_notices_and_one_line_says_so(file, capsys):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    for read in READERS:
        with pytest.raises(UserError, match="digest"):
            read(file)
    for command in (["inspect", file], ["convert", file, "-o", file.with_name("t.safetensors"), "--to", "timm"]):
        assert cli.main([str(c) for c in command]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and "digest" in err
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("to", ["timm", "monai"])
def test_exports_carry_a_digest_too(file, to):
    exported = convert_checkpoint(file, file.with_name("x.safetensors"), to=to).path
    assert translate_checkpoint(exported).format == to
    content = bytearray(exported.read_bytes())
    content[-3] ^= 1
    exported.write_bytes(content)
    with pytest.raises(UserError, match="digest"):
        translate_checkpoint(exported)


def rewritten(file, state, spec_changes=None, **changes):
    """The file as 0.1 wrote it, without a digest, with other tensors or another header."""
    header = {**json.loads(read_metadata(file).to_json()), **changes}
    header["spec"] = {**header["spec"], **(spec_changes or {})}
    save_file(state, file, metadata={"hiendmae": json.dumps(header)})
    return file


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(file, value):
    state = load_file(file)
    state["norm.weight"][3] = value
    for read in READERS:
        with pytest.raises(UserError, match=r"e\.safetensors: norm\.weight holds NaN or infinity"):
            read(rewritten(file, state))


NESTED = '{"spec":' + "[" * 10**5 + "]" * 10**5 + "}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depth": 10**7}, "10000000 blocks"),
        ({"depth": 2.0}, r"spec\.depth: .*2\.0"),
        ({"depth": True}, r"spec\.depth: .*True"),
        ({"img_size": [8000, 8000, 8000]}, "numbers"),
        ({"img_size": [2**62, 8, 8]}, "2147483648"),
        ({"embed_dim": 2**40}, "2147483648"),
        ({"embed_dim": 12 * 2**26, "num_heads": 2**26}, "numbers"),
        ({"embed_dim": 12.0}, r"spec\.embed_dim: .*12\.0"),
        ({"mlp_ratio": float("inf")}, r"spec\.mlp_ratio: .*inf"),
        ({"mlp_ratio": 1e300}, "numbers"),
        ({"mlp_ratio": "4"}, r"spec\.mlp_ratio: .*'4'"),
        ({"patch_size": [4, 4, 2**30], "img_size": [8, 8, 2**30]}, "numbers"),
        ({"in_channels": 2**30}, "numbers"),
        ({"norm_eps": float("nan")}, r"spec\.norm_eps: .*nan"),
        ({"taps": [0] * 10**5 + ["x"]}, r"spec\.taps\.100000: .*'x'"),
        ({"cls_token": "false"}, r"spec\.cls_token: .*'false'"),
        (NESTED, "recursion limit"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_headers_that_claim_too_much(file, capsys, changes, told):
    """One line at once, and nothing of such a size is ever built."""
    if isinstance(changes, str):
        save_file(load_file(file), file, metadata={"hiendmae": changes})
    else:
        rewritten(file, load_file(file), changes)
    start = time.monotonic()
    for read in (read_metadata, *READERS):
        with pytest.raises(UserError, match=rf"e\.safetensors .*{told}"):
            read(file)
    assert cli.main(["inspect", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (CONVVIT, {"stem_dims": [2, 4, 2**30]}),
        (CONVVIT, {"stem_depths": [1, 1, 10**8]}),
        (PRIMUS, {"register_tokens": 10**9}),
        (PRIMUS, {"depth": 10**6}),
        (PRIMUS, {"embed_dim": 6 * 10**8}),
    ],
    ids=str,
)
def test_other_kinds_that_claim_too_much(file, spec, changes):
    save_encoder(file, random_state(spec), EncoderMetadata(spec, "mim"))
    with pytest.raises(UserError, match=r"e\.safetensors .*(numbers|blocks)"):
        read_metadata(rewritten(file, load_file(file), changes))


def test_settings_of_a_run_that_claim_too_much(tmp_path):
    source = write_run(tmp_path / "run")
    settings = {"method": "mae3d", "spec": {**VIT.to_dict(), "depth": 10**7}}
    source.with_name("run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="10000000 blocks"):
        translate_checkpoint(source)


# ---- checkpoints of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_in_a_foreign_checkpoint_is_noticed(tmp_path, seed):
    """Torch itself looks at no checksum; where no bit matters, the weights are the same."""
    path, options = write_checkpoint(tmp_path / "c.pth", "timm"), ConvertOptions(num_heads=2)
    data, intact = path.read_bytes(), translate_checkpoint(path, options).state
    intact = {name: tensor.clone() for name, tensor in intact.items()}
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    rng = np.random.default_rng(seed)
    places = [*rng.integers(len(data), size=40), *rng.integers(directory, len(data), size=60)]
    same = 0
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        try:
            state = translate_checkpoint(path, options).state
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            continue
        assert state.keys() == intact.keys() and all(torch.equal(state[k], intact[k]) for k in intact), at
        same += 1
    assert 0 < same < len(places) / 2


def test_old_checkpoints_have_no_checksums_but_never_a_traceback(tmp_path):
    path, options = write_checkpoint(tmp_path / "c.pth", "timm"), ConvertOptions(num_heads=2)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for at in [*rng.integers(len(data), size=100), *range(0, 200, 3)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        try:
            translate_checkpoint(path, options)
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch 2.6 or newer")
def test_checkpoints_that_were_written_without_checksums_load(tmp_path):
    state = torch.load(write_checkpoint(tmp_path / "c.pth", "timm"))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "c.pth") as archive:
        assert archive.testzip()
    assert (
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2)).state.keys() == random_state(VIT).keys()
    )


# ---- files of other processes --------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed(file, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = "out.safetensors"
    left, alive, others = (tmp_path / n for n in (f".{name}.{dead.pid}.tmp", f".{name}.1.tmp", f".x.{dead.pid}.tmp"))
    for path in (left, alive, others):
        path.write_bytes(b"half")
    convert_checkpoint(file, tmp_path / name, to="timm")
    assert not left.exists() and alive.exists() and others.exists()


@pytest.mark.parametrize("to", [None, "timm"])
@pytest.mark.parametrize("links", [True, False])
def test_of_two_converts_to_one_new_file_one_is_told(tmp_path, monkeypatch, to, links):
    """The other one is over while this one writes."""
    source, output = write_checkpoint(tmp_path / "c.pth", "timm"), tmp_path / "e.safetensors"
    plain = torch.Tensor.contiguous

    def meanwhile(tensor, *arguments, **keywords):
        if not output.exists():
            output.write_bytes(b"theirs")
        return plain(tensor, *arguments, **keywords)

    def fail(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(torch.Tensor, "contiguous", meanwhile)
    if not links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", fail)
    with pytest.raises(UserError, match=r"e\.safetensors was made by another process"):
        convert_checkpoint(source, output, ConvertOptions(num_heads=2), to=to)
    assert output.read_bytes() == b"theirs"
    convert_checkpoint(source, output, ConvertOptions(num_heads=2), to=to, force=True)
    assert translate_checkpoint(output).state.keys() == random_state(VIT).keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pth", "e.safetensors"]
