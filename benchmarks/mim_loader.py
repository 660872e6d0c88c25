"""What a worker does for one MiM volume: ours, which leaves enlarging level 3 to the device, against doing it in the
worker, in the same run and taking turns. One process, one thread, 96³ crops of 280×280×200 volumes.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from loader import make_volume
from machine import cpu_model

from nnunetv2_hiendmae.pretraining.crops import NestedCrops, cut_blocks, resize
from nnunetv2_hiendmae.training.batches import SampleDataset
from nnunetv2_hiendmae.training.volumes import CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat

CROP, PATCH = (96,) * 3, (16,) * 3


class EnlargingCrops(NestedCrops):
    """The peer: level 3 leaves the worker as the encoder sees it."""

    def draw(self, volume, rng):
        sample = super().draw(volume, rng)
        patches = cut_blocks(sample["level2"], sample["patches"], PATCH).flatten(0, 1)
        return {**sample, "level3": resize(patches, CROP)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--volumes", type=int, default=20, help="volumes per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    geometry = {"visible_octants": 4, "visible_level2": 86, "crops_level2": 4, "crops_level3": 4}
    views = {"ours": NestedCrops, "level 3 enlarged in the worker": EnlargingCrops}
    with tempfile.TemporaryDirectory() as folder:
        cases = tuple(make_volume(Path(folder), i) for i in range(2))
        form = VolumeFormat((1.5,) * 3, (-175, 250), "SimpleITKIO", None, None, ("CTNormalization",), ("CT",))
        data = CaseSet(cases, form)
        datasets = {k: SampleDataset(data, v(CROP, (6, 6, 6), **geometry).draw, 0) for k, v in views.items()}
        seconds = {name: [] for name in datasets}
        for repeat in range(args.repeats + 1):
            for name, dataset in datasets.items():
                start = time.perf_counter()
                for i in range(args.volumes):
                    dataset[(repeat, i)]
                seconds[name].append((time.perf_counter() - start) / args.volumes)
        sizes = {
            name: sum(t.nbytes for t in dataset[(0, 0)].values() if isinstance(t, torch.Tensor))
            for name, dataset in datasets.items()
        }
    print(f"machine: {cpu_model()}, 1 of {os.cpu_count()} cores; torch {torch.__version__}\n")
    print("| views | ms per volume (median, quartiles) | MB per volume |\n|---|---|---|")
    for name, all_seconds in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(all_seconds[1:], n=4))
        print(f"| {name} | {middle:.0f} [{low:.0f}, {high:.0f}] | {sizes[name] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
