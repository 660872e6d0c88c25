"""A tiny preprocessed dataset in which the class is visible, its labels, and the command line of a tiny run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunet_data import save_tiny_encoder
from run_data import PLANS, TINY_SPEC, write_preprocessed

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.classification.train import Task, build_task
from nnunetv2_hiendmae.commands.arguments import from_arguments
from nnunetv2_hiendmae.options.commands import ClassifyOptions


def visible(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Noise; every second case has a bright ball somewhere in it."""
    rng = np.random.default_rng(number)
    image = 0.3 * rng.random(shape)
    centre = [rng.uniform(0.3, 0.7) * s for s in shape]
    axes = np.meshgrid(*(np.arange(s) - c for s, c in zip(shape, centre, strict=True)), indexing="ij")
    if number % 2:
        image[sum(a**2 for a in axes) < 25] += 0.6
    return image


def write_cases(preprocessed: Path, count: int, dataset: str = "Dataset001_Tiny", fill=visible) -> list[str]:
    """Cases c00, c01, … of three shapes, odd ones with the ball."""
    shapes = [(20, 22, 18), (16, 16, 16), (24, 20, 20)]
    names = [f"c{i:02d}" for i in range(count)]
    write_preprocessed(preprocessed, {n: shapes[i % 3] for i, n in enumerate(names)}, dataset, fill=fill)
    return names


def write_csv(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("case", "label")) -> Path:
    """Comma-separated rows below a header."""
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


def label_rows(names: Sequence[str]) -> list[tuple[str, str]]:
    """'healthy' for even cases, 'ill' for odd ones."""
    return [(name, ("healthy", "ill")[int(name[1:]) % 2]) for name in names]


class Bench:
    """Data, labels and an encoder file of one test, and the command line over them."""

    def __init__(self, folder: Path, preprocessed: Path, count: int):
        self.folder = folder
        self.names = write_cases(preprocessed, count)
        self.labels = write_csv(folder / "cases.csv", label_rows(self.names))
        # another seed than that of the runs: their fresh weights must not look like these
        self.encoder = save_tiny_encoder(
            folder / "encoder.safetensors", spec=TINY_SPEC, spacing_mm=(3.0, 3.0, 3.0), seed=7
        )

    def arguments(self, run: str, *more: object) -> list[str]:
        """Of a training of a few epochs into the folder `run`."""
        basic = ("classify", "train", "-d", 1, "-p", PLANS, "--labels", self.labels, "-w", self.encoder)
        short = ("--epochs", 4, "--lr", 1e-3, "--checkpoint-every", 1, "--workers", 0, "-device", "cpu")
        return [str(a) for a in (*basic, *short, "-o", self.folder / run, *more)]

    def task(self, *more: object) -> Task:
        """The task that those arguments describe."""
        args = cli.build_parser().parse_args(self.arguments("run", *more))
        return build_task(args.datasets, args.labels_file, args.encoder_file, from_arguments(ClassifyOptions, args))

    def train(self, run: str, *more: object) -> Path:
        """Trains through the command line; the run folder."""
        assert cli.main(self.arguments(run, *more)) == 0
        return self.folder / run

    def predict(self, run: str, *more: object) -> int:
        """Exit code of `classify predict`."""
        basic = ("classify", "predict", "-d", 1, "-m", self.folder / run, "--workers", 0, "-device", "cpu")
        return cli.main([str(a) for a in (*basic, *more)])
