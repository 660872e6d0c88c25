"""Gathering what a demo measured: losses, Dice, times, memory, versions."""

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunetv2_hiendmae.demo.budget import method_settings
from nnunetv2_hiendmae.demo.datasets import DemoData
from nnunetv2_hiendmae.demo.process import Phase, read_jsonl

PACKAGES = ("nnunetv2_hiendmae", "nnunetv2", "torch", "timm", "lightning-fabric", "dynamic-network-architectures")


def collect(
    output: Path, data: DemoData, facts: dict[str, Any], runs: Sequence[Any], phases: Sequence[Phase]
) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        facts: methods, seed, device and budget.
        runs: the fine-tunings (`name`, `plans`, `trainer`).
    """
    return {
        "settings": facts,
        "data": {
            "pretraining": data.pretraining.name,
            "finetuning": data.finetuning.name,
            "embedded": data.embedded,
            "dice_on": "held-out test cases" if data.held_out else "validation cases of fold 0",
        },
        "pretraining": {method: _pretraining(output, method, facts["views_per_step"]) for method in facts["methods"]},
        "finetuning": {run.name: finetuning_losses(fold_folder(output, data, run)) for run in runs},
        "dice": {run.name: dice(summary_file(output, data, run), data) for run in runs},
        "seconds": {phase.name: phase.seconds for phase in phases},
        "seconds_total": round(sum(phase.seconds for phase in phases), 1),
        "peak_gb_of_largest_process": {phase.name: phase.peak_gb for phase in phases},
        "commands": [phase.command for phase in phases],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": _cores()},
    }


def fold_folder(output: Path, data: DemoData, run: Any) -> Path:
    """Where nnU-Net put the trained fold."""
    return output / "nnUNet_results" / data.finetuning.name / f"{run.trainer}__{run.plans}__3d_fullres" / "fold_0"


def predictions_folder(output: Path, data: DemoData, run: Any) -> Path:
    """Segmentations that the Dice values belong to: of the held-out cases, or of the fold's validation cases."""
    return output / "predictions" / run.name if data.held_out else fold_folder(output, data, run) / "validation"


def summary_file(output: Path, data: DemoData, run: Any) -> Path:
    """nnU-Net's `summary.json` for `predictions_folder`."""
    return predictions_folder(output, data, run) / "summary.json"


def _pretraining(output: Path, method: str, views_per_step: int) -> dict[str, Any]:
    settings = method_settings(method)
    return {
        **pretraining_losses(output / "pretraining" / method / "log.jsonl"),
        "samples_per_step": views_per_step // settings.views,
        "views_per_sample": settings.views,
        "options": settings.options,
    }


def pretraining_losses(log: Path) -> dict[str, Any]:
    """Mean loss of the first and of the last epoch, and the number of steps."""
    steps = [line for line in read_jsonl(log) if "loss" in line]
    first, last = steps[0]["epoch"], steps[-1]["epoch"]
    return {
        "first_epoch_loss": fmean(s["loss"] for s in steps if s["epoch"] == first),
        "last_epoch_loss": fmean(s["loss"] for s in steps if s["epoch"] == last),
        "steps": len(steps),
    }


def finetuning_losses(fold: Path) -> dict[str, Any]:
    """nnU-Net's training loss of the first and last epoch, from its text log."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(fold.glob("training_log_*.txt")))
    losses = [float(value) for value in re.findall(r"train_loss (\S+)", text)]
    return {"first_epoch_loss": losses[0], "last_epoch_loss": losses[-1], "epochs": len(losses)}


def dice(summary: Path, data: DemoData) -> dict[str, Any]:
    """Dice per class (None where the truth holds none of it) and their mean over the classes that the truth holds."""
    content = json.loads(summary.read_text(encoding="utf-8"))
    per_class: dict[str, float | None] = {}
    for name, value in foreground(data).items():
        cases = [case["metrics"][str(value)] for case in content["metric_per_case"]]
        values = [case["Dice"] for case in cases if case["n_ref"] > 0 and not math.isnan(case["Dice"])]
        per_class[name] = round(fmean(values), 4) if values else None
    known = [value for value in per_class.values() if value is not None]
    return {"per_class": per_class, "mean": round(fmean(known), 4) if known else None}


def foreground(data: DemoData) -> dict[str, int | tuple[int, ...]]:
    """Class name -> label, or the tuple of labels of a region; without background and ignore label."""
    labels = {k: tuple(v) if isinstance(v, list) else v for k, v in data.dataset_json["labels"].items()}
    return {name: value for name, value in labels.items() if value != 0 and name not in ("background", "ignore")}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
