"""How options are declared: what is read from texts and from the command line, and what is said of them."""

import argparse
import math
import re
from dataclasses import dataclass, is_dataclass
from typing import get_origin

import pytest

from nnunetv2_hiendmae.commands.arguments import add_options, from_arguments
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import Option, commands, declared, flag, kinds_of, option, parse_assignments


@dataclass(frozen=True)
class Settings:
    shares: tuple[float, float] = option((0.5, 1.0), "of the volume", ours=True)
    edge: int | tuple[int, int, int] | None = option(None, "in voxels; ours", ours=True)
    flip: bool = option(False, ours=True)
    kind: str = option("a", choices=("a", "b"))
    count: int = option(1)
    no_option: int = 0


@dataclass(frozen=True)
class Asked:
    rate: float | None = option(None, flag="-r")
    size_mm: tuple[float, float] | None = option(None, flag="--size")
    names: tuple[str, ...] | None = option(None)
    fast: bool = option(True)
    slow_start: bool = option(False)


def test_texts_become_what_the_annotations_say():
    texts = ["shares=0.25,1", "edge=8,16,24", "flip=TRUE", "kind=b"]
    assert parse_assignments(Settings, texts, "tests") == {
        "shares": (0.25, 1.0), "edge": (8, 16, 24), "flip": True, "kind": "b",
    }  # fmt: skip
    assert parse_assignments(Settings, ["edge=8", "shares=1"], "tests") == {"edge": 8, "shares": (1.0,)}


@pytest.mark.parametrize("text", ["shares=0.25,x", "edge=1.5", "flip=1", "kind", "count=16,24", "no_option=1"])
def test_other_texts_are_refused(text):
    key, _, value = text.partition("=")
    with pytest.raises(UserError, match=rf"^--set {key}\b.*{value.rpartition(',')[2]}"):
        parse_assignments(Settings, [text], "tests")


def test_arguments_become_the_settings():
    parser = argparse.ArgumentParser()
    add_options(parser, Asked)
    args = parser.parse_args(
        ["-r", "1", "--size", "-5", "6", "--names", "a", "b", "--names", "c", "--no-fast", "--slow-start"]
    )
    assert from_arguments(Asked, args) == Asked(1.0, (-5.0, 6.0), ("a", "b", "c"), fast=False, slow_start=True)


OF_COMMANDS = [cls for name, cls in vars(commands).items() if name.endswith("Options") and is_dataclass(cls)]


@pytest.mark.parametrize("cls", OF_COMMANDS)
def test_without_arguments_settings_are_the_default(cls):
    parser = argparse.ArgumentParser()
    add_options(parser, cls)
    assert from_arguments(cls, parser.parse_args([])) == cls()


def beyond(about: Option) -> list[object]:
    """What an option must refuse: a value beyond each bound, NaN and infinity; none where nothing is declared."""
    wrong = [about.at_least - 1] if about.at_least is not None else []
    wrong += [about.at_most + 1] if about.at_most is not None else []
    wrong += [bound for bound in (about.above, about.below) if bound is not None]
    wrong += ["no such choice"] if about.choices else []
    return [*wrong, math.nan, math.inf] if wrong else []


@pytest.mark.parametrize("cls", OF_COMMANDS)
def test_every_declared_range_is_checked(cls):
    for name, (_, about) in declared(cls).items():
        for wrong in beyond(about):
            value = (wrong,) * 3 if get_origin(kinds_of(cls, name)[0]) is tuple else wrong
            told = re.escape(f"{flag(name, about)} is {value}, needed {about.needed}")
            with pytest.raises(UserError, match=f"^{told}$"):
                cls(**{name: value})


def test_ours_is_said_once():
    notes = {name: about.note for name, (_, about) in declared(Settings).items()}
    assert notes == {
        "shares": "of the volume, ours",
        "edge": "in voxels; ours",
        "flip": "ours",
        "kind": "",
        "count": "",
    }
