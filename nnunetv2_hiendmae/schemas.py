"""JSON files that others wrote or changed: one type for each kind of file, and one way to read them.

Types are checked strictly by pydantic (a text is no number, 96.0 no integer); keys that a type does not name are kept.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import NotRequired, TypedDict

from nnunetv2_hiendmae.errors import UserError, printable, some

# no file of nnU-Net comes near it, and what is read takes about ten times as much memory
_LARGEST_BYTES = 64 * 2**20
EXAMPLE_JSON = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}'
_OPEN = ConfigDict(extra="allow")
# nnU-Net's name of the scheme that a window in HU belongs to
CT_SCHEME = "CTNormalization"
# for dataclasses that are read from JSON: their `__pydantic_config__`
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Spacing = Annotated[list[Positive], Field(min_length=3, max_length=3)]
Shape = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
Names = Annotated[dict[str, str], Field(min_length=1)]
# nnU-Net takes digits for a number as well
Label = int | Annotated[str, Field(pattern=r"^\d+$")]
Statistics = dict[str, dict[str, FiniteFloat]]
Kind = TypeVar("Kind")


# of log.jsonl: measures, and measures of the validation
LogLine = dict[str, FiniteFloat | dict[str, Any]]


class _ListedCase(TypedDict):
    images: list[str]
    label: NotRequired[str]


class DatasetJson(TypedDict):
    """dataset.json; what is needed of it depends on the reader. "modality" is what old ones call `channel_names`."""

    __pydantic_config__ = _OPEN
    file_ending: NotRequired[Annotated[str, Field(min_length=1)]]
    channel_names: NotRequired[Names]
    modality: NotRequired[Names]
    labels: NotRequired[dict[str, Label | list[Label]]]
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
    arch_kwargs: NotRequired[dict[str, Any]]


class Configuration(TypedDict):
    """One configuration of plans; one that inherits from another need not have all."""

    __pydantic_config__ = _OPEN
    inherits_from: NotRequired[str]
    data_identifier: NotRequired[Annotated[str, Field(pattern=r"^[^/\\]+$")]]
    batch_size: NotRequired[PositiveInt]
    # two numbers where it is 2D
    patch_size: NotRequired[Annotated[list[PositiveInt], Field(min_length=2, max_length=3)]]
    spacing: NotRequired[Annotated[list[Positive], Field(min_length=2, max_length=3)]]
    normalization_schemes: NotRequired[list[str]]
    use_mask_for_norm: NotRequired[list[bool]]
    architecture: NotRequired[_Architecture]


class _Plans(TypedDict):
    __pydantic_config__ = _OPEN
    dataset_name: str
    plans_name: str
    image_reader_writer: str
    transpose_forward: list[int]
    foreground_intensity_properties_per_channel: Statistics
    configurations: dict[str, Configuration]


def _divides_by_positive(plans: _Plans) -> _Plans:
    # nnU-Net divides by 1e-8 instead of 0
    statistics = plans["foreground_intensity_properties_per_channel"]
    for name, configuration in plans["configurations"].items():
        for channel, scheme in enumerate(configuration.get("normalization_schemes", ())):
            if scheme == CT_SCHEME and not statistics.get(str(channel), {}).get("std", 0) > 0:
                raise ValueError(
                    f"std of CT channel {channel} ({name}) is missing, 0 or less, needed a positive number"
                )
    return plans


# nnU-Net plans, stock or ours. What stands under our own key is read by `PlansSection.from_dict`.
Plans = Annotated[_Plans, AfterValidator(_divides_by_positive)]


class PlansReader(TypedDict):
    """Plans of a trained run, of which only the reader of images is needed."""

    __pydantic_config__ = _OPEN
    image_reader_writer: str


class Fold(TypedDict):
    """One fold of splits_final.json."""

    __pydantic_config__ = _OPEN
    train: list[str]
    val: list[str]


Folds = Annotated[list[Fold], Field(min_length=1)]
SPLITS_FILE = "splits_final.json"
# nnUNetTrainer.do_split makes so many, and cannot of fewer cases
NNUNET_FOLDS = 5


def _each_case_once(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    of_case: dict[str, str] = {}
    for patient, case in ((patient, case) for patient, cases in groups.items() for case in cases):
        if case in of_case:
            raise ValueError(f"the case {case!r} is there twice, under {of_case[case]!r} and {patient!r}")
        of_case[case] = patient
    return groups


# patients.json: the cases of every patient
Groups = Annotated[
    dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1), AfterValidator(_each_case_once)
]


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
    """Content of a JSON file, as it stands there, once it is known to be of a kind; see `read_as`."""
    text, _ = _read(path, kind, mend)
    return json.loads(text)


def read_as(path: Path, kind: type[Kind], mend: str) -> Kind:
    """Content of a JSON file as an instance of a kind.

    Args:
        kind: one of this module's types, or any that pydantic knows.
        mend: what to do about a file that is not.

    Raises:
        UserError: it cannot be read or is of another kind; names the file, the key, what came and what was needed.
    """
    return _read(path, kind, mend)[1]


def _read(path: Path, kind: type[Kind], mend: str) -> tuple[bytes, Kind]:
    """A file's text, and what it is an instance of."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is {'missing' if not path.exists() else 'no file'}; {mend}")
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(f"{path} has more than {_LARGEST_BYTES >> 20} MB, which no such file has; {mend}")
        text = path.read_bytes()
        return text, validated(kind, text)
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}); {mend}") from e
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}; {mend}") from e


def read_dataset_json(folder: Path, for_images: bool = True) -> dict[str, Any]:
    """dataset.json in a folder. `for_images`: with what nnU-Net needs to read images, their ending and channels.

    Raises:
        UserError: see `read_as`; or it lacks what is needed.
    """
    path = folder / "dataset.json"
    content = read_json(path, DatasetJson, f"needed an object such as {EXAMPLE_JSON}; see: python -m json.tool {path}")
    missing = [] if "file_ending" in content else ['"file_ending"']
    missing += [] if {"channel_names", "modality"} & content.keys() else ['"channel_names"']
    if for_images and missing:
        raise UserError(f"{path} has no {' and no '.join(missing)}, which nnU-Net needs; add it, e.g. {EXAMPLE_JSON}")
    return content


def channels_of(dataset_json: dict[str, Any]) -> tuple[str, ...]:
    """Names of the channels in a dataset.json, in order; () where it has none."""
    names = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    return tuple(map(str, names.values()))


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
