"""What the runs of `run.py` came to, as small files: Dice and surface Dice of every case, learning curves, losses of
pretraining, probes, digests of all that went in; and the pictures that need images."""

import argparse
import csv
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from arms import (
    CONFIGURATION,
    FINISHED,
    Pretraining,
    Training,
    dataset_name,
    nnunet_folder,
    pretrainings,
    raw_folder,
    remedy_pretrainings,
)
from protocol import ALL, BUDGETS, ONE_SHOT, RANDOM, SCRATCH, SEEDS, TASKS, TUNING, Task
from run import Evidence

from nnunetv2_hiendmae import load_encoder
from nnunetv2_hiendmae.architectures import build_encoder
from nnunetv2_hiendmae.evaluation.surfaces import NSD, measure
from nnunetv2_hiendmae.figures import overlay_picture
from nnunetv2_hiendmae.files import LOG, sha256, write_text
from nnunetv2_hiendmae.pretraining.probe import Probe
from nnunetv2_hiendmae.training.labelled import find_labelled

FOLDS = {ONE_SHOT: "1-shot", ALL: "all", TUNING: "tuning"}
# of the loss of a pretraining
PARTS = 10
RANDOM_PROBES = 5
DECIMALS = 6
KEYS = ("task", "arm", "seed", "fold")


def finished(evidence: Evidence, task: Task) -> list[Training]:
    """Trainings on test cases, and of remedies, that are complete."""
    if not evidence.chosen(task):
        return []
    all_of_them = [*evidence.trainings(task), *evidence.remedy_trainings(task)]
    return [training for training in all_of_them if (training.folder() / FINISHED).exists()]


def cases(training: Training) -> list[dict[str, Any]]:
    """Dice by nnU-Net and surface Dice of every class that a case's truth holds."""
    rows = []
    summary = json.loads((training.folder() / FINISHED).read_text())
    raw = raw_folder(training.task)
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    for case in summary["metric_per_case"]:
        # the path may be one of another machine
        name = Path(case["prediction_file"]).name
        reference = raw / "labelsTr" / name
        truth, predicted = (sitk.ReadImage(str(file)) for file in (reference, training.folder() / "validation" / name))
        arrays = [sitk.GetArrayFromImage(image) for image in (truth, predicted)]
        for label, value in labels.items():
            if value == 0 or not case["metrics"][str(value)]["n_ref"]:
                continue
            masks = (array == value for array in arrays)
            surface = measure(*masks, truth.GetSpacing()[::-1], training.task.tolerance_mm)[NSD]
            dice = case["metrics"][str(value)]["Dice"]
            scores = {"dice": round(dice, DECIMALS), "nsd": round(surface, DECIMALS)}
            rows.append({**key(training), "case": name.split(".")[0], "class": label, **scores})
    return rows


def curve(training: Training) -> Iterator[dict[str, Any]]:
    """nnU-Net's pseudo Dice on crops of the validation cases, by epoch."""
    kept = torch.load(training.folder() / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
    for epoch, (dice, loss) in enumerate(zip(kept["mean_fg_dice"], kept["train_losses"], strict=True)):
        values = {"pseudo_dice": round(float(dice), DECIMALS), "train_loss": round(float(loss), DECIMALS)}
        yield {**key(training), "epoch": epoch, **values}


def earlier(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of an earlier `cases.csv` by the digest of the result that they were measured on: surfaces take seconds."""
    if not (folder / "runs.json").exists():
        return {}
    table: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in csv.DictReader((folder / "cases.csv").read_text().splitlines()):
        table.setdefault(tuple(row[name] for name in KEYS), []).append(row)
    known = json.loads((folder / "runs.json").read_text())["trainings"]
    rows = {each.get("summary_sha256"): table.get(tuple(str(each[name]) for name in KEYS), []) for each in known}
    return {digest: found for digest, found in rows.items() if digest}


def key(training: Training) -> dict[str, Any]:
    """What names a training in all files."""
    fold = FOLDS[training.fold]
    return dict(zip(KEYS, (training.task.number, training.arm.name, training.seed, fold), strict=True))


def about(evidence: Evidence, training: Training) -> dict[str, Any]:
    """What a training was made from."""
    plans = nnunet_folder("preprocessed") / dataset_name(training.task.number) / f"{training.plans}.json"
    encoder = evidence.encoder_file(training.task, training.arm.encoder)
    used = None if training.arm.method is None else sha256(encoder)
    made = {"lr": training.lr, "trainer": training.trainer, "plans_sha256": sha256(plans), "encoder_sha256": used}
    return {**key(training), **made, "summary_sha256": sha256(training.folder() / FINISHED)}


def pretraining(evidence: Evidence, made: Pretraining) -> dict[str, Any]:
    """Losses by tenths of the run, and what it was made from."""
    file = evidence.encoder_file(made.task, made.name)
    lines = [json.loads(line) for line in (file.parent / LOG).read_text().splitlines() if line.strip()]
    losses = [line["loss"] for line in lines if "loss" in line]
    parts = np.array_split(losses, min(PARTS, len(losses)))
    run = json.loads((file.parent / "run.json").read_text())
    return {
        "task": made.task.number,
        "name": made.name,
        "method": run["method"],
        "preset": made.preset,
        "seed": run["seed"],
        "steps": len(losses),
        "losses": [round(fmean(part), 4) for part in parts],
        "encoder_sha256": sha256(file),
        "run_sha256": sha256(file.parent / "run.json"),
    }


def probes(evidence: Evidence, task: Task, runs: list[Pretraining], plans: str) -> Iterator[dict[str, Any]]:
    """Ridge probes of every encoder, of random ones and voxels with their presets and crops: fitted on training cases
    and tested on the test cases, of the classes and of their union, and on the tuning fold. `plans` have the arrays."""
    tests = sum(map(len, task.test.values()))
    # a probe takes as many training cases as there are test cases, by their names
    fold = ALL if len(task.train) <= tests else ONE_SHOT
    found, tuning = (find_labelled(task.number, plans, CONFIGURATION, chosen) for chosen in (fold, TUNING))
    union = {"foreground": tuple(value for values in found.classes.values() for value in values)}
    of_cases = {"dice": found, "dice_union": replace(found, classes=union), "dice_tuning": tuning}
    loaded = {run.name: load_encoder(evidence.encoder_file(task, run.name))[0] for run in runs}
    for preset, crop in dict.fromkeys((run.preset, run.crop) for run in runs):
        alike = [run.name for run in runs if (run.preset, run.crop) == (preset, crop)]
        like = loaded[alike[0]].spec
        all_probes = {measure: Probe(cases, like) for measure, cases in of_cases.items()}
        told: dict[str, Any] = {"task": task.number, "preset": preset, "crop": list(crop)}
        told |= {"seed": None, "effective_rank": None}
        dice = {measure: probe.of_voxels() for measure, probe in all_probes.items()}
        yield {**told, "encoder": "voxels", **dice}
        encoders = [(name, None, loaded[name]) for name in alike]
        for seed in range(RANDOM_PROBES):
            torch.manual_seed(seed)
            encoders.append((RANDOM, seed, build_encoder(like).eval()))
        for name, seed, encoder in encoders:
            results = {measure: probe.of_encoder(encoder) for measure, probe in all_probes.items()}
            dice = {measure: result.dice for measure, result in results.items()}
            own = {"encoder": name, "seed": seed, "effective_rank": results["dice"].effective_rank}
            yield {**told, **own, **dice}


def digests(task: Task) -> dict[str, dict[str, str]]:
    """SHA-256 of images and labels, by dataset."""
    found = {}
    numbers = [task.number, *(pool.number for pool in (task.pool, *task.pools.values()))]
    for name in map(dataset_name, numbers):
        files = sorted((nnunet_folder("raw") / name).glob("*Tr/*"))
        found[name] = {f"{file.parent.name}/{file.name}": sha256(file) for file in files}
    return found


def pictures(task: Task, done: list[Training], evidence: Evidence, folder: Path) -> None:
    """Truth and 1-shot predictions of the first test case, and attention of the first method and a random encoder."""
    case = next(iter(task.test.values()))[0]
    raw = raw_folder(task)
    image = raw / "imagesTr" / f"{case}_0000.nii.gz"
    first = [t for t in done if (t.seed, t.fold) == (SEEDS[0], ONE_SHOT)]
    shown = {t.arm.name: t.folder() / "validation" / f"{case}.nii.gz" for t in first}
    wanted = {"reference": raw / "labelsTr" / f"{case}.nii.gz"}
    wanted |= {name: shown[name] for name in (SCRATCH, *task.arms) if name in shown}
    classes = {k: v for k, v in json.loads((raw / "dataset.json").read_text())["labels"].items() if v}
    window = (-175.0, 250.0) if task.number == 506 else None
    if len(wanted) > 1:
        title = f"{raw.name}, {case}, {FOLDS[ONE_SHOT]}, seed {SEEDS[0]}"
        overlay_picture(folder / f"overlay_{task.number}.png", image, wanted, classes, window=window, title=title)
    for name in (task.arms[0], RANDOM) if task.frozen else ():
        target = evidence.output / f"{task.number}_attention_{name}"
        size = sitk.ReadImage(str(image)).GetSize()[::-1]
        line = ["hiendmae", "attention", "-w", str(evidence.encoder_file(task, name)), "--image", str(image)]
        subprocess.run(
            [*line, "--voxel", *(str(n // 2) for n in size), "-o", str(target)], check=True, capture_output=True
        )
        shutil.copyfile(next(target.glob("*.png")), folder / f"attention_{task.number}_{name}.png")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table with the keys of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="output of run.py")
    parser.add_argument("folder", type=Path, help="docs/evidence")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    args = parser.parse_args()
    evidence, folder = Evidence(Path(), args.runs, 1, BUDGETS[args.budget]), args.folder
    tables: dict[str, list] = {name: [] for name in ("cases", "curves", "trainings", "pretraining", "probes")}
    rates, data, known = {}, {}, earlier(folder)
    for task in TASKS:
        done = finished(evidence, task)
        runs = [*pretrainings(task, evidence.budget), *remedy_pretrainings(task, evidence.budget)]
        runs = [run for run in runs if evidence.pretrained(task, run.name)]
        if not done:
            continue
        made = [about(evidence, training) for training in done]
        tables["trainings"] += made
        rows = [known.get(each["summary_sha256"]) for each in made]
        with ProcessPoolExecutor() as pool:
            measured = pool.map(cases, [training for training, seen in zip(done, rows, strict=True) if not seen])
            tables["cases"] += [row for seen in rows for row in seen or next(measured)]
        tables["curves"] += [row for training in done for row in curve(training)]
        tables["pretraining"] += [pretraining(evidence, run) for run in runs]
        trained = [run for run in runs if not run.name.startswith(RANDOM)]
        tables["probes"] += probes(evidence, task, trained, done[0].plans)
        rates[str(task.number)], data = evidence.chosen(task), data | digests(task)
        pictures(task, done, evidence, folder)
    for name in ("cases", "curves"):
        write_csv(folder / f"{name}.csv", tables[name])
    versions = json.loads((args.runs / "versions.json").read_text())
    machine = {"processor": platform.machine(), "versions": versions}
    rest = {
        "machine": machine,
        "learning_rates": rates,
        **{k: tables[k] for k in ("trainings", "pretraining", "probes")},
    }
    write_text(folder / "runs.json", json.dumps({**rest, "data_sha256": data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
