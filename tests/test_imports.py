"""Who may import whom (CONTRIBUTING, "Layers"), read from the source of every module."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nnunetv2_hiendmae
from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import PRESETS, build_encoder
from nnunetv2_hiendmae.weights import EncoderMetadata, save_encoder

PACKAGE = Path(nnunetv2_hiendmae.__file__).parent
NAME = PACKAGE.name
# leaves that anybody may use
BASE = {"errors", "files", "environment", "options", "schemas", "volume_format", "recipes", "plans_section"}
BASE |= {"former_plans", "optim", "figures", "threads", "processes", "host_memory", "randomness"}
# part of the package -> parts of ours that it may import
ALLOWED = {
    "__init__": BASE | {"weights", "planning", "preprocessing", "pretraining", "classification", "evaluation"},
    "_discovery": {"trainers"},
    "errors": set(),
    "environment": {"errors"},
    "files": {"errors"},
    "options": {"architectures", "errors", "plans_section", "recipes", "volume_format"},
    "schemas": {"errors"},
    "volume_format": {"schemas"},
    "plans_section": {"schemas"},
    "recipes": {"plans_section", "volume_format"},
    "former_plans": {"plans_section", "schemas", "volume_format"},
    "optim": set(),
    "threads": set(),
    "processes": {"environment", "errors"},
    "host_memory": set(),
    "randomness": set(),
    "figures": {"errors", "files"},
    "architectures": {"errors", "schemas"},
    "weights": BASE | {"architectures"},
    "planning": BASE | {"architectures", "weights"},
    "preprocessing": BASE | {"architectures", "weights", "planning"},
    "training": BASE | {"architectures", "weights"},
    "pretraining": BASE | {"architectures", "weights", "training"},
    "trainers": BASE | {"architectures", "weights"},
    "classification": BASE | {"architectures", "weights", "training"},
    "evaluation": BASE,
    "inspection": BASE | {"architectures", "weights", "training", "pretraining", "preprocessing"},
    "demo": BASE | {"inspection", "evaluation"},
    "cli": {"commands", "errors", "threads"},
    # everything
    "commands": None,
}
MAY_IMPORT_NNUNET = (
    "planning/",
    "preprocessing/",
    "trainers/",
    "training/",
    "demo/",
    "inspection/volumes",
    "evaluation/folds",
    "evaluation/measuring",
    "commands/doctor",
)

MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))


def imports(module: str) -> set[str]:
    """Full dotted names that a module imports, wherever in its body."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(dotted: str) -> str:
    """'nnunetv2_hiendmae.weights.report.X' -> 'weights'."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_layers(module):
    part = module.split("/")[0]
    assert part in ALLOWED, f"{part} is new: say in this test what it may import"
    if ALLOWED[part] is None:
        return
    allowed = ALLOWED[part] | {part}
    ours = {part_of(name) for name in imports(module) if name.split(".")[0] == NAME}
    assert ours <= allowed, f"{module} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_border_knows_nnunet(module):
    used = [name for name in imports(module) if name.split(".")[0] == "nnunetv2"]
    assert not used or module.startswith(MAY_IMPORT_NNUNET), f"{module} imports {used}"


LIGHT = [NAME, f"{NAME}.cli", f"{NAME}.architectures", f"{NAME}.weights", f"{NAME}.pretraining.declared"]
HEAVY = {"torch", "torchvision", "nnunetv2", "timm", "matplotlib", "huggingface_hub"}


def heavy_after(code: str, *arguments: str, libraries: set[str] = HEAVY) -> tuple[set[str], str]:
    """What a process has imported of the libraries that take seconds, and what it printed before."""
    code = f"import atexit, sys; atexit.register(lambda: print('#', *({libraries} & set(sys.modules)))); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"},
    )
    assert done.returncode in (0, 2), done.stderr
    printed, _, last = done.stdout.rpartition("#")
    return set(last.split()), printed


@pytest.mark.parametrize("module", LIGHT)
def test_light_at_import(module):
    assert heavy_after(f"import {module}")[0] == set()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["env"], ["methods"], ["methods", "--json"], ["presets"], ["presets", "--json"], ["--version"], ["--help"]),
        *([name, "--help"] for name in cli.COMMANDS),
        *(["classify", action, "--help"] for action in ("train", "predict")),
    ],
    ids=" ".join,
)
def test_commands_that_read_tables_import_nothing_heavy(arguments):
    heavy, printed = heavy_after(f"from {NAME}.cli import main; sys.exit(main())", *arguments)
    assert heavy == set() and printed
    assert "--help" not in arguments or printed.startswith("usage: hiendmae")


@pytest.mark.parametrize("arguments", [["env"], ["doctor", "--help"], ["compare", "--help"], ["splits", "--help"]])
def test_commands_without_options_of_methods_import_the_standard_library_alone(arguments):
    """`hiendmae env` runs in every shell start-up."""
    code = f"from {NAME}.cli import main; sys.exit(main())"
    assert heavy_after(code, *arguments, libraries={"numpy", "pydantic", "filelock"})[0] == set()


def test_inspect_reads_an_encoder_file_without_torch(tmp_path):
    spec = PRESETS["vit_nano_p8"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_encoder(spec).state_dict().items()}
    save_encoder(
        tmp_path / "e", {name: torch.rand(shape) for name, shape in shapes.items()}, EncoderMetadata(spec, "mim")
    )
    heavy, printed = heavy_after(f"from {NAME}.cli import main; main()", "inspect", str(tmp_path / "e"), "--json")
    assert heavy == set()
    about = json.loads(printed)
    assert about["loads"] == f"{len(shapes)} loaded, 0 adapted, 0 dropped"
    assert about["sha256"] == hashlib.sha256((tmp_path / "e").read_bytes()).hexdigest()


def test_doctor_imports_torch_for_the_device_alone():
    heavy, _ = heavy_after(f"from {NAME}.cli import main; sys.exit(main())", "doctor")
    assert heavy == {"torch"}


def test_a_worker_of_preprocessing_builds_no_network():
    """Spawned, it unpickles this function."""
    heavy, _ = heavy_after(f"from {NAME}.preprocessing.cases import preprocess_case")
    assert not heavy & {"timm", "torchvision", "matplotlib"}
