"""Encoder files read without torch: the same account as with it, and nothing is vouched for that would not load."""

import json

import pytest
import torch
from foreign_files import VIT, random_state
from safetensors.torch import save_file

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.files import sha256
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder, translate_checkpoint
from nnunetv2_hiendmae.weights.header import look_into
from nnunetv2_hiendmae.weights.metadata import METADATA_KEY

FIRST = "blocks.0.attn.qkv.weight"


def state(dtype=torch.float32, **changes):
    return {k: v.to(dtype) for k, v in random_state(VIT).items()} | changes


def write(path, tensors=None):
    save_encoder(path, state() if tensors is None else tensors, EncoderMetadata(VIT, "mae3d", notes=("a note",)))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_it_says_is_what_loading_says(tmp_path, dtype):
    path = write(tmp_path / "e.safetensors", state(dtype))
    metadata, report, digest = look_into(path)
    translated = translate_checkpoint(path)
    assert metadata == translated.metadata and report.summary() == translated.report.summary()
    assert {r.source for r in report.records} == set(state()) and digest == sha256(path)


def test_a_file_of_0_1_has_no_digest(tmp_path):
    path = tmp_path / "e.safetensors"
    save_file(state(), path, {METADATA_KEY: EncoderMetadata(VIT, "mae3d", version="0.1.0").to_json()})
    assert look_into(path)[2] == sha256(path)


def flipped(path):
    """A byte of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def shorter(path):
    path.write_bytes(path.read_bytes()[:-4])


def without_a_tensor(path):
    tensors = state()
    del tensors[FIRST]
    write(path, tensors)


def poisoned(value, dtype=torch.float32):
    def damage(path):
        tensors = state(dtype)
        tensors[FIRST].view(-1)[5] = value
        write(path, tensors)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *(flipped, longer, shorter, without_a_tensor, poisoned(torch.nan), poisoned(-torch.inf)),
        *(poisoned(torch.nan, torch.bfloat16), poisoned(torch.inf, torch.float16)),
        lambda path: write(path, state(**{FIRST: torch.rand(3, 2)})),
        lambda path: write(path, state(**{FIRST: state()[FIRST].to(torch.int32)})),
        lambda path: save_file(state(), path),
        lambda path: torch.save(state(), path),
        lambda path: path.write_bytes(b""),
    ],
)
def test_nothing_else_is_vouched_for(tmp_path, capsys, damage):
    """`inspect` then says what torch's way says: an error in one line, or another kind of file."""
    path = write(tmp_path / "e.safetensors")
    damage(path)
    assert look_into(path) is None
    code = cli.main(["inspect", str(path), "--json"])
    said = capsys.readouterr()
    if code == 0:
        assert json.loads(said.out)["kind"] != "encoder file"
    else:
        assert code == 2 and len(said.err.strip().splitlines()) == 1
