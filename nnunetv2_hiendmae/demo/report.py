"""What a demo shows: pictures and a page of words."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.demo.datasets import DemoData
from nnunetv2_hiendmae.demo.results import foreground, predictions_folder
from nnunetv2_hiendmae.files import write_text
from nnunetv2_hiendmae.inspection.figures import overlay_picture

PICTURES = "pictures"
OVERLAY = "segmentation.png"
PROGRESS = "progress"
SCRATCH = "scratch"
CT_SOFT_TISSUE = (-175.0, 250.0)
# Dice differences below this say nothing after a few minutes of training on a handful of slices
WORTH_MENTIONING = 0.02


def write_pictures(output: Path, data: DemoData, runs: Sequence[Any], outcome: dict[str, Any]) -> None:
    """Into `pictures`: each method's progress and last reconstructions, and truth and predictions of the first case."""
    pictures = output / PICTURES
    pictures.mkdir(exist_ok=True)
    for method in outcome["pretraining"]:
        pretraining = output / "pretraining" / method
        shutil.copyfile(pretraining / "progress.png", pictures / f"{method}_{PROGRESS}.png")
        for view, montage in last_reconstructions(pretraining).items():
            shutil.copyfile(montage, pictures / f"{method}_{view}.png")

    folders = {run.name: predictions_folder(output, data, run) for run in runs}
    images, truths = ("imagesTs", "labelsTs") if data.held_out else ("imagesTr", "labelsTr")
    case = sorted(p.name for p in next(iter(folders.values())).glob(f"*{data.file_ending}"))[0]
    identifier = case.removesuffix(data.file_ending)
    masks = {"labels": data.finetuning / truths / case}
    for name, folder in folders.items():
        mean = outcome["dice"][name]["mean"]
        masks[f"{name}, Dice {_number(mean)}"] = folder / case
    overlay_picture(
        pictures / OVERLAY,
        data.finetuning / images / f"{identifier}_0000{data.file_ending}",
        masks,
        _colours(data),
        window=CT_SOFT_TISSUE if data.first_channel_is_ct else None,
        title=f"{data.finetuning.name}, case {identifier}",
    )


def last_reconstructions(pretraining: Path) -> dict[str, Path]:
    """Name of the view -> montage of the last epoch that was drawn, in a run folder of pretraining."""
    epochs: dict[str, dict[str, Path]] = {}
    for montage in sorted((pretraining / "reconstructions").glob("epoch_*_*.png")):
        _, epoch, view = montage.stem.split("_", 2)
        epochs.setdefault(epoch, {})[view] = montage
    return epochs[max(epochs)]


def write_report(output: Path, outcome: dict[str, Any]) -> None:
    """Writes `report.md`."""
    machine, data, settings = outcome["machine"], outcome["data"], outcome["settings"]
    peaks = outcome["peak_gb_of_largest_process"]
    times = [[name, f"{seconds:.0f}", f"{peaks[name]:.1f}"] for name, seconds in outcome["seconds"].items()]
    methods = ", ".join(f"`{name}`" for name in settings["methods"])
    lines = [
        "# Demo: pretrain, fine-tune, predict",
        "",
        f"Pretrained with {methods} on {data['pretraining']} (no labels), fine-tuned on {data['finetuning']} by stock "
        "nnU-Net: from each pretrained encoder and from scratch, with the same network, budget and seed.",
        "",
        f"## Dice on the {data['dice_on']}",
        "",
        *_dice_table(outcome),
        "",
        "– : the truth holds none of this class, it is left out of the mean; or no pretraining.",
        "",
        *_verdict(outcome),
        "",
        "The image, its labels, and the predictions:",
        "",
        f"![{OVERLAY}]({PICTURES}/{OVERLAY})",
        "",
        "## Pretraining",
        "",
        *_pretraining(outcome),
        "",
        *_pretraining_pictures(output / PICTURES, settings["methods"]),
        "## Fine-tuning",
        "",
        *_table(
            ["run", "loss, first → last epoch", "epochs"],
            [[name, _loss(run), str(run["epochs"])] for name, run in outcome["finetuning"].items()],
        ),
        "",
        f"{settings['iterations_per_epoch']} batches of {settings['finetune_batch_size']} crops per epoch. nnU-Net's "
        "loss is cross-entropy minus soft Dice, so it may be negative.",
        "",
        "## Time and memory",
        "",
        f"{outcome['seconds_total'] / 60:.1f} minutes on {machine['cores']} cores ({machine['system']} "
        f"{machine['architecture']}, device {settings['device']}). Memory is that of the largest process.",
        "",
        *_table(["phase", "seconds", "GB"], times),
        "",
        "## Commands",
        "",
        "```",
        *outcome["commands"],
        "```",
        "Settings: `" + json.dumps(settings) + "`",
        "",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in outcome["versions"].items()),
    ]
    write_text(output / "report.md", "\n".join(lines) + "\n")


def _dice_table(outcome: dict[str, Any]) -> list[str]:
    """One row per run."""
    dice, seconds = outcome["dice"], outcome["seconds"]
    classes = list(next(iter(dice.values()))["per_class"])
    rows = [
        [
            name,
            *(_number(run["per_class"][c]) for c in classes),
            f"**{_number(run['mean'])}**",
            _minutes(seconds.get(f"pretrain_{name}")),
            _minutes(seconds[f"train_{name}"]),
        ]
        for name, run in dice.items()
    ]
    return _table(["run", *classes, "**mean**", "pretraining, min", "fine-tuning, min"], rows)


def _pretraining(outcome: dict[str, Any]) -> list[str]:
    """What each method spent, and how its loss went."""
    rows = [
        [
            method,
            str(run["steps"]),
            f"{run['samples_per_step']} × {run['views_per_sample']}",
            _loss(run),
            ", ".join(f"{key}={value}" for key, value in run["options"].items()) or "its own",
        ]
        for method, run in outcome["pretraining"].items()
    ]
    words = [
        "The budget is a number of optimizer steps and of views per step. A view is one crop that the encoder learns "
        "from: Hi-End-MAE and MAE3D take one of a volume, MiM and GL-MAE several. Losses of different methods measure "
        "different things and cannot be compared with each other. Options are those that make a method smaller than in "
        "its paper, to fit the encoder and the time.",
    ]
    if len(rows) > 1:
        words.append(
            f"All methods see the same arrays, preprocessed as for `{outcome['settings']['preprocessed_like']}`, "
            "whatever spacing and window their papers used."
        )
    return [
        *_table(["method", "steps", "samples × views per step", "loss, first → last epoch", "options"], rows),
        "",
        *words,
    ]


def _pretraining_pictures(pictures: Path, methods: Sequence[str]) -> list[str]:
    lines = [
        "Reconstructions: crops, what the encoder saw of them, and what was predicted. The loss leaves out every "
        "patch's own mean and spread, so the pictures take these two from the true patch.",
        "",
    ]
    for method in methods:
        names = [p.stem.removeprefix(f"{method}_") for p in pictures.glob(f"{method}_*.png")]
        # progress last
        names.sort(key=lambda name: (name == PROGRESS, name))
        lines += [f"### {method}", ""]
        for name in names:
            said = "Loss, learning rate and speed" if name == PROGRESS else f"Reconstruction, view `{name}`"
            lines += [f"{said}:", "", f"![{method}, {name}]({PICTURES}/{method}_{name}.png)", ""]
    return lines


def _verdict(outcome: dict[str, Any]) -> list[str]:
    means = {name: run["mean"] for name, run in outcome["dice"].items()}
    if None in means.values():
        said = "The truth holds no foreground, so nothing can be compared."
    else:
        gains = {name: mean - means[SCRATCH] for name, mean in means.items() if name != SCRATCH}
        told = "; ".join(f"{name} {_gain(gain)}" for name, gain in gains.items())
        said = f"Mean Dice against the run from scratch: {told}."
    words = [
        "## How to read this",
        "",
        said + " One seed, a few minutes of training and very few volumes show that the road works from end to end; "
        "they show nothing about how good a method is, nor which is better than another. Published pretraining runs "
        "see thousands of volumes for days.",
    ]
    if outcome["data"]["embedded"]:
        words.append(
            "The labels of the embedded data are TotalSegmentator's output, not human truth: Dice here is agreement "
            "with another program. The held-out patient is not among the pretraining volumes; the training patient is."
        )
    words.append(
        "nnU-Net itself seeds neither its network nor its loaders; the demo seeds the random generators and then calls "
        "nnU-Net's own training entry point, with loading in the same process."
    )
    return words


def _gain(gain: float) -> str:
    if abs(gain) < WORTH_MENTIONING:
        return f"{gain:+.3f}, which is no difference at this budget"
    if gain > 0:
        return f"{gain:+.3f}, ahead"
    return f"{gain:+.3f}, behind: at this budget pretraining did not help"


def _colours(data: DemoData) -> dict[str, int]:
    classes = foreground(data)
    if all(isinstance(value, int) for value in classes.values()):
        return classes
    # regions overlap and cannot be coloured; the files hold the labels they are made of
    values = {v for value in classes.values() for v in (value if isinstance(value, tuple) else (value,))}
    return {f"label {value}": value for value in sorted(values)}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _loss(losses: dict[str, Any]) -> str:
    return f"{losses['first_epoch_loss']:.3f} → {losses['last_epoch_loss']:.3f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _minutes(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / 60:.1f}"
