"""What an encoder file says about its encoder, in its header. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic_core import from_json

from nnunetv2_hiendmae.architectures.spec import EncoderSpec, require
from nnunetv2_hiendmae.errors import LONGEST_ERROR, UserError, printable, some
from nnunetv2_hiendmae.schemas import CLOSED, validated
from nnunetv2_hiendmae.volume_format import VolumeFormat

METADATA_KEY = "hiendmae"
# where the header of our files has the sha256 of the whole file, and what stands there while it is computed
DIGEST_KEY, NO_DIGEST = "hiendmae_sha256", "0" * 64
# of the JSON form, in the order in which files of 0.1 have them; those of the volume stand among the others
_KEYS = (
    *("spec", "method", "spacing_mm", "window_hu", "normalization_schemes", "channel_names", "image_reader_writer"),
    *("orientation", "citations", "intensity_offset", "intensity_scale", "licence", "source", "source_sha256"),
    *("training", "notes", "version", "interpolation", "use_mask_for_norm"),
)


@dataclass(frozen=True)
class EncoderMetadata:
    """What an encoder is, how it was trained, and what it saw.

    Args:
        method: that it was pretrained with.
        volume: how the images that it saw had become arrays.
        citations: BibTeX entries; texts where a foreign file has no BibTeX.
        source, source_sha256: name and digest of the foreign file it was converted from.
        training: steps, number of cases and settings of the run, for the record.
        notes: what else a reader should know, e.g. about the order of axes; a sentence each.
    """

    __pydantic_config__: ClassVar = CLOSED
    spec: EncoderSpec
    method: str
    volume: VolumeFormat = VolumeFormat()
    citations: tuple[str, ...] = ()
    licence: str = "not stated"
    source: str | None = None
    source_sha256: str | None = None
    training: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    version: str = ""

    def to_json(self) -> str:
        """As stored in the file's header."""
        data = {**asdict(self), **asdict(self.volume), "spec": self.spec.to_dict()}
        return json.dumps({key: data[key] for key in _KEYS})

    @classmethod
    def from_json(cls, text: str) -> "EncoderMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError: not the JSON of encoder metadata.
        """
        # unlike json's, this parser refuses what is nested without end
        data = from_json(text)
        if not isinstance(data, dict) or "volume" in data:
            raise ValueError("no description of an encoder")
        volume = {f.name: data.pop(f.name) for f in fields(VolumeFormat) if f.name in data}
        return validated(cls, json.dumps({**data, "volume": volume}))


def check_size(spec: EncoderSpec, state: Mapping[str, Any]) -> None:
    """Refuses a spec far beyond the tensors (ValueError): what a file says of itself may be of any size, and even a
    network without memory takes time for every block. What is a little beyond them is told by name later."""
    blocks = spec.depth + sum(spec.stem_depths)
    require(blocks <= len(state), f"it describes an encoder of {blocks} blocks, but holds only {len(state)} tensors")
    there = sum(tensor.numel() for tensor in state.values())
    # of a block: queries, keys, values and their projection, and the two layers of the MLP
    block = spec.embed_dim * (4 * spec.embed_dim + 2 * int(min(spec.embed_dim * spec.mlp_ratio, there)))
    kernel = spec.embed_dim * spec.patch_voxels if not spec.stem_dims else spec.in_channels * spec.stem_dims[0]
    # whether there are as many of both is a matter of the kind, which has checked it
    stem = sum(width**2 * blocks for width, blocks in zip(spec.stem_dims, spec.stem_depths, strict=False))
    needed = (spec.num_tokens + spec.register_tokens) * spec.embed_dim + spec.depth * block + kernel + stem
    require(needed <= 8 * there, f"it describes an encoder of at least {needed} numbers, its tensors have {there}")


def header_metadata(
    header: Mapping[str, str], key: str, path: Path, state: Mapping[str, Any]
) -> EncoderMetadata | None:
    """Metadata of an encoder under a key of a safetensors file's header; None: there is no such key. Refuses a damaged
    text, and a spec that is too large for the file's tensors (UserError)."""
    if key not in header:
        return None
    try:
        metadata = EncoderMetadata.from_json(header[key])
        check_size(metadata.spec, state)
        # a damaged name of the digest must not pass for a file of 0.1, which had none
        if unknown := header.keys() - {key, DIGEST_KEY, "format"}:
            raise ValueError(f"unknown entries {some(sorted(unknown))} in its header")
        return metadata
    except ValueError as e:
        told = printable(e, LONGEST_ERROR)
        raise UserError(f"{path} is not a readable encoder file ({told}); download or write it again") from e
