"""An encoder under the names of timm or MONAI, for programs that read those."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, ViTEncoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.encoder_file import write_safetensors
from nnunetv2_hiendmae.weights.layouts import MONAI_PARTS
from nnunetv2_hiendmae.weights.metadata import EncoderMetadata
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# where the encoder's metadata stand in the header of an exported file
EXPORT_KEY = "hiendmae_export"
# tensors under the other program's names, and a record of each
Exported = tuple[dict[str, Tensor], list[TensorRecord]]


def to_timm(state: Mapping[str, Tensor], spec: EncoderSpec) -> Exported:
    """timm's names are ours; its position table has a row for CLS, which is zero with us."""
    tensors, records = dict(state), {k: TensorRecord(k, k) for k in state}
    if spec.cls_token:
        table = state["pos_embed"]
        tensors["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        records["pos_embed"] = records["pos_embed"].changed("a zero row for CLS put first")
    return tensors, [*records.values()]


_MONAI_NAMES = {ours: theirs for theirs, ours in MONAI_PARTS}


def to_monai(state: Mapping[str, Tensor], spec: EncoderSpec) -> Exported:
    """For `monai.networks.nets.ViT(..., proj_type="conv", qkv_bias=True)`, with `classification=True` for CLS.

    Its blocks hold a norm for cross-attention that is never used and that a strict load asks for; the head of
    `classification=True` is not an encoder's and not written. About its LayerNorms see `export_encoder`.
    """
    tensors, records = {}, []
    for name, tensor in state.items():
        theirs = name
        for ours, monai in _MONAI_NAMES.items():
            theirs = theirs.replace(ours, monai)
        tensors[theirs] = tensor
        records.append(TensorRecord(name, theirs))
    for i in range(spec.depth):
        for leaf, value in (("weight", torch.ones(spec.embed_dim)), ("bias", torch.zeros(spec.embed_dim))):
            name = f"blocks.{i}.norm_cross_attn.{leaf}"
            tensors[name] = value
            records.append(TensorRecord(None, name, "fresh", "MONAI's blocks have it and never use it"))
    return tensors, records


# how tensors get their names, and the eps of the LayerNorms that the other program's ViT has
TARGETS: dict[str, tuple[Callable[[Mapping[str, Tensor], EncoderSpec], Exported], float]] = {
    "timm": (to_timm, 1e-6),
    "monai": (to_monai, 1e-5),
}


def export_encoder(
    path: Path, target: str, state: Mapping[str, Tensor], metadata: EncoderMetadata, report: LoadReport
) -> tuple[LoadReport, tuple[str, ...]]:
    """Writes an encoder under the names of `target`.

    Args:
        report: what became of a source's tensors in `state`.

    Returns:
        What became of them under the exported names, and what a program that reads those must know.

    Raises:
        UserError: the target is unknown or has no such encoder, or the file cannot be written; an existing one is
            untouched.
    """
    if target not in TARGETS:
        raise UserError(f"--to {target} is unknown, needed one of {', '.join(TARGETS)}")
    spec = metadata.spec
    if spec.kind != ViTEncoder.kind:
        raise UserError(f"--to {target}: it has no encoder of kind '{spec.kind}'; convert without --to")
    rename, eps = TARGETS[target]
    tensors, records = rename(state, spec)
    write_safetensors(path, tensors, {"format": "pt", EXPORT_KEY: metadata.to_json()})
    later = {r.source: r for r in records if r.source}
    joined = [_joined(r, later[r.target]) if r.target in later else r for r in report.records]
    joined += [r for r in records if r.source is None]
    report = replace(report, records=tuple(joined))
    if spec.norm_eps == eps:
        return report, ()
    return report, (
        f"{target}'s LayerNorms have eps {eps:g}, this encoder's {spec.norm_eps:g}: set it in each of them for the "
        "same output",
    )


def _joined(record: TensorRecord, later: TensorRecord) -> TensorRecord:
    return replace(record.changed(later.detail), target=later.target)
