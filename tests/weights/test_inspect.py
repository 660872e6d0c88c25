"""`hiendmae inspect`: by content, whatever the name, and with what a user may say."""

import json
import shlex

import pytest
import torch
from foreign_files import VIT, authors_state, container, random_state, write_checkpoint, write_run

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder


def inspect(capsys, *arguments) -> dict:
    assert cli.main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_of_ours_under_any_name(capsys, tmp_path):
    source = write_run(tmp_path / "run", teacher=True)
    other = source.rename(source.with_name("kept.bin"))
    about = inspect(capsys, other)
    assert (about["kind"], about["step"], about["method"]) == ("pretraining checkpoint", 5, "glmae")
    assert about["loads"].startswith(f"{len(random_state(VIT))} loaded")
    assert inspect(capsys, other, "--use-teacher")["notes"] == ["weights of the momentum teacher"]
    assert "--num-heads: " in inspect(capsys, other, "--num-heads", 2)["needed"]


def test_a_foreign_checkpoint_under_our_name(capsys, tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint_latest.pth", "glmae")
    assert inspect(capsys, source)["kind"] == "foreign checkpoint"


@pytest.mark.parametrize("name", ["e.safetensors", "e.pth", "checkpoint_latest.pth"])
def test_formats_of_files_are_told_by_content(capsys, tmp_path, name):
    save_encoder(tmp_path / name, random_state(VIT), EncoderMetadata(VIT, "mae3d"))
    assert inspect(capsys, tmp_path / name)["kind"] == "encoder file"
    write_checkpoint(tmp_path / name, "mim")
    assert inspect(capsys, tmp_path / name)["format"] == "mim"
    write_checkpoint(tmp_path / name, "mim", _use_new_zipfile_serialization=False)
    assert inspect(capsys, tmp_path / name)["format"] == "mim"


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["convert", "-o", "out.safetensors"], ["classify", "train", "-d", "1", "--labels", "a.csv", "-w"]],
)
def test_a_folder_where_a_file_is_needed(capsys, tmp_path, monkeypatch, command):
    """As hub folders, cloned repositories and nnU-Net's models are."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    (folder / "fold_0").mkdir(parents=True)
    assert cli.main([*command, str(folder)]) == 2
    assert "model is a folder, needed a file of weights; give one: it holds none" in capsys.readouterr().err
    for file in ("fold_0/checkpoint_final.pth", "encoder.safetensors"):
        (folder / file).touch()
    assert cli.main([*command, str(folder)]) == 2
    there = f"give one: {folder}/encoder.safetensors, {folder}/fold_0/checkpoint_final.pth"
    assert there in capsys.readouterr().err


def test_a_run_folder(capsys, tmp_path):
    source = write_run(tmp_path / "run")
    about = inspect(capsys, source.parent)
    assert about["kind"] == "run folder" and about["checkpoint"]["step"] == 5
    assert cli.main(["inspect", str(source.parent)]) == 0
    assert "pretraining checkpoint" in capsys.readouterr().out


def test_with_what_the_user_says(capsys, tmp_path):
    spec = VIT.with_(img_size=(4, 12, 8))
    state = authors_state("mae3d", random_state(spec))
    source = tmp_path / "my weights.pth"
    torch.save({"teacher": state, "model": state}, source)
    assert "--img-size" in inspect(capsys, source)["needed"]
    assert "--num-heads" in inspect(capsys, source, "--img-size", 8, 12, 4)["needed"]
    said = ["--format", "glmae", "--num-heads", "2", "--img-size", "4", "12", "8", "--axes", "dhw", "--use-teacher"]
    about = inspect(capsys, source, *said)
    assert (about["format"], about["container"], about["axes"]) == ("glmae", "teacher", "dhw")
    assert about["spec"]["img_size"] == [4, 12, 8] and about["method"] == "glmae"
    # what it says next can be run as it stands
    words = shlex.split(about["next"])
    assert words[:3] == ["hiendmae", "convert", str(source)] and set(said) <= set(words)
    assert cli.main([*words[1:-1], str(tmp_path / "e.safetensors")]) == 0
    capsys.readouterr()
    assert inspect(capsys, tmp_path / "e.safetensors")["spec"] == about["spec"]


@pytest.mark.parametrize("option", [["--axes", "dhw"], ["--num-heads", "2"], ["--use-teacher"]])
def test_an_encoder_file_says_itself_what_it_is(capsys, tmp_path, option):
    save_encoder(tmp_path / "e", random_state(VIT), EncoderMetadata(VIT, "mae3d"))
    assert cli.main(["inspect", str(tmp_path / "e"), *option]) == 2
    err = capsys.readouterr().err
    assert f"{option[0]}: " in err and str(tmp_path / "e") in err and len(err.strip().splitlines()) == 1


def test_next_steps_can_be_pasted(capsys, tmp_path):
    folder = tmp_path / "a b; c"
    folder.mkdir()
    source = folder / "c.pth"
    torch.save(container("timm", authors_state("timm", random_state(VIT))), source)
    output = folder / "e.safetensors"
    assert cli.main(["convert", str(source), "-o", str(output), "--num-heads", "2"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("next: ")
    assert shlex.split(last)[-1] == str(output)
    assert cli.main(["convert", str(source), "-o", str(folder)]) == 2
    assert shlex.split(capsys.readouterr().err.strip())[-1] == str(folder / "encoder.safetensors")


def test_check_exits_with_2_where_a_file_would_not_load(capsys, tmp_path):
    """What is said stays the same."""
    good, folder = write_checkpoint(tmp_path / "c.pth", "mim"), write_run(tmp_path / "run").parent
    for arguments in ([good, "--num-heads", 2], [folder]):
        assert cli.main(["inspect", *map(str, arguments), "--check"]) == 0
    (folder / "checkpoint_latest.pth").rename(folder / "kept.pth")
    write_checkpoint(folder / "checkpoint_latest.pth", "mim")
    for path in (good, folder):
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert cli.main(["inspect", str(path), "--check"]) == 2
        captured = capsys.readouterr()
        assert captured.out == said and "--num-heads" in said and "would not load" in captured.err
