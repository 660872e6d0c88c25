"""The commands that only tell: env, doctor, methods, presets, inspect; and what every command has in common."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from command_line import run

import nnunetv2_hiendmae
from nnunetv2_hiendmae import cli, environment
from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.commands import env
from nnunetv2_hiendmae.options import commands as options
from nnunetv2_hiendmae.pretraining import METHODS


def test_env_is_a_line_for_the_shell_that_keeps_other_folders(tmp_path):
    other = tmp_path / "other trainers"
    environ = {**os.environ, "nnUNet_extTrainer": str(other)}
    script = f'eval "$({sys.executable} -m nnunetv2_hiendmae.cli env)" && printf %s "$nnUNet_extTrainer"'
    out = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, encoding="utf-8", check=True).stdout
    assert out.split(os.pathsep) == [str(environment.discovery_folder()), str(other)]
    # twice is once
    assert environment.with_discovery(out) == out


def test_version_and_bare_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"nnunetv2_hiendmae {nnunetv2_hiendmae.__version__}\n"
    code, out, err = run(capsys)
    assert code == 0 and not err and all(f"\n    {command}" in out for command in cli.COMMANDS)


def subparsers(parser=None):
    """(name, parser) of every command and action."""
    for action in (parser or cli.build_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield name, sub
                yield from subparsers(sub)


def test_devices_are_the_same_everywhere():
    found = {name: a for name, sub in subparsers() for a in sub._actions if "-device" in a.option_strings}
    assert set(found) == {"pretrain", "train", "predict", "reconstruct", "demo"}
    assert {(a.default, a.choices) for a in found.values()} == {("cuda", options.DEVICES)}


def test_defaults_are_told_once():
    for name, sub in subparsers():
        helps = [(a, sub._get_formatter()._expand_help(a)) for a in sub._actions if a.help]
        assert [(name, a.dest) for a, told in helps if told.count("default") > 1] == []


@pytest.mark.parametrize(
    "command", [["reconstruct", "RUN", "-o", "x"], ["demo", "-o", "x"], ["demo", "-o", "x", "-device", "mps"]]
)
def test_a_device_that_is_missing_is_told_in_one_line(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(environment.EXT_TRAINER_VARIABLE, "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, _, err = run(capsys, *command)
    assert code == 2 and "-device cpu" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--encoder", "--method"])
def test_a_wrong_name_is_told_before_torch_is_imported(option):
    code = f"import sys; from nnunetv2_hiendmae.cli import main; print(main(['pretrain', '-d', '1', '{option}', 'x']))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, encoding="utf-8"
    )
    assert done.stdout.split() == ["2", "False"]
    assert len(done.stderr.splitlines()) == 1 and f"{option} is x, needed one of" in done.stderr


def test_methods(capsys):
    _, out, _ = run(capsys, "methods", "--json")
    listed = json.loads(out)
    assert set(listed) == set(METHODS)
    assert listed["hiendmae"]["options"]["mask_ratio"] == 0.75
    assert listed["hiendmae"]["recipe"]["betas"] == [0.9, 0.95]
    _, text, _ = run(capsys, "methods")
    assert all(m.title in text and m.source in text for m in METHODS.values())
    # units, and which defaults are ours, beside what they are said of
    for method, block in zip(METHODS.values(), text.split("\n\n"), strict=False):
        values = {**method.defaults(), **vars(method.recipe)}
        assert all(f"{key}={value}" in block for key, value in values.items())
        assert all(f"{key}={values[key]} ({note})" in block for key, note in method.notes().items())


@pytest.mark.parametrize(
    ("method", "unpublished"),
    [
        ("mim", ["alignment", "tau", "foreground_share", "views_per_part"]),
        (
            "glmae",
            [
                *("global_views", "local_views", "head_hidden", "normalize_target", "lr"),
                *("student_temperature", "teacher_temperature", "teacher_temperature_start", "temperature_warmup"),
                *("centre_momentum", "teacher_momentum"),
            ],
        ),
    ],
)
def test_defaults_that_nobody_published_are_called_ours(method, unpublished):
    """docs/methods.md, "MiM" and "GL-MAE"."""
    assert [key for key in unpublished if "ours" not in METHODS[method].notes().get(key, "")] == []


def test_presets(capsys):
    _, out, _ = run(capsys, "presets", "--json")
    listed = json.loads(out)
    assert set(listed) == set(PRESETS)
    # docs/methods.md, "Hi-End-MAE": the released encoder, its position table counted
    assert listed["vit_hiend_p12"]["parameters"] == 342_638_592 + 512 * 1536
    _, text, _ = run(capsys, "presets")
    assert len(text.splitlines()) == 1 + len(PRESETS)


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_inspect_of_something_else(capsys, tmp_path, content):
    file = tmp_path / "x.bin"
    if content:
        file.write_bytes(content)
    code, out, err = run(capsys, "inspect", str(file))
    assert code == 2 and not out and len(err.strip().splitlines()) == 1


def test_doctor(capsys, monkeypatch, nnunet):
    monkeypatch.setenv(environment.EXT_TRAINER_VARIABLE, environment.with_discovery(None))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50e9}))
    code, out, _ = run(capsys, "doctor")
    assert code == 0, out
    assert "nnU-Net finds nnUNetTrainer_HiEndMAE" in out
    monkeypatch.setenv(environment.EXT_TRAINER_VARIABLE, f"{environment.discovery_folder()}/")
    assert run(capsys, "doctor")[0] == 0
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.delenv(environment.EXT_TRAINER_VARIABLE)
    code, out, _ = run(capsys, "doctor", "--json")
    failed = {c["name"]: c["mend"] for c in json.loads(out) if not c["ok"]}
    assert code == 2 and set(failed) == {"nnUNet_raw", "trainers"}
    assert failed["trainers"] == 'run: eval "$(hiendmae env)"'


@pytest.mark.parametrize("command", [["preprocess", "-d", "1"], ["pretrain", "-d", "1"]])
def test_without_nnunets_variables(capsys, monkeypatch, command):
    for variable in environment.NNUNET_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    code, _, err = run(capsys, *command)
    assert code == 2 and "nnUNet_raw is not set" in err and len(err.strip().splitlines()) == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(env, "with_discovery", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])
