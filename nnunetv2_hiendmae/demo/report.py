"""What came of a demo: losses, Dice, times, memory and versions, pictures, and a page of words."""

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunetv2_hiendmae.demo.datasets import TASKS, DemoData
from nnunetv2_hiendmae.demo.process import Runner
from nnunetv2_hiendmae.evaluation.report import table
from nnunetv2_hiendmae.figures import overlay_picture
from nnunetv2_hiendmae.files import LOG, write_text

PACKAGES = ("nnunetv2_hiendmae", "nnunetv2", "torch", "timm", "lightning-fabric", "dynamic-network-architectures")
PICTURES = "pictures"
OVERLAY = "segmentation.png"
PROGRESS = "progress"
SCRATCH = "scratch"
# the run that starts from the encoder file beside the data
SHIPPED = "shipped"
CT_SOFT_TISSUE = (-175.0, 250.0)
# Dice differences below this say nothing after a few minutes of training on a handful of slices
WORTH_MENTIONING = 0.02


def collect(settings: dict, measured: dict[str, dict], data: DemoData, runner: Runner) -> dict[str, Any]:
    """Everything that `results.json` holds: settings (methods, seed, device, budget), what was measured ("pretraining",
    "finetuning" and "dice" of every run), and what it took."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "settings": settings,
        "data": {
            "pretraining": data.pretraining.name,
            "finetuning": data.finetuning.name,
            "task": data.task,
            "dice_on": "held-out test cases" if data.held_out else "validation cases of fold 0",
        },
        **measured,
        "seconds": runner.seconds,
        "seconds_total": round(sum(runner.seconds.values()), 1),
        "peak_gb_of_largest_process": runner.peak_gb,
        "commands": runner.commands,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": cores},
    }


def pretraining_losses(run_dir: Path) -> dict[str, Any]:
    """Mean loss of the first and of the last epoch, and the number of steps, from a run's log."""
    lines = (run_dir / LOG).read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, filter(str.strip, lines)) if "loss" in step]
    first, last = (fmean(s["loss"] for s in steps if s["epoch"] == steps[i]["epoch"]) for i in (0, -1))
    return {"first_epoch_loss": first, "last_epoch_loss": last, "steps": len(steps)}


def finetuning_losses(fold: Path) -> dict[str, Any]:
    """nnU-Net's training loss of the first and last epoch, from its text log."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(fold.glob("training_log_*.txt")))
    losses = [float(value) for value in re.findall(r"train_loss (\S+)", text)]
    return {"first_epoch_loss": losses[0], "last_epoch_loss": losses[-1], "epochs": len(losses)}


def dice(predictions: Path, data: DemoData) -> dict[str, Any]:
    """Dice per class (None where the truth holds none of it) and their mean over the classes that the truth holds,
    from nnU-Net's `summary.json`."""
    content = json.loads((predictions / "summary.json").read_text(encoding="utf-8"))
    per_class: dict[str, float | None] = {}
    for name, value in data.foreground.items():
        cases = [case["metrics"][str(value)] for case in content["metric_per_case"]]
        values = [case["Dice"] for case in cases if case["n_ref"] > 0 and not math.isnan(case["Dice"])]
        per_class[name] = round(fmean(values), 4) if values else None
    known = [value for value in per_class.values() if value is not None]
    return {"per_class": per_class, "mean": round(fmean(known), 4) if known else None}


def write_pictures(output: Path, data: DemoData, predictions: Mapping[str, Path], outcome: dict[str, Any]) -> None:
    """Into `pictures`: each method's progress and last reconstructions, and truth and predictions of the first case;
    `predictions` are folders by the name of the run."""
    pictures = output / PICTURES
    pictures.mkdir(exist_ok=True)
    for method in outcome["pretraining"]:
        run_dir = output / "pretraining" / method
        shutil.copyfile(run_dir / "progress.png", pictures / f"{method}_{PROGRESS}.png")
        # epoch_NUMBER_VIEW: of every view the last one that was drawn
        for montage in sorted((run_dir / "reconstructions").glob("epoch_*_*.png")):
            shutil.copyfile(montage, pictures / f"{method}_{montage.stem.split('_', 2)[2]}.png")

    ending, part = data.dataset_json["file_ending"], "Ts" if data.held_out else "Tr"
    case = min(p.name for p in next(iter(predictions.values())).glob(f"*{ending}")).removesuffix(ending)
    masks = {"labels": data.finetuning / f"labels{part}"}
    masks |= {f"{name}, Dice {_number(outcome['dice'][name]['mean'])}": f for name, f in predictions.items()}
    overlay_picture(
        pictures / OVERLAY,
        data.finetuning / f"images{part}" / f"{case}_0000{ending}",
        {name: folder / f"{case}{ending}" for name, folder in masks.items()},
        _coloured(data.foreground),
        window=CT_SOFT_TISSUE if data.first_channel_is_ct else None,
        title=f"{data.finetuning.name}, case {case}",
    )


def write_report(output: Path, outcome: dict[str, Any]) -> None:
    """Writes `report.md`."""
    machine, data, settings = outcome["machine"], outcome["data"], outcome["settings"]
    peaks = outcome["peak_gb_of_largest_process"]
    losses = ([name, _loss(run), str(run["epochs"])] for name, run in outcome["finetuning"].items())
    times = ([name, f"{seconds:.0f}", f"{peaks[name]:.1f}"] for name, seconds in outcome["seconds"].items())
    methods = ", ".join(f"`{name}`" for name in settings["methods"])
    commands = "\n".join(outcome["commands"])
    paragraphs = [
        "# Demo: pretrain, fine-tune, predict",
        f"Pretrained with {methods} on {data['pretraining']} (no labels), fine-tuned on {data['finetuning']} by stock "
        "nnU-Net: from each pretrained encoder and from scratch, with the same network, budget and seed.",
        f"## Dice on the {data['dice_on']}",
        _dice_table(outcome),
        "– : the truth holds none of this class, it is left out of the mean; or no pretraining here.",
        *_shipped(outcome),
        "## How to read this",
        _verdict(outcome),
        "The image, its labels, and the predictions:",
        f"![{OVERLAY}]({PICTURES}/{OVERLAY})",
        "## Pretraining",
        *_pretraining(outcome),
        *_pretraining_pictures(output / PICTURES, settings["methods"]),
        "## Fine-tuning",
        table(["run", "loss, first → last epoch", "epochs"], losses),
        f"{settings['iterations_per_epoch']} batches of {settings['finetune_batch_size']} crops per epoch. nnU-Net's "
        "loss is cross-entropy minus soft Dice, so it may be negative.",
        "## Time and memory",
        f"{outcome['seconds_total'] / 60:.1f} minutes on {machine['cores']} cores ({machine['system']} "
        f"{machine['architecture']}, device {settings['device']}). Memory is that of the largest process.",
        table(["phase", "seconds", "GB"], times),
        "## Commands",
        f"```\n{commands}\n```\nSettings: `{json.dumps(settings)}`",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in outcome["versions"].items()),
    ]
    write_text(output / "report.md", "\n\n".join(paragraphs) + "\n")


def _dice_table(outcome: dict[str, Any]) -> str:
    """One row per run."""
    runs, minutes = outcome["dice"], {phase: f"{seconds / 60:.1f}" for phase, seconds in outcome["seconds"].items()}
    rows = []
    for name, run in runs.items():
        took = [minutes.get(f"{phase}_{name}", "–") for phase in ("pretrain", "train")]
        rows.append([name, *map(_number, run["per_class"].values()), f"**{_number(run['mean'])}**", *took])
    classes = next(iter(runs.values()))["per_class"]
    return table(["run", *classes, "**mean**", "pretraining, min", "fine-tuning, min"], rows)


def _shipped(outcome: dict[str, Any]) -> list[str]:
    """Where the weights of that run come from."""
    if SHIPPED not in outcome["dice"]:
        return []
    plans = outcome["shipped_encoder"]
    return [
        f"`{SHIPPED}` was not pretrained here: it starts from the encoder file that lies beside the data, pretrained "
        f"with `{plans['method']}` (sha256 {plans['encoder_sha256']}), and its network is that of the file. More about "
        f"it: `hiendmae inspect {plans['encoder_file']}`."
    ]


def _pretraining(outcome: dict[str, Any]) -> list[str]:
    """What each method spent, and how its loss went."""
    runs, rows = outcome["pretraining"], []
    for method, run in runs.items():
        options = ", ".join(f"{key}={value}" for key, value in run["options"].items()) or "its own"
        views = f"{run['samples_per_step']} × {run['views_per_sample']}"
        rows.append([method, str(run["steps"]), views, _loss(run), options])
    words = (
        "The budget is a number of optimizer steps and of views per step. A view is one crop that the encoder learns "
        "from: Hi-End-MAE and MAE3D take one of a volume, MiM and GL-MAE several. Losses of different methods measure "
        "different things and cannot be compared with each other. Options are those that make a method smaller than in "
        "its paper, to fit the encoder and the time."
    )
    if len(runs) > 1:
        words += (
            f"\nAll methods see the same arrays, preprocessed as for `{outcome['settings']['preprocessed_like']}`, "
            "whatever spacing and window their papers used."
        )
    return [table(["method", "steps", "samples × views per step", "loss, first → last epoch", "options"], rows), words]


def _pretraining_pictures(pictures: Path, methods: Sequence[str]) -> list[str]:
    paragraphs = [
        "Reconstructions: crops, what the encoder saw of them, and what was predicted. Where the loss leaves out "
        "every patch's own mean and spread, which the picture then says, they are those of the true patch.",
    ]
    for method in methods:
        paragraphs.append(f"### {method}")
        names = [p.stem.removeprefix(f"{method}_") for p in pictures.glob(f"{method}_*.png")]
        # progress last
        for name in sorted(names, key=lambda name: (name == PROGRESS, name)):
            said = "Loss, learning rate and speed" if name == PROGRESS else f"Reconstruction, view `{name}`"
            paragraphs += [f"{said}:", f"![{method}, {name}]({PICTURES}/{method}_{name}.png)"]
    return paragraphs


def _verdict(outcome: dict[str, Any]) -> str:
    means = {name: run["mean"] for name, run in outcome["dice"].items()}
    if None in means.values():
        said = "The truth holds no foreground, so nothing can be compared."
    else:
        gains = {name: mean - means[SCRATCH] for name, mean in means.items() if name != SCRATCH}
        told = "; ".join(f"{name} {_gain(gain)}" for name, gain in gains.items())
        said = f"Mean Dice against the run from scratch: {told}."
    task = outcome["data"]["task"]
    labels = f"{TASKS[task]}\n" if task else ""
    return (
        f"{said} One seed, a few minutes of training and very few volumes show that the road works from end to end; "
        "they show nothing about how good a method is, nor which is better than another. Minutes of pretraining may "
        "well make no difference: an untrained encoder's tokens say a lot about a volume already. Published runs "
        f"see thousands of volumes for days.\n{labels}"
        "nnU-Net itself seeds neither its network nor its loaders; the seed of `hiendmae plan` does, in our trainers."
    )


def _gain(gain: float) -> str:
    if abs(gain) < WORTH_MENTIONING:
        return f"{gain:+.3f}, which is no difference at this budget"
    return f"{gain:+.3f}, {'ahead' if gain > 0 else 'behind: at this budget pretraining did not help'}"


def _coloured(classes: dict[str, int | tuple[int, ...]]) -> dict[str, int]:
    if all(isinstance(value, int) for value in classes.values()):
        return classes
    # regions overlap and cannot be coloured; the files hold the labels they are made of
    values = {v for value in classes.values() for v in (value if isinstance(value, tuple) else (value,))}
    return {f"label {value}": value for value in sorted(values)}


def _loss(losses: dict[str, Any]) -> str:
    return f"{losses['first_epoch_loss']:.3f} → {losses['last_epoch_loss']:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
