"""Where in a foreign file the encoder's state_dict is, and of which format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.foreign import tensors_in
from nnunetv2_hiendmae.weights.formats import FORMAT_NAMES, FORMATS, WeightFormat
from nnunetv2_hiendmae.weights.report import printable

# keys under which programs keep the state_dict, the first that fits is taken; "" is a bare one
_CONTAINERS = ("student", "state_dict", "model", "model_state_dict", "net", "network", "teacher", "")
# how data-parallel training and compilation rename every tensor
_WRAPPERS = ("module.", "_orig_mod.")
_MOST_LISTED = 5


@dataclass(frozen=True)
class Found:
    """A state_dict in a file, and what it is.

    Args:
        path: keys that lead to it, () if the file is the state_dict.
        names: name without wrappers → name in the state_dict.
        state: the tensors, by their names in the state_dict.
    """

    format: WeightFormat
    path: tuple[str, ...]
    names: dict[str, str]
    state: dict[str, Tensor]

    @property
    def container(self) -> str:
        """`path` in words, "" for none."""
        return ".".join(self.path)


def find(content: Mapping[str, Any], wanted: str | None = None, teacher: bool = False) -> Found:
    """The encoder's state_dict in a file, recognised by its names.

    It is looked for under the usual keys, then under those inside the one other dictionary of the file that has it.
    MAE3D and a GL-MAE backbone saved without its container and `backbone.` have the same names. Such a file is taken
    as MAE3D, of which the names are the original ones; without its decoder as timm, whose arrays are `dhw`, not
    `xyz`. `wanted="glmae"` says otherwise.

    Args:
        wanted: name of a format, instead of recognising it.
        teacher: take the momentum teacher.

    Raises:
        UserError: unknown names, an unknown format, no teacher, or several dictionaries with an encoder.
    """
    if wanted is not None and wanted not in FORMAT_NAMES:
        raise UserError(f"--format {wanted} is unknown, needed one of {', '.join(FORMAT_NAMES)}")
    inner = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}
    found = next(_matches(content, wanted, teacher), None)
    if found:
        return found
    nested = {k: next(_matches(v, wanted, teacher), None) for k, v in inner.items()}
    nested = {k: replace(v, path=(k, *v.path)) for k, v in nested.items() if v}
    if len(nested) == 1:
        return nested.popitem()[1]
    if nested:
        raise UserError(f"encoders in {_some(list(nested))}: which is meant? save that one alone")
    if teacher and not any("teacher" in level for level in (content, *inner.values())):
        raise UserError("--use-teacher: there is no 'teacher' in the file; run the same command without it")
    raise UserError(f"unknown kind of weights: {_contents(content)}; {_known()}")


def is_weight(key: Any, value: Any) -> bool:
    """Whether an entry of a dictionary is one of a state_dict."""
    return isinstance(key, str) and isinstance(value, Tensor)


def _matches(content: Mapping[str, Any], wanted: str | None, teacher: bool) -> Iterator[Found]:
    """State_dicts under the usual keys that are of a format, or could be of the wanted one."""
    for key in ("teacher",) if teacher else _CONTAINERS:
        state = _tensors(content.get(key) if key else content)
        if not state:
            continue
        names = _unwrapped(state)
        for entry in FORMATS:
            if entry.name == wanted or (wanted is None and entry.matches(key, names)):
                yield Found(entry, (key,) if key else (), names, state)


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {k: v.detach() for k, v in value.items() if is_weight(k, v)}


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, str]:
    names = {name: name for name in state}
    while wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = {n.removeprefix(wrapper): source for n, source in names.items()}
    return names


def _contents(content: Mapping[str, Any]) -> str:
    """Where a file's tensors are, and the names of some."""
    places: dict[str, list[str]] = {}
    for key, value in content.items():
        place = "" if isinstance(value, Tensor) else str(key)
        inside = [str(key)] if isinstance(value, Tensor) else [name for name, _ in tensors_in(value)]
        places.setdefault(place, []).extend(inside)
    told = [f"{f'{printable(p)!r} with ' if p else ''}{_some(names)}" for p, names in places.items() if names]
    return f"tensors are {'; '.join(told[:_MOST_LISTED])}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{', '.join(map(printable, names[:_MOST_LISTED]))}{more}"


def _known() -> str:
    return f"known formats are {', '.join(FORMAT_NAMES)} (choose with --format), and our own checkpoints and encoders"
