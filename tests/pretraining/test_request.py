"""Defaults of `hiendmae pretrain` that depend on what else was asked for."""

import pytest
from run_data import PLANS, tiny_settings

from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.cli import build_parser
from nnunetv2_hiendmae.commands.arguments import from_arguments
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import PretrainOptions
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings, build_settings, run_name

pytestmark = pytest.mark.usefixtures("preprocessed")
ANY = ["pretrain", "-d", "1", "-p", PLANS, "-device", "cpu"]
BASE = [*ANY, "--encoder", "vit_nano_p8", "--method", "mim"]


def settings_of(arguments: list[str]):
    """What a command line asks for."""
    args = build_parser().parse_args(arguments)
    return build_settings(args.datasets, from_arguments(PretrainOptions, args))[0]


@pytest.mark.parametrize(
    ("asked", "processes", "accumulate"),
    [
        ([], 1, METHODS["mim"].recipe.accumulate),
        (["--batch-size", "6"], 1, 2),
        (["--batch-size", "5"], 1, 1),
        ([], 2, 4),
        ([], 8, 1),
        # what cannot be split at all is told when the run starts
        (["--batch-size", "2"], 4, 4),
        (["--accumulate", "3"], 1, 3),
    ],
)
def test_micro_batches_are_the_methods_where_the_batch_can_be_split(monkeypatch, asked, processes, accumulate):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert settings_of([*BASE, *asked]).accumulate == accumulate


def test_options_may_be_set_at_once_or_one_by_one():
    asked = ["--set", "crops_level2=2", "tau=0.2", "--set", "crops_level3=3"]
    assert settings_of([*BASE, *asked]).options == {"crops_level2": 2, "tau": 0.2, "crops_level3": 3}
    assert settings_of(BASE).options == {}


def test_options_of_a_method_may_be_a_mapping():
    given = {"plans_name": PLANS, "device": "cpu", "encoder": "vit_nano_p8", "method": "mim"}
    asked = {"crops_level2": 2, "tau": 0.2}
    assert build_settings([1], PretrainOptions(**given, method_options=asked))[0].options == asked
    with pytest.raises(UserError, match=r"^colour .*mim.*crops_level2.*tau"):
        build_settings([1], PretrainOptions(**given, method_options={"colour": 1}))


def test_settings_are_read_as_they_were_written():
    settings = tiny_settings("glmae")
    assert PretrainSettings.from_dict(settings.to_dict()).to_dict() == settings.to_dict()
    without = {k: v for k, v in settings.to_dict().items() if k != "lr"}
    for name, changed in {"lr": without, "momentum": {**settings.to_dict(), "momentum": 1}}.items():
        with pytest.raises(ValueError, match=name):
            PretrainSettings.from_dict(changed)


def test_encoder_is_the_methods_unless_given():
    settings = {}
    for method in METHODS:
        settings[method] = settings_of([*ANY, "--method", method])
        assert run_name(settings[method]) == f"{method}_{METHODS[method].recipe.encoder}_001"
    # the paper's hybrid
    assert settings["mim"].spec == PRESETS["convvit_base"]
    assert {s.spec for m, s in settings.items() if m != "mim"} == {PRESETS["vit_base_p16"]}
