"""An encoder under the names of timm or MONAI, for programs that read those."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, ViTEncoder
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata, write_safetensors
from nnunetv2_hiendmae.weights.layouts import MONAI_PARTS
from nnunetv2_hiendmae.weights.report import LoadReport, TensorRecord

# where the encoder's metadata stand in the header of an exported file
EXPORT_KEY = "hiendmae_export"
# a tensor's name in the other program, the tensor there, and what was done to it ("" for nothing)
_Exported = tuple[str, Tensor, str]


def _to_timm(name: str, tensor: Tensor, spec: EncoderSpec) -> _Exported:
    """timm's names are ours; its position table has a row for CLS, which is zero with us."""
    if name != "pos_embed" or not spec.cls_token:
        return name, tensor, ""
    return name, torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1), "a zero row for CLS put first"


def _to_monai(name: str, tensor: Tensor, _spec: EncoderSpec) -> _Exported:
    """For `monai.networks.nets.ViT(..., proj_type="conv", qkv_bias=True)`, with `classification=True` for CLS, whose
    head is not an encoder's and not written. About its LayerNorms see `export_encoder`."""
    for ours, theirs in {ours: theirs for theirs, ours in MONAI_PARTS}.items():
        name = name.replace(ours, theirs)
    return name, tensor, ""


# how tensors get their names, the leaves of a block that only the other program has and never uses, with what fills
# them (a strict load asks for them), and the eps of its LayerNorms
TARGETS = {
    "timm": (_to_timm, {}, 1e-6),
    "monai": (_to_monai, {"norm_cross_attn.weight": 1.0, "norm_cross_attn.bias": 0.0}, 1e-5),
}


def export_encoder(
    target: str,
    path: Path,
    state: Mapping[str, Tensor],
    metadata: EncoderMetadata,
    report: LoadReport,
    *,
    new: bool = False,
) -> tuple[LoadReport, tuple[str, ...]]:
    """Writes an encoder under the names of `target`. `report`: what became of a source's tensors in `state`;
    `new`: see `files.replacing`.

    Returns:
        What became of them under the exported names, and what a program that reads those must know.

    Raises:
        UserError: the target is unknown or has no such encoder, or the file cannot be written; an existing one is
            untouched.
    """
    if target not in TARGETS:
        raise UserError(f"--to {target} is unknown, needed one of {', '.join(TARGETS)}, nnssl, hub-folder")
    spec = metadata.spec
    if spec.kind != ViTEncoder.kind:
        raise UserError(f"--to {target}: it has no encoder of kind '{spec.kind}'; convert without --to")
    rename, unused, eps = TARGETS[target]
    named = {name: rename(name, tensor, spec) for name, tensor in state.items()}
    fresh = {
        f"blocks.{i}.{leaf}": torch.full((spec.embed_dim,), value)
        for i in range(spec.depth)
        for leaf, value in unused.items()
    }
    tensors = {theirs: tensor for theirs, tensor, _ in named.values()}
    write_safetensors(path, tensors | fresh, {"format": "pt", EXPORT_KEY: metadata.to_json()}, new=new)
    records = []
    for record in report.records:
        theirs, _, detail = named.get(record.target, (None, None, ""))
        records.append(replace(record.changed(detail), target=theirs))
    records += [TensorRecord(None, name, "fresh", "MONAI's blocks have it and never use it") for name in fresh]
    notes = (
        f"{target}'s LayerNorms have eps {eps:g}, this encoder's {spec.norm_eps:g}: set it in each of them for the "
        "same output",
    )
    return replace(report, records=tuple(records)), notes if spec.norm_eps != eps else ()
