"""What preprocessing costs, and what the ways to resample do to an image.

    python benchmarks/preprocess.py speed --against 3770f85
    python benchmarks/preprocess.py quality --image CT.nii.gz

`speed`: the same volumes through `hiendmae preprocess` of this checkout, that of another commit, and stock
`nnUNetv2_preprocess` (nnU-Net's default plans at the same spacing), as commands. Volumes have 512 x 512 voxels of
0.75 mm and thick slices, made from the demo's CTs, with noise. CPU seconds per case are those of many cases less those
of few, divided by the difference: starting Python and importing does not count. Memory is the peak of the largest
process.

`quality`: slices of a real CT with thin slices are averaged to thicker ones, of half as large pixels, as scanners make
them, and resampled back; how far is the result from the CT, and how many neighbouring slices are twins? Then the same
where a dataset keeps its own thick slices as target: the reference is the CT averaged to them.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk
from machine import HERE, cpu_model, worktree
from scipy.ndimage import zoom

FEW, MANY = 1, 4
IN_PLANE_MM, IN_PLANE = 0.75, 512
TARGET_MM = 1.5
WINDOW = (-175.0, 250.0)
DEMO = HERE / "nnunetv2_hiendmae" / "demo" / "data" / "ct" / "Dataset901_DemoUnlabelledCT" / "imagesTr"
# the same images without labels and, for stock nnU-Net, with them
UNLABELLED, LABELLED = "Dataset001_Unlabelled", "Dataset002_Labelled"


# ---- speed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """One way to preprocess. `steps`: arguments of commands; the arrays of the last one are removed in between."""

    name: str
    tree: Path
    stock: bool = False


def write_volumes(root: Path, cases: int, slice_mm: float) -> None:
    """Two raw datasets of the same CTs. A label, which stock nnU-Net needs, is whatever is denser than water."""
    raw = root / LABELLED
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    sources = sorted(DEMO.glob("*_0000.nii.gz"))
    for case in range(cases):
        source = sitk.ReadImage(str(sources[case % len(sources)]), sitk.sitkFloat32)
        source.SetDirection(np.eye(3).ravel().tolist())
        extent_mm = [n * mm for n, mm in zip(source.GetSize(), source.GetSpacing(), strict=True)]
        size = (IN_PLANE, IN_PLANE, round(300 / slice_mm))
        # stretched to the size of a chest
        source.SetSpacing(
            [s * mm / e for s, mm, e in zip((384, 384, 300), source.GetSpacing(), extent_mm, strict=True)]
        )
        spacing = (IN_PLANE_MM, IN_PLANE_MM, slice_mm)
        grid = sitk.Resample(
            source, size, sitk.Transform(), sitk.sitkLinear, source.GetOrigin(), spacing, defaultPixelValue=-1000
        )
        array = sitk.GetArrayFromImage(grid)
        array += rng.normal(0, 10, array.shape).astype(np.float32)
        for folder, values in (
            ("imagesTr", array.round().astype(np.int16)),
            ("labelsTr", (array > 0).astype(np.uint8)),
        ):
            image = sitk.GetImageFromArray(values)
            image.SetSpacing(spacing)
            ending = "_0000.nii.gz" if folder == "imagesTr" else ".nii.gz"
            sitk.WriteImage(image, str(raw / folder / f"case_{case:03d}{ending}"), True)
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**described, "numTraining": cases}))
    shutil.copytree(raw, root / UNLABELLED, ignore=shutil.ignore_patterns("labelsTr"), copy_function=os.link)


def run(command: list[object], environment: dict[str, str]) -> tuple[float, float]:
    """CPU seconds of a command with all its processes, and GB of the largest one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # a process of its own waits for it: then the peak is that of this command alone
    code = "import resource, subprocess, sys; c = subprocess.run(sys.argv[1:], stdout=2).returncode; "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(c)"
    done = subprocess.run(
        # elsewhere: `python -m` looks into the current folder first
        [sys.executable, "-c", code, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=environment["nnUNet_results"],
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(done.stdout.split()[-1]) / 1e6


def measure(build: Build, volumes: Path, processes: int, folder: Path) -> dict[str, tuple[float, float]]:
    """What a whole preprocessing takes, and what the arrays take once there are fingerprint and plans."""
    shutil.rmtree(folder, ignore_errors=True)
    environment = {
        **os.environ,
        **{v: str(folder / v) for v in ("nnUNet_preprocessed", "nnUNet_results")},
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "nnUNet_raw": str(volumes),
        "PYTHONPATH": str(build.tree),
    }
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        Path(environment[variable]).mkdir(parents=True)
    spacing, scripts = (TARGET_MM,) * 3, Path(sys.executable).parent
    ours = [sys.executable, "-m", "nnunetv2_hiendmae.cli", "preprocess", "-d", 1, "-np", processes]
    steps = [[*ours, "--spacing", *spacing]]
    if build.stock:
        extract = [scripts / "nnUNetv2_extract_fingerprint", "-d", 2, "-np", processes]
        plan = [scripts / "nnUNetv2_plan_experiment", "-d", 2, "-overwrite_target_spacing", *spacing]
        preprocess = [scripts / "nnUNetv2_preprocess", "-d", 2, "-c", "3d_fullres", "-np", processes]
        steps = [extract, plan, preprocess]
    taken = [run(step, environment) for step in steps]
    whole = sum(seconds for seconds, _ in taken), max(gb for _, gb in taken)
    for arrays in Path(environment["nnUNet_preprocessed"]).glob("*/*_3d_fullres"):
        shutil.rmtree(arrays)
    return {"whole": whole, "arrays": run(steps[-1], environment)}


def speed(args: argparse.Namespace) -> None:
    with TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        with worktree(args.against, root / "tree") as then:
            builds = [Build("this", HERE), Build(args.against, then), Build("stock", HERE, stock=True)]
            print(f"{cpu_model()}; {IN_PLANE} x {IN_PLANE} voxels of {IN_PLANE_MM} mm; {time.strftime('%Y-%m-%d')}")
            for slice_mm, processes in itertools.product(args.slices, args.processes):
                sizes = {}
                for cases in (FEW * processes, MANY * processes):
                    volumes = root / f"raw_{slice_mm:g}_{cases}"
                    if not volumes.exists():
                        write_volumes(volumes, cases, slice_mm)
                    sizes[cases] = volumes
                report(builds, sizes, slice_mm, processes, args.repeats, root / "work")


def report(
    builds: list[Build], sizes: dict[int, Path], slice_mm: float, processes: int, repeats: int, work: Path
) -> None:
    (few, _), (many, _) = sizes.items()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for build in builds:
            less, more = (measure(build, volumes, processes, work) for volumes in sizes.values())
            for part in more:
                per_case = (more[part][0] - less[part][0]) / (many - few)
                found.setdefault((build.name, part), []).append((per_case, more[part][1]))
    for part in ("whole", "arrays"):
        print(f"\nslices of {slice_mm:g} mm, -np {processes}, {part}; median of {repeats}")
        values = {b.name: [median(v) for v in zip(*found[b.name, part], strict=True)] for b in builds}
        for name, (seconds, gb) in values.items():
            ratios = ", ".join(
                f"{values['this'][0] / s:.2f} of the time and {values['this'][1] / g:.2f} of the memory of {other}"
                for other, (s, g) in values.items()
                if name == "this" != other
            )
            print(f"| {name} | {seconds:.2f} CPU s per case | {gb:.2f} GB | {ratios}", flush=True)


# ---- quality --------------------------------------------------------------------------------------------------------


def averaged(volume: np.ndarray, stored_mm: float, thick_mm: float) -> np.ndarray:
    """Slices (D, H, W) averaged to thicker ones, each weighed by how much of it the thick one covers."""
    count = int(len(volume) * stored_mm / thick_mm)
    edges, thick = np.arange(len(volume) + 1) * stored_mm, np.arange(count + 1) * thick_mm
    lower, upper = np.maximum(edges[:-1], thick[:-1, None]), np.minimum(edges[1:], thick[1:, None])
    weights = np.clip(upper - lower, 0, None) / thick_mm
    return np.tensordot(weights, volume, 1).astype(np.float32)


def with_half_pixels(volume: np.ndarray) -> np.ndarray:
    """Twice as many pixels in every slice, linear between the old ones."""
    finer = zoom(volume, (1, 2, 2), order=1, mode="nearest", grid_mode=True)
    return finer.astype(np.float32)


def resampled(
    volume: np.ndarray, shape: tuple[int, ...], source_mm: list[float], target_mm: list[float], rule: str
) -> tuple[np.ndarray, float]:
    """By nnU-Net's functions, as our plans name them; and CPU seconds."""
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    from nnunetv2_hiendmae.volume_format import resampling

    torch.set_num_threads(1)
    entries = {"architecture": {}, **resampling("nnunet" if rule == "order_z 1" else rule)}
    if rule == "order_z 1":
        entries["resampling_fn_data_kwargs"]["order_z"] = 1
    entries["resampling_fn_data_kwargs"] |= {"num_threads": 1} if rule == "linear" else {}
    function = ConfigurationManager(entries).resampling_fn_data
    start = time.process_time()
    made = function(volume[None], shape, source_mm, target_mm)[0]
    return np.asarray(made), time.process_time() - start


def compare(volume: np.ndarray, reference: np.ndarray, source_mm: list[float], target_mm: list[float]) -> None:
    """One table line per rule. Distances are those in the body: what is above the window's lower end."""
    body = reference > 0
    seen = np.array([bool(s.any()) for s in body])
    for rule in ("nnunet", "order_z 1", "cubic", "linear"):
        made, seconds = resampled(volume, reference.shape, source_mm, target_mm, rule)
        rmse = np.sqrt(np.mean((made - reference)[body] ** 2))
        pairs = [np.array_equal(a, b) for a, b, s in zip(made, made[1:], seen, strict=False) if s]
        print(f"| {rule} | {seconds:.2f} | {rmse:.4f} | {np.mean(pairs):.0%} |")


def quality(args: argparse.Namespace) -> None:
    image = sitk.ReadImage(str(args.image))
    low, high = WINDOW
    volume = (np.clip(sitk.GetArrayFromImage(image).astype(np.float32), low, high) - low) / (high - low)
    mm = [float(s) for s in image.GetSpacing()[::-1]]
    print(f"{cpu_model()}; {args.image.name}, {volume.shape} voxels of {mm} mm, window {WINDOW} HU becomes [0, 1]")
    for thick in (2.5, 5.0):
        slices = with_half_pixels(averaged(volume, mm[0], thick))
        count = round(len(slices) * thick / mm[0])
        print(f"\nslices averaged to {thick:g} mm and resampled to {mm[0]:g} mm")
        print("| rule | CPU s | RMSE in the body | twins |\n|---|---|---|---|")
        compare(slices, volume[:count], [thick, mm[1] / 2, mm[2] / 2], mm)
    for thick, target in ((2.5, 5.0), (3.5, 5.0), (7.5, 5.0), (10.0, 5.0)):
        whole = int(len(volume) * mm[0] / 30) * 30
        part = volume[: round(whole / mm[0])]
        reference, slices = averaged(part, mm[0], target), averaged(part, mm[0], thick)
        print(f"\nslices of {thick:g} mm resampled to thick ones of {target:g} mm")
        print("| rule | CPU s | RMSE in the body | twins |\n|---|---|---|---|")
        compare(slices, reference, [thick, *mm[1:]], [target, *mm[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("speed")
    timing.add_argument("--against", default="3770f85", metavar="REV")
    timing.add_argument("--slices", type=float, nargs="+", default=[2.5, 5.0], metavar="MM")
    timing.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    timing.add_argument("--repeats", type=int, default=1)
    timing.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    timing.set_defaults(run=speed)
    measure_quality = commands.add_parser("quality")
    measure_quality.add_argument("--image", type=Path, default=DEMO / "thoraxCTA_0000.nii.gz")
    measure_quality.set_defaults(run=quality)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
