"""A trained classifier on disk: weights, and all that prediction must know."""

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.classification.data import Inputs
from nnunetv2_hiendmae.classification.network import Classifier, build_classifier
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import write_with
from nnunetv2_hiendmae.volume_format import VolumeFormat

METADATA_KEY = "hiendmae_classifier"
BEST, LAST = "classifier_best.safetensors", "classifier_last.safetensors"


@dataclass(frozen=True)
class ClassifierMetadata:
    """What a classifier is and what it saw.

    Args:
        classes: names in the order of the outputs.
        volumes: how its training images were prepared.
        method: of the encoder's pretraining, None from scratch.
        epoch: that the weights are of (0-based).
    """

    spec: EncoderSpec
    classes: tuple[str, ...]
    pool: str
    inputs: Inputs
    volumes: VolumeFormat
    plans_name: str
    configuration: str
    method: str | None
    citations: tuple[str, ...]
    epoch: int = 0
    version: str = ""

    def to_json(self) -> str:
        """As stored in the file's header."""
        return json.dumps({**asdict(self), "spec": self.spec.to_dict(), "volumes": self.volumes.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "ClassifierMetadata":
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: not the JSON of a classifier.
        """
        data = _tuples(json.loads(text))
        spec = EncoderSpec.from_dict(data["spec"])
        inputs, volumes = Inputs(**data["inputs"]), VolumeFormat.from_dict(data["volumes"])
        return cls(**{**data, "spec": spec, "inputs": inputs, "volumes": volumes})


def save_classifier(path: Path, network: Classifier, metadata: ClassifierMetadata) -> None:
    """Writes the weights with their metadata, in one step.

    Raises:
        UserError: the file cannot be written; an existing one is untouched.
    """
    header = replace(metadata, version=version("nnunetv2_hiendmae")).to_json()
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    content = save(tensors, metadata={METADATA_KEY: header})
    write_with(path, lambda temporary: temporary.write_bytes(content))


def load_classifier(path: Path) -> tuple[Classifier, ClassifierMetadata]:
    """Classifier of a file in eval mode on the CPU.

    Raises:
        UserError: no such file, or not a classifier of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no classifier at {path}; make one with: hiendmae classify train")
    try:
        with safe_open(path, "pt") as f:
            metadata = ClassifierMetadata.from_json((f.metadata() or {})[METADATA_KEY])
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        network = build_classifier(metadata.spec, len(metadata.classes), metadata.pool)
        network.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path} is not a readable classifier ({reason}); train anew: hiendmae classify train") from e
    return network.eval(), metadata


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: _tuples(v) if isinstance(v, dict) else tuple(v) if isinstance(v, list) else v for k, v in data.items()}
