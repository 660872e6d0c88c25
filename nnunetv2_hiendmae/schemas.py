"""JSON files that others wrote or changed: one type for each kind of file, and one way to read them.

Types are checked strictly by pydantic (a text is no number, 96.0 no integer); keys that a type does not name are kept.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, FiniteFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from nnunetv2_hiendmae.errors import UserError, printable, some

# no file of nnU-Net comes near it, and what is read takes about ten times as much memory
_LARGEST_BYTES = 64 * 2**20
_OPEN = ConfigDict(extra="allow")
# for dataclasses that are read from JSON: their `__pydantic_config__`
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Spacing = Annotated[list[Positive], Field(min_length=2, max_length=3)]
Shape = Annotated[list[PositiveInt], Field(min_length=2, max_length=3)]
Names = Annotated[dict[str, str], Field(min_length=1)]
Statistics = dict[str, dict[str, FiniteFloat]]
Kind = TypeVar("Kind")


class _ListedCase(TypedDict):
    images: list[str]
    label: NotRequired[str]


class DatasetJson(TypedDict):
    """dataset.json of a raw dataset; "modality" is what old ones call the channels."""

    __pydantic_config__ = _OPEN
    file_ending: Annotated[str, Field(min_length=1)]
    channel_names: NotRequired[Names]
    modality: NotRequired[Names]
    labels: NotRequired[dict[str, int | list[int]]]
    regions_class_order: NotRequired[list[int]]
    dataset: NotRequired[dict[str, _ListedCase]]


class Fingerprint(TypedDict):
    """dataset_fingerprint.json, nnU-Net's or ours."""

    __pydantic_config__ = _OPEN
    spacings: Annotated[list[Spacing], Field(min_length=1)]
    shapes_after_crop: Annotated[list[Shape], Field(min_length=1)]
    foreground_intensity_properties_per_channel: Statistics
    median_relative_size_after_cropping: FiniteFloat
    hiendmae_label_free: NotRequired[bool]


class _Architecture(TypedDict):
    __pydantic_config__ = _OPEN
    network_class_name: str
    arch_kwargs: dict[str, Any]


class Configuration(TypedDict):
    """One configuration of plans; one that inherits from another need not have all."""

    __pydantic_config__ = _OPEN
    inherits_from: NotRequired[str]
    data_identifier: NotRequired[Annotated[str, Field(pattern=r"^[^/\\]+$")]]
    batch_size: NotRequired[PositiveInt]
    patch_size: NotRequired[Shape]
    spacing: NotRequired[Spacing]
    normalization_schemes: NotRequired[list[str]]
    use_mask_for_norm: NotRequired[list[bool]]
    architecture: NotRequired[_Architecture]


class Plans(TypedDict):
    """nnU-Net plans, stock or ours. What stands under our own key is read by `PlansSection.from_dict`."""

    __pydantic_config__ = _OPEN
    dataset_name: str
    plans_name: str
    image_reader_writer: str
    transpose_forward: list[int]
    foreground_intensity_properties_per_channel: Statistics
    configurations: dict[str, Configuration]


class Fold(TypedDict):
    """One fold of splits_final.json."""

    __pydantic_config__ = _OPEN
    train: list[str]
    val: list[str]


Folds = Annotated[list[Fold], Field(min_length=1)]


class _Score(TypedDict):
    __pydantic_config__ = _OPEN
    # nnU-Net writes NaN for a class that a case does not have
    Dice: float


class _CaseScores(TypedDict):
    __pydantic_config__ = _OPEN
    prediction_file: str
    metrics: Annotated[dict[str, _Score], Field(min_length=1)]


class Summary(TypedDict):
    """summary.json of nnU-Net's evaluation."""

    __pydantic_config__ = _OPEN
    metric_per_case: Annotated[list[_CaseScores], Field(min_length=1)]


def read_json(path: Path, kind: Any, mend: str) -> Any:
    """Content of a JSON file, as it stands there, once it is known to be of a kind.

    Args:
        kind: one of this module's types, or any that pydantic knows.
        mend: what to do about a file that is not.

    Raises:
        UserError: it cannot be read or is of another kind; names the file, the key, what came and what was needed.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is {'missing' if not path.exists() else 'no file'}; {mend}")
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(f"{path} has more than {_LARGEST_BYTES >> 20} MB, which no such file has; {mend}")
        text = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); {mend}") from e
    try:
        validated(kind, text)
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}; {mend}") from e
    return json.loads(text)


def validated(kind: type[Kind], text: str | bytes) -> Kind:
    """JSON as an instance of a type that pydantic knows; dataclasses check their values themselves.

    Raises:
        ValueError: the text is no such JSON; up to three keys with what came and what was needed.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as e:
        raise ValueError(some(map(_told, e.errors(include_url=False)), separator="; ")) from e


@lru_cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _told(error: dict[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    came = "" if error["type"] in ("missing", "json_invalid", "value_error") else f", got {error['input']!r}"
    return printable(f"{where}: {message}{came}" if where else f"{message}{came}", 200)
