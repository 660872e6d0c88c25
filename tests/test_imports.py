"""Who may import whom (DESIGN §2), read from the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_hiendmae

PACKAGE = Path(nnunetv2_hiendmae.__file__).parent
NAME = PACKAGE.name
BASE = {"errors", "files"}
# part of the package -> parts of ours that it may import
ALLOWED = {
    "__init__": {"weights"},
    "_discovery": {"trainers"},
    "errors": set(),
    "environment": {"errors"},
    "files": {"errors"},
    "plans_section": set(),
    "optim": set(),
    "architectures": {"errors"},
    "weights": {"architectures", *BASE},
    "pretraining": {"architectures", "weights", "optim", "environment", "plans_section", *BASE},
    "planning": {"architectures", "weights", "plans_section", "environment", *BASE},
    "trainers": {"architectures", "weights", "optim", "plans_section", *BASE},
    "classification": {"architectures", "weights", "optim", "environment", "pretraining", *BASE},
    "evaluation": {"architectures", "weights", "pretraining", "environment", *BASE},
    "demo": {"evaluation", "plans_section", "environment", *BASE},
    "doctor": {"environment", *BASE},
    "listing": {"architectures", "weights", "pretraining", "planning", *BASE},
    "cli": {"commands", *BASE},
    "commands": None,  # everything
}
# `hiendmae preprocess`: it makes plans and runs nnU-Net's preprocessor, the rest of pretraining only reads the outcome
PREPARING = ("pretraining/preprocess", "pretraining/fingerprint", "pretraining/cases")
# what classification takes from pretraining: reading volumes in parts, the device's checks, and the run folder
FOR_CLASSIFICATION = {"data", "views", "launch", "checkpoint"}
MAY_IMPORT_NNUNET = (
    "planning/",
    "trainers/",
    "demo/",
    "doctor",
    "evaluation/splits",
    *PREPARING,
    "pretraining/data",
    "pretraining/runlog",
    "evaluation/volumes",
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
    allowed = ALLOWED[part] | {part} | ({"planning"} if module.startswith(PREPARING) else set())
    ours = {part_of(name) for name in imports(module) if name.split(".")[0] == NAME}
    assert ours <= allowed, f"{module} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("classification/")])
def test_classification_knows_no_pretraining_method(module):
    used = {name.split(".")[2] for name in imports(module) if name.startswith(f"{NAME}.pretraining.")}
    assert used <= FOR_CLASSIFICATION, f"{module} imports {sorted(used - FOR_CLASSIFICATION)}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_border_knows_nnunet(module):
    used = [name for name in imports(module) if name.split(".")[0] == "nnunetv2"]
    assert not used or module.startswith(MAY_IMPORT_NNUNET), f"{module} imports {used}"


@pytest.mark.parametrize("module", [NAME, f"{NAME}.cli"])
def test_light_at_import(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'nnunetv2', 'timm', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []
