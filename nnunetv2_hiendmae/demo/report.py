"""What a demo shows: pictures and a page of words."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.demo.datasets import DemoData
from nnunetv2_hiendmae.demo.results import foreground, predictions_folder
from nnunetv2_hiendmae.evaluation.pictures import overlay_picture
from nnunetv2_hiendmae.files import write_text

OVERLAY = "segmentation.png"
RECONSTRUCTION = "reconstruction.png"
PROGRESS = "pretraining_progress.png"
CAPTIONS = {
    OVERLAY: "The image, its labels, and both predictions.",
    RECONSTRUCTION: "What pretraining learned: crops, what the encoder saw of them, and what was predicted. The loss "
    "leaves out every patch's own mean and spread, so the picture takes these two from the true patch.",
    PROGRESS: "Loss and learning rate of pretraining.",
}
CT_SOFT_TISSUE = (-175.0, 250.0)
# Dice differences below this say nothing after a few minutes of training on a handful of slices
WORTH_MENTIONING = 0.02


def write_pictures(output: Path, data: DemoData, runs: Sequence[Any], outcome: dict[str, Any]) -> None:
    """Copies the pretraining's pictures to the top, and draws the truth beside both predictions for the first case."""
    pretraining = output / "pretraining"
    montages = sorted((pretraining / "reconstructions").glob("*.png"))
    for source, name in ((pretraining / "progress.png", PROGRESS), *((m, RECONSTRUCTION) for m in montages[-1:])):
        shutil.copyfile(source, output / name)

    folders = {run.name: predictions_folder(output, data, run) for run in runs}
    images, truths = ("imagesTs", "labelsTs") if data.held_out else ("imagesTr", "labelsTr")
    case = sorted(p.name for p in next(iter(folders.values())).glob(f"*{data.file_ending}"))[0]
    identifier = case.removesuffix(data.file_ending)
    masks = {"labels": data.finetuning / truths / case}
    for name, folder in folders.items():
        mean = outcome["dice"][name]["mean"]
        masks[f"{name}, Dice {_number(mean)}"] = folder / case
    overlay_picture(
        output / OVERLAY,
        data.finetuning / images / f"{identifier}_0000{data.file_ending}",
        masks,
        _colours(data),
        window=CT_SOFT_TISSUE if data.first_channel_is_ct else None,
        title=f"{data.finetuning.name}, case {identifier}",
    )


def write_report(output: Path, outcome: dict[str, Any]) -> None:
    """Writes `report.md`."""
    pretraining, dice = outcome["pretraining"], outcome["dice"]
    names = list(dice)
    classes = list(dice[names[0]]["per_class"])
    rows = [[c, *(_number(dice[n]["per_class"][c]) for n in names)] for c in classes]
    rows.append(["**mean**", *(f"**{_number(dice[n]['mean'])}**" for n in names)])
    losses = [["pretraining", _loss(pretraining), str(pretraining["steps"]) + " steps"]]
    losses += [[f"fine-tuning, {n}", _loss(run), f"{run['epochs']} epochs"] for n, run in outcome["finetuning"].items()]
    peaks = outcome["peak_gb_of_largest_process"]
    times = [[name, f"{seconds:.0f}", f"{peaks[name]:.1f}"] for name, seconds in outcome["seconds"].items()]
    machine = outcome["machine"]
    data = outcome["data"]
    pictures = [name for name in (OVERLAY, RECONSTRUCTION, PROGRESS) if (output / name).is_file()]
    lines = [
        "# Demo: pretrain, fine-tune, predict",
        "",
        f"Pretrained with `{outcome['settings']['method']}` on {data['pretraining']} (no labels), fine-tuned twice on "
        f"{data['finetuning']} by stock nnU-Net, with the same budget and seed: once from the pretrained encoder, "
        "once from scratch.",
        "",
        f"## Dice on the {data['dice_on']}",
        "",
        *_table(["class", *names], rows),
        "",
        "– : the truth holds none of this class; it is left out of the mean.",
        "",
        *_verdict(outcome),
        "",
        *(f"{CAPTIONS[name]}\n\n![{name}]({name})\n" for name in pictures),
        "## Losses",
        "",
        *_table(["", "first → last epoch", "length"], losses),
        "",
        "nnU-Net's loss is cross-entropy minus soft Dice, so it may be negative.",
        "",
        "## Time and memory",
        "",
        f"{outcome['seconds_total'] / 60:.1f} minutes on {machine['cores']} cores ({machine['system']} "
        f"{machine['architecture']}, device {outcome['settings']['device']}). Memory is that of the largest process.",
        "",
        *_table(["phase", "seconds", "GB"], times),
        "",
        "## Commands",
        "",
        "```",
        *outcome["commands"],
        "```",
        "Settings: `" + json.dumps(outcome["settings"]) + "`",
        "",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in outcome["versions"].items()),
    ]
    write_text(output / "report.md", "\n".join(lines) + "\n")


def _verdict(outcome: dict[str, Any]) -> list[str]:
    means = [run["mean"] for run in outcome["dice"].values()]
    if None in means:
        said = "The truth holds no foreground, so nothing can be compared."
    else:
        gain = means[0] - means[1]
        if abs(gain) < WORTH_MENTIONING:
            said = f"The two runs differ by {gain:+.3f} in mean Dice, which is no difference at this budget."
        elif gain > 0:
            said = f"The pretrained run is ahead by {gain:+.3f} in mean Dice."
        else:
            said = f"The pretrained run is behind by {gain:+.3f} in mean Dice: at this budget pretraining did not help."
    words = [
        "## How to read this",
        "",
        said + " One seed, a few minutes of training and very few volumes show that the road works from end to end; "
        "they show nothing about how good a method is. Published pretraining runs see thousands of volumes for days.",
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
