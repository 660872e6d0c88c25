"""An encoder under the names of timm or MONAI, for programs that read those."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord
from nnunetv2_hiendmae.weights.stream import write_safetensors

# where the encoder's metadata stand in the header of an exported file
EXPORT_KEY = "hiendmae_export"
Exported = tuple[dict[str, Tensor], list[TensorRecord]]


def to_timm(state: Mapping[str, Tensor], spec: EncoderSpec) -> Exported:
    """timm's names are ours; its position table has a row for CLS, which is zero with us."""
    tensors, records = dict(state), [TensorRecord(k, k, "loaded") for k in state if k != "pos_embed"]
    if spec.cls_token:
        table = state["pos_embed"]
        tensors["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        records.append(TensorRecord("pos_embed", "pos_embed", "adapted", "a zero row for CLS put first"))
    else:
        records.append(TensorRecord("pos_embed", "pos_embed", "loaded"))
    return tensors, records


_MONAI_NAMES = (
    ("patch_embed.proj.", "patch_embedding.patch_embeddings."),
    ("pos_embed", "patch_embedding.position_embeddings"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.linear1."),
    (".mlp.fc2.", ".mlp.linear2."),
)


def to_monai(state: Mapping[str, Tensor], spec: EncoderSpec) -> Exported:
    """For `monai.networks.nets.ViT(..., proj_type="conv", qkv_bias=True)`, with `classification=True` for CLS.

    Its blocks hold a norm for cross-attention that is never used and that a strict load asks for; the head of
    `classification=True` is not an encoder's and not written. About its LayerNorms see `export_notes`.
    """
    tensors, records = {}, []
    for name, tensor in state.items():
        theirs = name
        for ours, monai in _MONAI_NAMES:
            theirs = theirs.replace(ours, monai)
        tensors[theirs] = tensor
        records.append(TensorRecord(name, theirs, "loaded"))
    for i in range(spec.depth):
        for leaf, value in (("weight", torch.ones(spec.embed_dim)), ("bias", torch.zeros(spec.embed_dim))):
            name = f"blocks.{i}.norm_cross_attn.{leaf}"
            tensors[name] = value
            records.append(TensorRecord(None, name, "fresh", "MONAI's blocks have it and never use it"))
    return tensors, records


# of the ViT that the other program builds
NORM_EPS = {"timm": 1e-6, "monai": 1e-5}
TARGETS: dict[str, Callable[[Mapping[str, Tensor], EncoderSpec], Exported]] = {"timm": to_timm, "monai": to_monai}


def export_names(target: str, state: Mapping[str, Tensor], metadata: EncoderMetadata) -> Exported:
    """Tensors under the names of `target`, and a record of each.

    Raises:
        UserError: the target is unknown, or has no such encoder.
    """
    if target not in TARGETS:
        raise UserError(f"--to {target} is unknown, needed one of {', '.join(TARGETS)}")
    if metadata.spec.kind != "vit":
        raise UserError(f"--to {target}: it has no encoder of kind '{metadata.spec.kind}'; convert without --to")
    return TARGETS[target](state, metadata.spec)


def export_notes(target: str, metadata: EncoderMetadata) -> tuple[str, ...]:
    """What a program that reads the exported names must know."""
    eps = metadata.spec.norm_eps
    if eps == NORM_EPS[target]:
        return ()
    return (
        f"{target}'s LayerNorms have eps {NORM_EPS[target]:g}, this encoder's {eps:g}: set it in each of them for the "
        "same output",
    )


def exported_report(report: LoadReport, records: list[TensorRecord]) -> LoadReport:
    """What became of a source's tensors under the exported names.

    Args:
        report: source → encoder.
        records: encoder → exported names.
    """
    by_ours = {r.source: r for r in records if r.source}
    joined = []
    for record in report.records:
        later = by_ours.get(record.target)
        if later is None:
            joined.append(record)
            continue
        detail = "; ".join(d for d in (record.detail, later.detail) if d)
        status = record.status if later.status == "loaded" else later.status
        joined.append(TensorRecord(record.source, later.target, status, detail))
    return replace(report, records=(*joined, *(r for r in records if r.source is None)))


def write_exported(path: Path, tensors: Mapping[str, Tensor], metadata: EncoderMetadata) -> None:
    """
    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    write_safetensors(path, tensors, {"format": "pt", EXPORT_KEY: metadata.to_json()})
