"""How options are declared: what is read from texts, and what is said of them."""

from dataclasses import dataclass

import pytest

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import declared, option, parse_assignments


@dataclass(frozen=True)
class Settings:
    shares: tuple[float, float] = option((0.5, 1.0), "of the volume", ours=True)
    edge: int | tuple[int, int, int] | None = option(None, "in voxels; ours", ours=True)
    flip: bool = option(False, ours=True)
    kind: str = option("a", choices=("a", "b"))
    count: int = option(1)
    no_option: int = 0


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


def test_ours_is_said_once():
    notes = {name: about.note for name, (_, about) in declared(Settings).items()}
    assert notes == {
        "shares": "of the volume, ours",
        "edge": "in voxels; ours",
        "flip": "ours",
        "kind": "",
        "count": "",
    }
