"""What a user may set: each option is declared once, with its default, range, unit and whose default it is.

A settings class is a frozen dataclass whose fields are made by `option`. From these declarations come the checks, the
command line (`commands.arguments`), `--set key=value`, and what `hiendmae methods` prints. Imports nothing heavy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from fractions import Fraction
from operator import ge, gt, le, lt
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from nnunetv2_hiendmae.errors import UserError

_KEY = "option"
# a range that many options have
SHARE = {"at_least": 0, "at_most": 1}


@dataclass(frozen=True)
class Option:
    """What is declared of an option besides its name, type and default.

    Args:
        help: in a few words; with its unit where the name does not say it.
        flag, metavar: on the command line; "": the name with dashes.
        default_is: where a default of None comes from, "the method's" for one.
        ours: the default is ours, not the publication's.
        at_least, above, at_most, below: range of a number, or of each number of a tuple.
        choices: of a text.
    """

    help: str = ""
    flag: str = ""
    metavar: str | tuple[str, ...] | None = None
    default_is: str = ""
    ours: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether a value is in range; None is, for "not given". No comparison holds for NaN."""
        if value is None:
            return True
        if self.choices:
            return value in self.choices
        numbers = value if isinstance(value, tuple) else (value,)
        return all(self._in_range(n) for n in numbers if isinstance(n, int | float))

    def _in_range(self, number: float) -> bool:
        bounds = ((ge, self.at_least), (gt, self.above), (le, self.at_most), (lt, self.below))
        return math.isfinite(number) and all(bound is None or fits(number, bound) for fits, bound in bounds)

    @property
    def note(self) -> str:
        """What is said beside a default that is listed: help, and that it is ours where help does not say so."""
        return ", ".join(filter(None, (self.help, "ours" if self.ours and "ours" not in self.help else "")))

    @property
    def needed(self) -> str:
        """The range in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least} to {self.at_most}"
        bounds = {"at least": self.at_least, "more than": self.above, "at most": self.at_most, "less than": self.below}
        told = (f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        return ", ".join(told) or "a finite number"


def option(default: Any = MISSING, help: str = "", **about: Any) -> Any:
    """A dataclass field that is an option; see `Option` for `about`. Without a default it has to be given."""
    return field(default=default, metadata={_KEY: Option(help, **about)})


def declared(cls: type) -> dict[str, tuple[Field, Option]]:
    """Fields of a settings class that are options, by name."""
    return {f.name: (f, f.metadata[_KEY]) for f in fields(cls) if _KEY in f.metadata}


def flag(name: str, about: Option) -> str:
    """How the command line spells an option."""
    return about.flag or f"--{name.replace('_', '-')}"


def check_ranges(settings: Any, told: Callable[[str, Option], str] = flag, mend: str = "") -> None:
    """Checks every option of a settings object, for its `__post_init__`.

    Args:
        told: what an option is called in messages.
        mend: what to do about it; "{name}" is the option's name.

    Raises:
        UserError: a value is out of range: what came, what was needed.
    """
    for name, (_, about) in declared(type(settings)).items():
        value = getattr(settings, name)
        if not about.holds(value):
            raise UserError(f"{told(name, about)} is {value}, needed {about.needed}{mend.format(name=name)}")


def share_of(total: int, share: float) -> int:
    """How many of `total` a share in (0, 1] means: the nearest number, halves up, and at least 1."""
    # str: 0.145 means 145/1000, not the nearest binary number below it
    return max(1, math.floor(Fraction(str(share)) * total + Fraction(1, 2)))


def kinds_of(cls: type, name: str) -> tuple[type, ...]:
    """Types that an option's annotation allows, None left out: `int | tuple[int, int, int] | None` → both."""
    annotation = get_type_hints(cls)[name]
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(kind for kind in alternatives if kind is not type(None))


def parse_assignments(cls: type, texts: Sequence[str], whose: str) -> dict[str, Any]:
    """`key=value` texts of `--set` as options of a settings class, typed as their annotations say. `whose`: name of
    what the options belong to, for messages.

    Raises:
        UserError: no '=', an unknown key, or a value of another type.
    """
    known, chosen = declared(cls), {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            listed = ", ".join(f"{name}={f.default}" for name, (f, _) in known.items())
            raise UserError(f"--set {text} is no option of {whose}, needed key=value of: {listed}")
        chosen[key] = _parse(kinds_of(cls, key), key, value)
    return chosen


def _parse(kinds: Sequence[type], key: str, text: str) -> Any:
    """A text as what an option's annotation asks for: bool, int, float or str; `D,H,W` where that is a tuple."""
    sequences = [kind for kind in kinds if get_origin(kind) is tuple]
    if sequences and ("," in text or len(sequences) == len(kinds)):
        return tuple(_parse(get_args(sequences[0])[:1], key, part) for part in text.split(","))
    wanted = next(kind for kind in kinds if kind not in sequences)
    if wanted is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--set {key}={text}: needed true or false")
    try:
        return wanted(text)
    except ValueError as e:
        raise UserError(f"--set {key}={text}: needed a value of type {wanted.__name__}") from e
