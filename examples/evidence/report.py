"""Tables and figures of docs/evidence.md from the files in docs/evidence, and nothing else."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arms import other_randoms, plain, pool_runs
from matplotlib.figure import Figure
from protocol import FLAT, FROZEN, RANDOM, REMEDIES, REMEDY_SEEDS, SAME_RATE, SCRATCH, SEEDS, TASKS, TOKENS, Task
from scipy import stats

from nnunetv2_hiendmae.evaluation.report import table
from nnunetv2_hiendmae.evaluation.statistics import holm
from nnunetv2_hiendmae.files import write_text, write_with

BEGIN, END = "<!-- written by examples/evidence/report.py -->", "<!-- end -->"
# Dice points within which arms count as equal
MARGIN = 0.01
ALPHA = 0.05
FOLDS = ("1-shot", "all")
OWN = ["arm", "seeds", "Dice ± SD over seeds", "NSD"]
PNG = {"format": "png", "dpi": 110, "metadata": {"Software": None}}


def by_seed(cases: pd.DataFrame, task: Task, measure: str = "dice") -> pd.DataFrame:
    """(arm, fold, seed) x person: mean over classes, then over the person's cases."""
    person = {task.tuning[1]: "tuning", **{case: name for name, members in task.test.items() for case in members}}
    own = cases[cases["task"] == task.number]
    per_case = own.groupby(["arm", "fold", "seed", "case"])[measure].mean().reset_index()
    per_case["person"] = per_case["case"].map(person)
    return per_case.groupby(["arm", "fold", "seed", "person"])[measure].mean().unstack()


def differences(values: pd.DataFrame, arm: str, baseline: str, fold: str) -> pd.DataFrame:
    """Seed x person, of the seeds that both arms have."""
    return (values.loc[arm, fold] - values.loc[baseline, fold]).dropna(how="all").dropna(axis="columns")


def interval(sample: np.ndarray, level: float) -> tuple[float, float]:
    """t-interval of a mean."""
    if len(sample) < 2:
        return (np.nan, np.nan)
    spread = stats.sem(sample)
    low, high = stats.t.interval(level, len(sample) - 1, loc=sample.mean(), scale=spread) if spread else [sample[0]] * 2
    return float(low), float(high)


def verdict(per_person: pd.DataFrame, corrected_p: float, seeds: int = len(SEEDS)) -> str:
    """What the protocol says of paired differences, seed x person."""
    sample, means = per_person.mean(axis=1).to_numpy(), per_person.mean()
    if len(sample) < seeds:
        return "seeds are missing"
    if corrected_p < ALPHA and ((means > 0).all() or (means < 0).all()):
        return "**helps**" if sample.mean() > 0 else "**harms**"
    low, high = interval(sample, 0.9)
    return "no difference" if low > -MARGIN and high < MARGIN else "open"


def comparison(
    cases: pd.DataFrame, task: Task, fold: str, names: list[str], baseline: str, seeds: int = len(SEEDS)
) -> Iterator[str]:
    """Table of arms against a baseline; arms that have no results are left out."""
    dice, nsd = by_seed(cases, task), by_seed(cases, task, "nsd")
    there = [name for name in names if (name, fold) in dice.index.droplevel("seed")]
    if (baseline, fold) not in dice.index.droplevel("seed"):
        return
    compared = {name: differences(dice, name, baseline, fold) for name in there}
    samples = {name: found.mean(axis=1).to_numpy() for name, found in compared.items()}
    p = {
        name: float(stats.ttest_1samp(found, 0).pvalue) if len(found) > 1 else np.nan for name, found in samples.items()
    }
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    rows = []
    for name in (baseline, *there):
        row = own_columns(dice, nsd, name, fold)
        if name == baseline:
            rows.append([*row, "", "", "", "", ""])
            continue
        found, sample = compared[name], samples[name]
        low, high = interval(sample, 0.95)
        persons = ", ".join(f"{person} {value:+.4f}" for person, value in found.mean().items())
        said = verdict(found, corrected[name], seeds)
        told = [
            f"{sample.mean():+.4f} [{low:+.4f}, {high:+.4f}]",
            f"{p[name]:.3f}",
            f"{corrected[name]:.3f}",
            persons,
            said,
        ]
        rows.append([*row, *told])
    titles = [f"difference to {baseline} [95 %]", "p", "p, Holm", "by person", "verdict"]
    yield table([*OWN, *titles], rows)


def own_columns(dice: pd.DataFrame, nsd: pd.DataFrame, name: str, fold: str) -> list[str]:
    """Those of `OWN`."""
    own = dice.loc[name, fold].mean(axis=1)
    spread = f"{own.mean():.4f} ± {own.std():.4f}"
    return [name, str(len(own)), spread, f"{nsd.loc[name, fold].mean(axis=1).mean():.4f}"]


def means(cases: pd.DataFrame, task: Task, fold: str, names: list[str]) -> Iterator[str]:
    """Table of arms that are not to be compared in pairs of a seed."""
    dice, nsd = by_seed(cases, task), by_seed(cases, task, "nsd")
    there = [name for name in names if (name, fold) in dice.index.droplevel("seed")]
    if there:
        yield table(OWN, [own_columns(dice, nsd, name, fold) for name in there])


def classes(cases: pd.DataFrame, task: Task, fold: str) -> Iterator[str]:
    """Mean Dice per class of the arms that are trained end to end."""
    own = cases[(cases["task"] == task.number) & (cases["fold"] == fold) & cases["arm"].isin([SCRATCH, *task.arms])]
    if own.empty:
        return
    means = own.groupby(["arm", "class"], sort=False)["dice"].mean().unstack()
    rows = [[arm, *(f"{value:.3f}" for value in values)] for arm, values in means.iterrows()]
    yield table(["arm", *means.columns], rows)


def gate(runs: dict, task: Task) -> Iterator[str]:
    """The probe of frozen tokens on the test cases, by the encoders' presets and crops."""
    measured = ("dice", "dice_union", "dice_tuning")
    rows = []
    of_task = pd.DataFrame([probe for probe in runs["probes"] if probe["task"] == task.number])
    shapes = [of_task["preset"], of_task["crop"].map(tuple)] if len(of_task) else []
    for (preset, size), found in of_task.groupby(shapes, sort=False) if len(of_task) else ():
        random, voxels = found[found["encoder"] == RANDOM], found.set_index("encoder").loc["voxels"]
        spread = [f"{random[m].mean():.4f} ({random[m].min():.4f} to {random[m].max():.4f})" for m in measured]
        shape = (preset, " x ".join(map(str, size)))
        rows.append(["voxels, without an encoder", *shape, *(f"{voxels[m]:.4f}" for m in measured), "", ""])
        rank = f"{random['effective_rank'].mean():.1f}"
        rows.append([f"random, {len(random)} seeds", *shape, *spread, rank, ""])
        for _, probe in found[~found["encoder"].isin([RANDOM, "voxels"])].iterrows():
            passed = "passed" if probe["dice"] > random["dice"].max() else "not passed"
            dice = [f"{probe[m]:.4f}" for m in measured]
            rows.append([probe["encoder"], *shape, *dice, f"{probe['effective_rank']:.1f}", passed])
    if rows:
        measures = ["probe Dice", "of all classes in one", "tuning fold", "effective rank"]
        yield table(["encoder", "preset", "crop", *measures, "gate"], rows)


def pretraining(runs: dict, task: Task) -> str:
    """Losses by tenths of each run."""
    found = [run for run in runs["pretraining"] if run["task"] == task.number and not run["name"].startswith(RANDOM)]
    rows = [
        [run["name"], run["preset"], str(run["steps"]), " ".join(f"{loss:.3f}" for loss in run["losses"])]
        for run in found
    ]
    return table(["run", "preset", "steps", "mean loss of each tenth"], rows)


def learning_rates(runs: dict, task: Task) -> str:
    """Dice of the tuning fold."""
    found = runs["learning_rates"][str(task.number)]
    rates = sorted({rate for tuned in found.values() for rate in tuned["dice"]}, key=float)
    rows = []
    for arm, tuned in found.items():
        dice = [f"{tuned['dice'][rate]:.4f}" if rate in tuned["dice"] else "" for rate in rates]
        rows.append([arm, *dice, f"{tuned['lr']:g}"])
    return table(["arm", *rates, "chosen"], rows)


def sections(folder: Path, where: str) -> Iterator[str]:
    """All that stands between the two marks; `where` is put before the names of pictures."""
    cases, runs = pd.read_csv(folder / "cases.csv"), json.loads((folder / "runs.json").read_text())
    for task in TASKS:
        if task.number not in set(cases["task"]):
            yield f"### Task {task.number}\n\nNot run yet."
            continue
        yield f"### Task {task.number}"
        volumes = f"{len(task.pool.cases)} volumes unless the name says otherwise"
        yield f"Pretraining, {volumes}:\n\n{pretraining(runs, task)}"
        yield from (f"Gate:\n\n{text}" for text in gate(runs, task))
        yield f"Learning rates of fine-tuning, Dice of the tuning fold:\n\n{learning_rates(runs, task)}"
        for fold in FOLDS:
            for text in comparison(cases, task, fold, list(task.arms), SCRATCH):
                yield f"End to end, {fold}:\n\n{text}"
        for text in comparison(cases, task, "1-shot", list(task.arms), SCRATCH + SAME_RATE):
            yield f"End to end, 1-shot, from scratch with {task.arms[0]}'s learning rate:\n\n{text}"
        for text in comparison(cases, task, "1-shot", [task.arms[0] + FLAT], SCRATCH + FLAT):
            yield f"End to end, 1-shot, flat crops:\n\n{text}"
        frozen = [name + FROZEN for name in task.frozen]
        yield from (
            f"Frozen encoder, 1-shot:\n\n{t}" for t in comparison(cases, task, "1-shot", frozen, RANDOM + FROZEN)
        )
        tokens = [name + TOKENS for name in task.tokens]
        for fold in FOLDS:
            for text in comparison(cases, task, fold, tokens, SCRATCH + TOKENS):
                yield f"Tokens alone, {fold}:\n\n{text}"
        frozen = [name + FROZEN for name in tokens]
        for text in comparison(cases, task, "1-shot", frozen, RANDOM + TOKENS + FROZEN):
            yield f"Tokens alone, frozen encoder, 1-shot:\n\n{text}"
        for text in means(cases, task, "1-shot", [name + FROZEN for name in other_randoms(task)]):
            yield f"Tokens alone, random encoders of other seeds, frozen, 1-shot:\n\n{text}"
        pools = list(pool_runs(task))
        found = list(comparison(cases, task, "1-shot", [*pools, task.pool_method], SCRATCH)) if pools else []
        yield from (
            f"Size of the pool, 1-shot ({len(task.pool.cases)} volumes without a number):\n\n{t}" for t in found
        )
        tried = [plain(name) for name in REMEDIES]
        names = [*sorted({remedy.method for remedy in REMEDIES.values()}), *tried]
        if set(tried) & set(cases[cases["task"] == task.number]["arm"]):
            for text in comparison(cases, task, "tuning", names, SCRATCH, len(REMEDY_SEEDS)):
                yield f"Remedies, tuning fold, {len(REMEDY_SEEDS)} seeds:\n\n{text}"
        yield from (f"Dice per class, {fold}:\n\n{text}" for fold in FOLDS for text in classes(cases, task, fold))
        drawn = {kind: f"{kind}_{task.number}.png" for kind in ("dots", "curves", "overlay")}
        yield "\n".join(f"![{kind}]({where}{name})" for kind, name in drawn.items() if (folder / name).exists())
        both = [f"attention_{task.number}_{name}.png" for name in (task.arms[0], RANDOM)]
        if all((folder / name).exists() for name in both):
            yield f"Attention of the last layer from one voxel, {task.arms[0]} and a random encoder:"
            yield "\n".join(f"![{name}]({where}{name})" for name in both)


def panels(own: pd.DataFrame) -> tuple[Figure, list[tuple[Any, str, pd.DataFrame]]]:
    """A figure with an axis and the rows of each fold that has results; networks that read tokens alone below."""
    alone = own["arm"].str.contains(TOKENS, regex=False)
    kinds = [rows for rows in (own[~alone], own[alone]) if set(rows["fold"]) & set(FOLDS)]
    folds = [fold for fold in FOLDS if fold in set(own["fold"])]
    figure = Figure(figsize=(5 * len(folds), 4 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(folds), sharey="row", squeeze=False).flat
    shown = [(fold, rows[rows["fold"] == fold]) for rows in kinds for fold in folds]
    return figure, [(axis, fold, rows) for axis, (fold, rows) in zip(axes, shown, strict=True)]


def draw_dots(cases: pd.DataFrame, task: Task, path: Path) -> None:
    """A dot per case and seed, a line for the mean, an axis per fold."""
    own = cases[cases["task"] == task.number]
    figure, axes = panels(own.groupby(["fold", "arm", "case", "seed"], sort=False)["dice"].mean().reset_index())
    for axis, fold, shown in axes:
        names = list(shown["arm"].unique())
        for place, name in enumerate(names):
            values = shown[shown["arm"] == name]
            for number, (_, dots) in enumerate(values.groupby("case")):
                shift = (np.arange(len(dots)) - len(dots) / 2) * 0.06
                axis.plot(place + shift, dots["dice"], "o", ms=4, alpha=0.7, color=f"C{number}")
            axis.hlines(values["dice"].mean(), place - 0.35, place + 0.35, color="black")
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axis.set_title(f"{task.number}, {fold}: a dot per seed, a colour per test case", fontsize=9)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("mean Dice over classes")
    write_with(path, lambda file: figure.savefig(file, **PNG))


def draw_curves(curves: pd.DataFrame, task: Task, path: Path) -> None:
    """nnU-Net's pseudo Dice by epoch: mean and range over seeds."""
    figure, axes = panels(curves[curves["task"] == task.number])
    for axis, fold, shown in axes:
        for number, start in enumerate((SCRATCH, *task.arms)):
            for arm in {start, start + TOKENS} & set(shown["arm"]):
                dice = shown[shown["arm"] == arm].groupby("epoch")["pseudo_dice"]
                mean = dice.mean()
                axis.plot(mean.index + 1, mean, color=f"C{number}", label=arm)
                axis.fill_between(mean.index + 1, dice.min(), dice.max(), color=f"C{number}", alpha=0.15)
        axis.set_title(f"{task.number}, {fold}: mean and range over seeds", fontsize=9)
        axis.set_xlabel("epoch of fine-tuning")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("pseudo Dice on crops of the test cases")
            axis.legend(fontsize=8)
    write_with(path, lambda file: figure.savefig(file, **PNG))


def draw(folder: Path) -> None:
    """The figures that are made of the tables, of tasks that have more than their tuning fold."""
    cases, curves = (pd.read_csv(folder / f"{name}.csv") for name in ("cases", "curves"))
    drawings: dict[str, tuple[Callable, pd.DataFrame]] = {"dots": (draw_dots, cases), "curves": (draw_curves, curves)}
    known = set(cases[cases["fold"].isin(FOLDS)]["task"])
    for task in (task for task in TASKS if task.number in known):
        for kind, (function, values) in drawings.items():
            function(values, task, folder / f"{kind}_{task.number}.png")


def with_results(page: str, folder: Path, where: str = "") -> str:
    """The page, with what stands between the marks written anew; see `sections`."""
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    body = "\n\n".join(sections(folder, where))
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of cases.csv, curves.csv and runs.json; the figures go there")
    parser.add_argument("--page", type=Path, help="written anew between its marks (default: FOLDER/results.md)")
    args = parser.parse_args()
    draw(args.folder)
    page = args.page or args.folder / "results.md"
    text = page.read_text(encoding="utf-8") if args.page else f"{BEGIN}\n{END}\n"
    where = "" if page.parent == args.folder else f"{args.folder.name}/"
    write_text(page, with_results(text, args.folder, where))


if __name__ == "__main__":
    main()
