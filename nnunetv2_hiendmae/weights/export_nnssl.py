"""A Primus encoder in the container of nnssl, whose weights nnU-Net's own door reads."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures import EncoderSpec, PrimusEncoder
from nnunetv2_hiendmae.architectures.kinds import MLP_RATIO, NORM_EPS
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import replacing
from nnunetv2_hiendmae.volume_format import DEFAULT_INTERPOLATION, VolumeFormat, resampling
from nnunetv2_hiendmae.weights.adaptation_plan import CITATIONS, PLAN, PRIMUS_X
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata
from nnunetv2_hiendmae.weights.export import EXPORT_KEY
from nnunetv2_hiendmae.weights.nnunet import NETWORK
from nnunetv2_hiendmae.weights.primus import theirs
from nnunetv2_hiendmae.weights.report import LoadReport

NNSSL_TARGET = "nnssl"
# what nnssl's list of citations calls such an entry
_CITED = "Pre-Training Method"
_ZSCORE = "ZScoreNormalization"


def export_nnssl(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: EncoderMetadata,
    report: LoadReport,
    *,
    new: bool = False,
) -> tuple[LoadReport, tuple[str, ...]]:
    """Writes what `export.export_encoder` writes for other programs, as a PyTorch file.

    The plan calls the network PrimusX, the one whose sizes stand in the plan and whose tokens lie as here.

    Raises:
        UserError: nnssl has no such encoder, or the file cannot be written; an existing one is untouched.
    """
    spec = metadata.spec
    _check(spec)
    content = {
        NETWORK: {theirs(name): _alone(tensor) for name, tensor in state.items()},
        PLAN: _plan(spec, metadata.volume),
        CITATIONS: [{"type": _CITED, "name": metadata.method, "bibtex_citations": [*metadata.citations]}],
        EXPORT_KEY: metadata.to_json(),
    }
    with replacing(path, new=new) as temporary, temporary.open("wb") as f:
        torch.save(content, f)
    records = tuple(replace(r, target=r.target and theirs(r.target)) for r in report.records)
    seen = metadata.volume
    others = set(seen.normalization_schemes) - {_ZSCORE}
    notes = {
        "nnU-Net's pretrained trainers normalise every image by its mean and standard deviation; this encoder saw "
        f"{f'the window {seen.window_hu} HU' if seen.window_hu else ', '.join(sorted(others))}": bool(
            seen.window_hu or others
        ),
        "the plan says noresample: this encoder saw images at spacings of their own": seen.spacing_mm is None,
    }
    return replace(report, records=records), tuple(note for note, applies in notes.items() if applies)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without the rest of the storage that it is a view of, which `torch.save` would write too."""
    plain = tensor.detach().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.numel() * plain.element_size() else plain.clone()


def _check(spec: EncoderSpec) -> None:
    if spec.kind != PrimusEncoder.kind:
        raise UserError(f"--to {NNSSL_TARGET}: it has no encoder of kind '{spec.kind}'; convert without --to")
    hidden = int(spec.embed_dim * MLP_RATIO)
    unlike = {
        f"{spec.register_tokens} register tokens": spec.register_tokens > 0,
        f"an mlp_ratio of {spec.mlp_ratio:g}": int(spec.embed_dim * spec.mlp_ratio) != hidden,
        f"a norm_eps of {spec.norm_eps:g}": spec.norm_eps != NORM_EPS,
    }
    if told := ", ".join(name for name, applies in unlike.items() if applies):
        raise UserError(f"--to {NNSSL_TARGET}: its Primus has no place for {told}; convert without --to")


def _plan(spec: EncoderSpec, seen: VolumeFormat) -> dict[str, Any]:
    """A complete adaptation plan, of plain lists and numbers."""
    crop, channels = list(spec.img_size), spec.in_channels
    spacing = None if seen.spacing_mm is None else list(seen.spacing_mm)
    # nnssl's names of a style; with each the spacing that counts stands beside it
    style = "noresample" if spacing is None else "onemmiso" if set(spacing) == {1.0} else "median"
    entries = resampling(seen.interpolation or DEFAULT_INTERPOLATION)
    configuration = {
        "data_identifier": f"nnsslPlans_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": [*seen.normalization_schemes] or [_ZSCORE] * channels,
        "use_mask_for_norm": any(seen.use_mask_for_norm),
        # nnssl's masks are nnU-Net's segmentations
        **{key.replace("_seg", "_mask", 1): value for key, value in entries.items() if "probabilities" not in key},
        "spacing": spacing,
        "patch_size": crop,
    }
    kwargs = {
        "input_channels": channels,
        "embed_dim": spec.embed_dim,
        "patch_embed_size": list(spec.patch_size),
        "output_channels": channels,
        "input_shape": crop,
        "encoder_eva_depth": spec.depth,
        "encoder_eva_numheads": spec.num_heads,
        "decoder_eva_depth": 0,
        "decoder_eva_numheads": 0,
        "patch_drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "attn_drop_rate": 0.0,
        "init_values": spec.layer_scale,
        "scale_attn_inner": spec.inner_norm,
    }
    return {
        "architecture_plans": {
            "arch_class_name": PRIMUS_X,
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "dataset_name": "unknown",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": spacing or [1.0, 1.0, 1.0],
            "image_reader_writer": seen.image_reader_writer or "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {style: configuration},
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": crop,
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
    }
