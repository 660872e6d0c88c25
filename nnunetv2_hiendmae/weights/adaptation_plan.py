"""The adaptation plan that nnssl puts beside its weights: what it says of the network and of the images."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable
from nnunetv2_hiendmae.schemas import Shape, Spacing, validated
from nnunetv2_hiendmae.weights.find import ForeignEncoder
from nnunetv2_hiendmae.weights.primus import NAMED

PLAN, CITATIONS = "nnssl_adaptation_plan", "citations"
# nnssl's name of a Primus whose sizes stand in its plan
PRIMUS_X = "PrimusX"


class _Kwargs(TypedDict):
    embed_dim: int
    patch_embed_size: Shape
    input_shape: NotRequired[Shape | None]
    encoder_eva_depth: int
    encoder_eva_numheads: Annotated[int, Field(ge=1)]


class _Architecture(TypedDict):
    arch_class_name: str
    arch_kwargs: NotRequired[dict[str, Any] | None]


class _Configuration(TypedDict):
    spacing: NotRequired[Spacing | None]
    spacing_style: NotRequired[str | None]
    patch_size: NotRequired[Shape | None]
    normalization_schemes: Annotated[list[str], Field(min_length=1)]
    use_mask_for_norm: NotRequired[bool | list[bool] | None]
    resampling_fn_data: NotRequired[str]
    resampling_fn_data_kwargs: NotRequired[dict[str, Any]]


class _PretrainPlan(TypedDict):
    dataset_name: str
    image_reader_writer: NotRequired[str | None]
    transpose_forward: NotRequired[list[int] | None]
    configurations: Annotated[dict[str, _Configuration], Field(min_length=1)]


class AdaptationPlan(TypedDict):
    """As nnssl writes it, tuples as lists; nnU-Net takes the first configuration."""

    architecture_plans: _Architecture
    pretrain_plan: _PretrainPlan
    recommended_downstream_patchsize: NotRequired[Shape | None]
    pretrain_patch_size: NotRequired[Shape | None]
    key_to_encoder: NotRequired[str | None]


def read_plan(content: Mapping[str, Any]) -> AdaptationPlan:
    """The plan in a file. UserError: it is damaged, or of a network that is no Primus."""
    try:
        plan = validated(AdaptationPlan, json.dumps(content[PLAN], default=str))
    except (ValueError, TypeError, RecursionError) as e:
        told = printable(str(e), LONGEST_ERROR)
        raise UserError(f"its {PLAN} is damaged ({told}); download the file again") from e
    name = plan["architecture_plans"]["arch_class_name"]
    if name not in (*NAMED, PRIMUS_X):
        raise UserError(
            f"its network is nnssl's {printable(name)}, needed a Primus ({', '.join((*NAMED, PRIMUS_X))}): encoders "
            "here are transformers; nnU-Net itself takes the others"
        )
    return plan


def checked_kwargs(plan: AdaptationPlan, found: ForeignEncoder) -> dict[str, Any]:
    """Sizes that a plan of a PrimusX says; UserError where they are not those of the tensors."""
    architecture = plan["architecture_plans"]
    try:
        kwargs = validated(_Kwargs, json.dumps(architecture.get("arch_kwargs") or {}, default=str))
    except ValueError as e:
        raise UserError(f"the arch_kwargs in its {PLAN} are damaged ({e}); download the file again") from e
    if kwargs["embed_dim"] % kwargs["encoder_eva_numheads"]:
        told = f"{kwargs['encoder_eva_numheads']} heads at width {kwargs['embed_dim']}"
        raise UserError(f"the arch_kwargs in its {PLAN} are damaged ({told}); download the file again")
    blocks = {match[0] for match in map(re.compile(r"eva\.blocks\.\d+\.").match, found.names) if match}
    kernel = found.names.get("down_projection.proj.weight")
    shape = tuple(found.state[kernel].shape) if kernel else ()
    said = (kwargs["embed_dim"], *kwargs["patch_embed_size"], kwargs["encoder_eva_depth"])
    there = (*shape[:1], *shape[2:], len(blocks))
    if shape and said != there:
        raise UserError(
            f"its plan says width, patch and blocks {said}, its tensors have {there}; download the file again"
        )
    return kwargs


def citations_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """All texts of nnssl's list of citations, BibTeX or not."""
    listed = content.get(CITATIONS)
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list | tuple) else []
    found = [entry.get(kind) for entry in entries for kind in ("bibtex_citations", "apa_citations")]
    # a text alone, where nnssl has a list of them
    texts = [[texts] if isinstance(texts, str) else texts for texts in found if isinstance(texts, str | list | tuple)]
    told = (text for listed in texts for text in listed if isinstance(text, str))
    return tuple(dict.fromkeys(printable(text, 2000) for text in told))
