"""Loader speed: crops per second and core, with augmentation, from 280×280×200 volumes in nnU-Net's storage format.

The peer, in the same run and interleaved, is the way most pretraining code loads: read the whole volume, then cut
8 crops (as Hi-End-MAE's published loader does) with the same augmentation.

With `--glmae` it measures the views of GL-MAE instead, which are larger boxes that are resized, against one crop of
the encoder's size, again interleaved; and the processor time of all that a loader process does for a volume of two
global and four local views, when it sends views and when it sends boxes for a GPU.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import torch
from lightning_fabric import Fabric
from machine import CLOCKS, cpu_model
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from scipy.ndimage import gaussian_filter
from torch.utils.data import Dataset

from nnunetv2_hiendmae.pretraining.crops import GlobalLocalCrops, ResizedCrop
from nnunetv2_hiendmae.training.batches import SampleDataset, load_batches
from nnunetv2_hiendmae.training.views import MaskedCrop, unresized
from nnunetv2_hiendmae.training.volumes import Case, CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat

SHAPE = (200, 280, 280)
SPACING_MM = (1.5, 1.5, 1.5)
CROPS_PER_VOLUME = 8
Clock = Callable[[], float]


class WholeVolume:
    """The peer: the volume is in memory and crops are cut from it."""

    spacing_mm = SPACING_MM

    def __init__(self, path: Path):
        self.array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})[:]
        self.shape = self.array.shape[1:]

    def read(self, lower, size):
        cut = tuple(slice(a, a + s) for a, s in zip(lower, size, strict=True))
        return np.ascontiguousarray(self.array[(slice(None), *cut)])

    def is_foreground(self, voxel):
        return self.array[(0, *voxel)] > 0


def make_volume(folder: Path, number: int) -> Case:
    """A body with soft-tissue texture and scanner noise in air, CT window [−175, 250] → [0, 1]."""
    rng = np.random.default_rng(number)
    h, w = (np.linspace(-1, 1, s, dtype=np.float32) for s in SHAPE[1:])
    body = (h[:, None] / 0.75) ** 2 + (w[None] / 0.9) ** 2 < 1
    tissue = 40 + 1800 * gaussian_filter(rng.standard_normal(SHAPE, dtype=np.float32), 3)
    hu = np.where(body[None], tissue, -1000) + rng.normal(0, 15, SHAPE)
    image = ((np.clip(hu, -175, 250) + 175) / 425).astype(np.float32)[None]
    blocks, chunks = comp_blosc2_params(image.shape, (96, 96, 96), 4)
    seg = np.zeros(image.shape, np.int16)
    target = folder / f"case{number}"
    nnUNetDatasetBlosc2.save_case(
        image, seg, {}, str(target), chunks=chunks, blocks=blocks, chunks_seg=chunks, blocks_seg=blocks
    )
    return Case(f"bench/case{number}", target.with_suffix(".b2nd"), SHAPE)


def time_ours(dataset: SampleDataset, step: int, crops: int, clock: Clock) -> float:
    start = clock()
    for i in range(crops):
        dataset[(step, i)]
    return crops / (clock() - start)


def time_whole(cases: list[Case], views: MaskedCrop, step: int, crops: int, clock: Clock) -> float:
    rng = np.random.default_rng(step)
    start = clock()
    for i in range(crops // CROPS_PER_VOLUME):
        volume = WholeVolume(cases[i % len(cases)].path)
        for _ in range(CROPS_PER_VOLUME):
            views.draw(volume, rng)
    return crops / (clock() - start)


class Clocked(Dataset):
    """Samples with the processor seconds of their process before them."""

    def __init__(self, samples: SampleDataset):
        self.samples = samples

    def __getitem__(self, key):
        return {"clock": torch.tensor(time.process_time(), dtype=torch.float64), **self.samples[key]}


def time_worker(dataset: SampleDataset, step: int, volumes: int) -> float:
    """Volumes per processor second of a loader process, which shares them with this one."""
    fabric = Fabric(accelerator="cpu", devices=1)
    keys = [[(step, number)] for number in range(volumes + 1)]
    clocks = [batch["clock"].item() for batch in load_batches(fabric, Clocked(dataset), keys, workers=1)]
    return volumes / (clocks[-1] - clocks[0])


class OneView:
    """One view of GL-MAE as a sample."""

    def __init__(self, crop: ResizedCrop):
        self.crop = crop

    def draw(self, volume, rng):
        return dict(zip(("image", "ids_shuffle"), self.crop.draw(volume, rng), strict=True))


def glmae_rates(data: CaseSet, args: argparse.Namespace) -> dict[str, list[float]]:
    """Views per second of GL-MAE's two kinds and of one plain crop, taking turns."""
    local, large = (args.crop,) * 3, (args.crop * 5 // 3 // args.patch * args.patch,) * 3
    tokens = {size: (size[0] // args.patch) ** 3 for size in (local, large)}
    large_view = ResizedCrop(large, tokens[large], (0.5, 1.0))
    local_view = ResizedCrop(local, tokens[local], (0.25, 0.5))
    views = {
        "one crop, no augmentation": MaskedCrop(local, tokens[local], augmentation=None),
        f"GL-MAE local view, {local[0]}³": OneView(local_view),
        f"GL-MAE global view, {large[0]}³": OneView(large_view),
    }
    whole = GlobalLocalCrops(large_view, local_view, 2, 4)
    workers = {"a volume's views, from a worker": whole, "a volume's boxes, from a worker": unresized(whole)}
    datasets = {name: SampleDataset(data, view.draw, 0) for name, view in views.items()}
    rates = {name: [] for name in (*views, *workers)}
    for repeat in range(args.repeats + 1):
        for name, dataset in datasets.items():
            # a global view takes as long as dozens of crops
            rates[name].append(
                time_ours(dataset, repeat, max(8, args.crops // (10 if "global" in name else 1)), CLOCKS[args.clock])
            )
        for name, drawn in workers.items():
            rates[name].append(time_worker(SampleDataset(data, drawn.draw, 0), repeat, max(8, args.crops // 10)))
    return rates


def crop_rates(data: CaseSet, args: argparse.Namespace) -> dict[str, list[float]]:
    """Crops per second with and without augmentation, and of the peer, taking turns."""
    size, tokens = (args.crop,) * 3, (args.crop // args.patch) ** 3
    views = {"with augmentation": MaskedCrop(size, tokens), "without": MaskedCrop(size, tokens, augmentation=None)}
    datasets = {k: SampleDataset(data, v.draw, 0) for k, v in views.items()}
    rates = {"with augmentation": [], "without": [], "whole volume, with augmentation": []}
    for repeat in range(args.repeats + 1):
        for name, dataset in datasets.items():
            rates[name].append(time_ours(dataset, repeat, args.crops, CLOCKS[args.clock]))
        whole = time_whole(list(data.cases), views["with augmentation"], repeat, args.crops, CLOCKS[args.clock])
        rates["whole volume, with augmentation"].append(whole)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--crop", type=int, default=96, help="crop edge in voxels")
    parser.add_argument(
        "--patch", type=int, default=16, help="ViT patch edge in voxels (decides the token permutation's length)"
    )
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--crops", type=int, default=160, help="crops per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--glmae", action="store_true", help="measure GL-MAE's views")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = tuple(make_volume(Path(folder), i) for i in range(args.volumes))
        volumes = VolumeFormat(SPACING_MM, (-175, 250), "SimpleITKIO", None, None, ("CTNormalization",), ("CT",))
        rates = (glmae_rates if args.glmae else crop_rates)(CaseSet(cases, volumes), args)
    print(
        f"machine: {cpu_model()}, 1 of {os.cpu_count()} cores; torch {torch.__version__}, blosc2 {blosc2.__version__}"
    )
    print(f"{args.volumes} volumes of 280×280×200, crop {args.crop}³, {args.crops} crops × {args.repeats} repeats\n")
    print("| loader | crops or views/s per core (median) | interquartile range | ratio |\n|---|---|---|---|")
    peer = statistics.median(
        rates["one crop, no augmentation" if args.glmae else "whole volume, with augmentation"][1:]
    )
    for name, all_rates in rates.items():
        low, middle, high = statistics.quantiles(all_rates[1:], n=4)
        print(f"| {name} | {middle:.3g} | {low:.3g} – {high:.3g} | {middle / peer:.2g} |")


if __name__ == "__main__":
    main()
