"""`hiendmae doctor`: is everything in place to run, and how to mend what is not."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunetv2_hiendmae.commands.arguments import add_json
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, NNUNET_VARIABLES, discovery_folder

PACKAGES = ("nnunetv2", "torch", "lightning-fabric", "timm", "dynamic-network-architectures", "blosc2", "safetensors")
TRAINER = "nnUNetTrainer_HiEndMAE"
FREE_GB = 10
HELP = "check nnU-Net's variables, versions, trainer discovery, device and disk"


@dataclass(frozen=True)
class Check:
    """One finding; `mend` says what to run when it is not ok."""

    name: str
    ok: bool
    found: str
    mend: str = ""

    def __str__(self) -> str:
        return f"[ok] {self.name}: {self.found}" if self.ok else f"[!!] {self.name}: {self.found}; {self.mend}"


add_arguments = add_json


def run(args: argparse.Namespace) -> int:
    # in the order in which one would mend them
    checks = [*_packages(), *map(_folder, NNUNET_VARIABLES), _discovery(), _device()]
    print(json.dumps([*map(vars, checks)], indent=2) if args.json else "\n".join(map(str, checks)))
    return 0 if all(c.ok for c in checks) else 2


def _packages() -> Iterator[Check]:
    yield Check("python", sys.version_info >= (3, 10), sys.version.split()[0], "install Python 3.10 or newer")
    for name in PACKAGES:
        try:
            yield Check(name, True, version(name))
        except PackageNotFoundError:
            yield Check(name, False, "missing", "run: pip install --upgrade nnunetv2_hiendmae")


def _folder(variable: str) -> Check:
    value = os.environ.get(variable)
    if not value:
        return Check(variable, False, "not set", f"run: export {variable}=/your/{variable}")
    folder = Path(value)
    if not folder.is_dir():
        return Check(variable, False, f"{folder} does not exist", f"run: mkdir -p {folder}")
    if not os.access(folder, os.R_OK if variable == "nnUNet_raw" else os.W_OK):
        return Check(variable, False, f"{folder} is not accessible", f"run: chmod u+rwx {folder}")
    free = shutil.disk_usage(folder).free / 1e9
    mend = f"free some space: fewer than {FREE_GB} GB are left for {folder}"
    return Check(variable, free >= FREE_GB or variable == "nnUNet_raw", f"{folder}, {free:.0f} GB free", mend)


def _discovery() -> Check:
    value = os.environ.get(EXT_TRAINER_VARIABLE, "")
    mend = 'run: eval "$(hiendmae env)"'
    # any spelling of the folder will do, nnU-Net looks into it
    if discovery_folder() not in map(Path, value.split(os.pathsep)):
        return Check("trainers", False, f"{EXT_TRAINER_VARIABLE} is {value or 'not set'}", mend)
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    found = recursive_find_python_class(str(discovery_folder()), TRAINER, None, cleanup_imports_from_base_folder=True)
    return Check("trainers", found is not None, f"nnU-Net finds {TRAINER}" if found else f"{TRAINER} not found", mend)


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("device", True, f"no GPU, {os.cpu_count()} CPU cores; add -device cpu to the commands")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Check("device", True, f"{names} ({precision})")
