"""Loader speed: crops per second and core, with augmentation, from 280×280×200 volumes in nnU-Net's storage format.

The peer, in the same run and interleaved, is the way most pretraining code loads: read the whole volume, then cut
8 crops (as Hi-End-MAE's published loader does) with the same augmentation.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import blosc2
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from scipy.ndimage import gaussian_filter

from nnunetv2_hiendmae.pretraining.data import Case, PretrainData, SampleDataset, VolumeFormat
from nnunetv2_hiendmae.pretraining.views import MaskedCrop

SHAPE = (200, 280, 280)
CROPS_PER_VOLUME = 8


class WholeVolume:
    """The peer: the volume is in memory and crops are cut from it."""

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


def time_ours(dataset: SampleDataset, step: int, crops: int) -> float:
    start = time.perf_counter()
    for i in range(crops):
        dataset[(step, i)]
    return crops / (time.perf_counter() - start)


def time_whole(cases: list[Case], views: MaskedCrop, step: int, crops: int) -> float:
    rng = np.random.default_rng(step)
    start = time.perf_counter()
    for i in range(crops // CROPS_PER_VOLUME):
        volume = WholeVolume(cases[i % len(cases)].path)
        for _ in range(CROPS_PER_VOLUME):
            views.draw(volume, rng)
    return crops / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--crop", type=int, default=96, help="crop edge in voxels")
    parser.add_argument(
        "--patch", type=int, default=16, help="ViT patch edge in voxels (decides the token order's length)"
    )
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--crops", type=int, default=160, help="crops per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.crop,) * 3
    tokens = (args.crop // args.patch) ** 3
    with tempfile.TemporaryDirectory() as folder:
        cases = [make_volume(Path(folder), i) for i in range(args.volumes)]
        volumes = VolumeFormat(("CT",), (1.5,) * 3, ("CTNormalization",), (-175, 250), 0.0, "SimpleITKIO")
        views = {"with augmentation": MaskedCrop(size, tokens), "without": MaskedCrop(size, tokens, augmentation=None)}
        datasets = {k: SampleDataset(PretrainData(tuple(cases), volumes), v, 0) for k, v in views.items()}
        rates = {"with augmentation": [], "without": [], "whole volume, with augmentation": []}
        for repeat in range(args.repeats + 1):
            for name, dataset in datasets.items():
                rates[name].append(time_ours(dataset, repeat, args.crops))
            whole = time_whole(cases, views["with augmentation"], repeat, args.crops)
            rates["whole volume, with augmentation"].append(whole)
    print(
        f"machine: {cpu_model()}, 1 of {os.cpu_count()} cores; torch {torch.__version__}, blosc2 {blosc2.__version__}"
    )
    print(f"{args.volumes} volumes of 280×280×200, crop {args.crop}³, {args.crops} crops × {args.repeats} repeats\n")
    print("| loader | crops/s per core (median) | interquartile range | ratio |\n|---|---|---|---|")
    peer = statistics.median(rates["whole volume, with augmentation"][1:])
    for name, all_rates in rates.items():
        low, middle, high = statistics.quantiles(all_rates[1:], n=4)
        print(f"| {name} | {middle:.0f} | {low:.0f} – {high:.0f} | {middle / peer:.2f} |")


def cpu_model() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


if __name__ == "__main__":
    main()
