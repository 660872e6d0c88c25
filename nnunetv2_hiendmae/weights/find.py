"""Where in another program's file the encoder's state_dict is, and of which format."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.errors import UserError, printable, some
from nnunetv2_hiendmae.options.commands import ConvertOptions
from nnunetv2_hiendmae.recipes import RECIPES
from nnunetv2_hiendmae.weights.checkpoint_io import is_weight, tensors_in
from nnunetv2_hiendmae.weights.formats import FORMATS, WeightFormat, any_match, like_glmae

FORMAT_NAMES = tuple(f.name for f in FORMATS)
# keys under which programs keep the state_dict, the first that fits is taken; "" is a bare one
_CONTAINERS = ("student", "state_dict", "model", "model_state_dict", "net", "network", "network_weights", "teacher", "")
# what stands before an encoder's patch embedding, of any format, where other tensors have names without it
_PREFIX = re.compile(r"(.+?\.)(patch_embed(ding)?\d?|down_projection)\.")
_MOST_LISTED = 5
_WHICH = (
    "its names are those of timm, and it lies where GL-MAE and other programs keep a student or teacher. Of GL-MAE "
    "(arrays x y z, window -1000..1000): give --format glmae. Of another program (arrays z y x, nothing known of its "
    "images): give --format timm"
)


@dataclass(frozen=True)
class ForeignEncoder:
    """The state_dict of an encoder in another program's file, and of which format it is.

    Args:
        path: keys that lead to it, () if the file is the state_dict.
        prefix: of the encoder's names.
        names: name without prefix → name in the state_dict.
        outside: the same of tensors without that prefix; without the one that all have.
        state: the tensors, by their names in the state_dict.
    """

    format: WeightFormat
    path: tuple[str, ...]
    prefix: str
    names: dict[str, str]
    outside: dict[str, str]
    state: dict[str, Tensor]


def find_encoder(content: Mapping[str, Any], options: ConvertOptions) -> ForeignEncoder:
    """The encoder's state_dict in a file, recognised by its names.

    It is looked for under the usual keys, then under those inside the one other dictionary of the file that has it.
    MAE3D and a GL-MAE backbone saved without its container and `backbone.` have the same names. Such a file is taken
    as MAE3D, of which the names are the original ones; without its decoder as timm, whose arrays are `dhw`, not
    `xyz`. `--format glmae` says otherwise.

    Raises:
        UserError: unknown names, an unknown format or method, no teacher, several dictionaries or prefixes with an
            encoder, or one that may be GL-MAE's or not.
    """
    if options.format not in (None, *FORMAT_NAMES):
        raise UserError(f"--format {options.format} is unknown, needed one of {', '.join(FORMAT_NAMES)}")
    if options.method not in (None, *RECIPES):
        raise UserError(f"--method {options.method} is unknown, needed one of {', '.join(RECIPES)}")
    if found := _matching(content, options):
        return found
    inner = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}
    nested = {k: found for k, v in inner.items() if (found := _matching(v, options))}
    if len(nested) == 1:
        key, found = nested.popitem()
        return replace(found, path=(key, *found.path))
    if nested:
        raise UserError(
            f"encoders in {some(map(printable, nested), _MOST_LISTED)}: which is meant? save that one alone"
        )
    if options.use_teacher and not any("teacher" in level for level in (content, *inner.values())):
        raise UserError("--use-teacher: there is no 'teacher' in the file; run the same command without it")
    unknown = f"--format {options.format}: no such encoder" if options.format else "unknown kind of weights"
    raise UserError(
        f"{unknown}: {_contents(content)}; known formats are {', '.join(FORMAT_NAMES)} (choose with "
        "--format), and our own checkpoints and encoders"
    )


def _matching(content: Mapping[str, Any], options: ConvertOptions) -> ForeignEncoder | None:
    """The first state_dict under the usual keys that has an encoder of a format, or of the wanted one."""
    for key in ("teacher",) if options.use_teacher else _CONTAINERS:
        inside = content.get(key) if key else content
        state = {k: v.detach() for k, v in inside.items() if is_weight(k, v)} if isinstance(inside, Mapping) else {}
        if found := _under_a_prefix(key, state, options):
            return found
    return None


def _under_a_prefix(key: str, state: dict[str, Tensor], options: ConvertOptions) -> ForeignEncoder | None:
    """An encoder whose names have any prefix: one that all names of a state_dict share, else one of some of them."""
    path, prefix, names = (key,) if key else (), "", {name: name for name in state}
    while names:
        if entry := _format(key, prefix, names, options):
            return ForeignEncoder(entry, path, prefix, names, {}, state)
        shared = {name.partition(".")[0] if "." in name else "" for name in names}
        if len(shared) > 1 or "" in shared:
            break
        prefix += f"{shared.pop()}."
        names = {name.partition(".")[2]: source for name, source in names.items()}
    found = []
    for inner in sorted({match[1] for match in map(_PREFIX.match, names) if match}):
        own = {name.removeprefix(inner): source for name, source in names.items() if name.startswith(inner)}
        if entry := _format(key, prefix + inner, own, options):
            outside = {name: source for name, source in names.items() if not name.startswith(inner)}
            found.append(ForeignEncoder(entry, path, prefix + inner, own, outside, state))
    if len(found) > 1:
        told = some([printable(f.prefix) for f in found], _MOST_LISTED)
        raise UserError(f"encoders with the prefixes {told}: which is meant? save that one alone")
    return found[0] if found else None


def _format(key: str, prefix: str, names: Collection[str], options: ConvertOptions) -> WeightFormat | None:
    """The first format that names without their prefix are of; the wanted one, if they can be of it."""
    fitting = [f for f in FORMATS if any_match(names, f.blocks)]
    if options.format is not None:
        return next((f for f in fitting if f.name == options.format), None)
    entry = next((f for f in fitting if f.only(key, prefix, names)), None)
    if entry is not None and entry.name == "timm" and like_glmae(key, prefix):
        raise UserError(_WHICH)
    return entry


def _contents(content: Mapping[str, Any]) -> str:
    """Where a file's tensors are, and the names of some."""
    places: dict[str, list[str]] = {}
    for key, value in content.items():
        bare = isinstance(value, Tensor)
        inside = [str(key)] if bare else [name for name, _ in tensors_in(value)]
        places.setdefault("" if bare else f"{printable(key)!r} with ", []).extend(inside)
    told = [f"{place}{some(map(printable, names), _MOST_LISTED)}" for place, names in places.items() if names]
    return f"tensors are {'; '.join(told[:_MOST_LISTED])}"
