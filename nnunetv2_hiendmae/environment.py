"""Where nnU-Net's folders and our trainers are, which devices there are, and how workers end. Imports nothing heavy
before it is needed: `hiendmae env` answers at once."""

import multiprocessing
import os
import threading
from pathlib import Path

from nnunetv2_hiendmae.errors import UserError

NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
EXT_TRAINER_VARIABLE = "nnUNet_extTrainer"


def discovery_folder() -> Path:
    """The one folder that nnU-Net's trainer search may look into (it imports all it finds: never the package root)."""
    return Path(__file__).parent / "_discovery"


def with_discovery(current: str | None) -> str:
    """Value of `nnUNet_extTrainer` that finds our trainers and keeps whatever stood there before."""
    ours = str(discovery_folder())
    kept = [p for p in (current or "").split(os.pathsep) if p.strip() and p != ours]
    return os.pathsep.join([ours, *kept])


def enable_discovery() -> None:
    """Lets nnU-Net commands started from this process find our trainers."""
    os.environ[EXT_TRAINER_VARIABLE] = with_discovery(os.environ.get(EXT_TRAINER_VARIABLE))


def check_device(device: str) -> None:
    """Raises UserError: torch sees no such device, "cuda", "cpu" or "mps", on this machine."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda, but torch sees no CUDA device; run with -device cpu, or see: hiendmae doctor")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps, but torch sees no Apple GPU; run with -device cpu")


def device_words() -> str:
    """What a command needs behind it to run on this machine: " -device cpu" without a GPU, as cuda is the default of
    nnU-Net and of ours."""
    import torch

    return "" if torch.cuda.is_available() else " -device cpu"


def end_with_parent() -> None:
    """Lets this process, a worker, end at once when the one that started it is killed, also in the midst of work."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def nnunet_folder(variable: str) -> Path:
    """Folder named by one of nnU-Net's variables.

    Raises:
        UserError: the variable is unset or empty.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"{variable} is not set, needed the folder nnU-Net uses; run: export {variable}=/your/{variable}"
        )
    return Path(value)


def dataset_id(name: str) -> int:
    """The number in a full dataset name: 1001 of 'Dataset1001_X'; nnU-Net writes at least three digits."""
    return int(name.removeprefix("Dataset").partition("_")[0])


def preprocess_command(dataset: str, plans_name: str, configuration: str) -> str:
    """Stock nnU-Net's, which takes a dataset's number and not its name."""
    return f"nnUNetv2_preprocess -d {dataset_id(dataset)} -plans_name {plans_name} -c {configuration}"


def is_called(name: str, dataset: str | int) -> bool:
    """Whether a full dataset name is that of an id or a name."""
    text = str(dataset)
    return name.startswith(f"Dataset{int(text):03d}_") if text.isdigit() else name == text


def dataset_name(dataset: str | int) -> str:
    """Full nnU-Net dataset name ('Dataset001_X') for an id or a name that exists in raw or preprocessed.

    Raises:
        UserError: no such dataset, or the id is ambiguous.
    """
    roots = [nnunet_folder("nnUNet_raw"), nnunet_folder("nnUNet_preprocessed")]
    names = sorted({p.name for root in roots if root.is_dir() for p in root.glob("Dataset[0-9]*_*") if p.is_dir()})
    found = [name for name in names if is_called(name, dataset)]
    if len(found) == 1:
        return found[0]
    if not found:
        where = f"in {roots[0]} or {roots[1]} (there: {', '.join(names) or 'none'})"
        raise UserError(f"no dataset '{dataset}' {where}; check -d, or run: ls {roots[0]}")
    raise UserError(f"dataset id {dataset} is ambiguous ({', '.join(found)}); give the full name to -d")
