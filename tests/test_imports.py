"""Who may import whom (CONTRIBUTING, "Layers"), read from the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_hiendmae

PACKAGE = Path(nnunetv2_hiendmae.__file__).parent
NAME = PACKAGE.name
# leaves that anybody may use
BASE = {
    "errors",
    "files",
    "environment",
    "options",
    "schemas",
    "volume_format",
    "recipes",
    "plans_section",
    "optim",
    "figures",
}
# part of the package -> parts of ours that it may import
ALLOWED = {
    "__init__": BASE | {"weights", "planning", "preprocessing", "pretraining", "classification", "evaluation"},
    "_discovery": {"trainers"},
    "errors": set(),
    "environment": {"errors"},
    "files": {"errors"},
    "options": {"errors", "plans_section", "recipes", "volume_format"},
    "schemas": {"errors"},
    "volume_format": {"schemas"},
    "plans_section": {"schemas"},
    "recipes": {"plans_section", "volume_format"},
    "optim": set(),
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
    "cli": {"commands", "errors"},
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


@pytest.mark.parametrize("module", [NAME, f"{NAME}.cli"])
def test_light_at_import(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'nnunetv2', 'timm', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []
