"""Everything that costs time on a GPU, in one table: pretraining steps of every method, fine-tuning steps and
predictions of our networks beside nnU-Net's default and ResEnc-M, at the same patch.

    python benchmarks/all.py --quick -o table.md           # at most 8 minutes of one GPU
    python benchmarks/all.py --device cpu --tiny           # does it run at all?

A step is forward, backward and optimizer; its share is the number of floating point operations that PyTorch counts in
it, by its seconds, by the rate of a large matrix product in the same precision on the same machine. Samples per second
are what loaders have to deliver, which loader.py measures.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from machine import cpu_model
from mim_memory import NoiseVolume, host_peak
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_hiendmae.architectures import ENCODERS, PRESETS
from nnunetv2_hiendmae.optim import adamw
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.blocks import carry_out

GB, CLASSES, PATCH = 1e9, 14, 96
# method, encoder, samples per step: what a GPU with 24 GB takes
PRETRAINING = (("hiendmae", "vit_base_p16", 16), ("hiendmae", "vit_hiend_p12", 16), ("mim", "convvit_base", 2))
PRETRAINING += (("glmae", "vit_tiny_p16", 4), ("mae3d", "vit_base_p16", 16))
TINY = (("hiendmae", "vit_nano_p8", 2), ("mae3d", "vit_nano_p8", 2))
FINETUNED = ("vit_base_p16", "vit_hiend_p12", "convvit_base")
BATCH, TINY_PATCH = 2, 32
VOLUME = (200, 260, 260)


@dataclass(frozen=True)
class Way:
    """How something is carried out."""

    precision: str
    compiled: bool = False
    checkpointed: bool = False

    @property
    def name(self) -> str:
        extra = (", compiled" if self.compiled else "") + (", checkpointed" if self.checkpointed else "")
        return f"{self.precision}{extra}"

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Bench:
    """The device, how often to repeat, and the table."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.repeats, self.output = torch.device(args.device), args.repeats, args.output
        self.lines: list[str] = []
        self.rates = {p: self.matrix_rate(p, 512 if args.tiny else 8192 if args.device == "cuda" else 2048)
                      for p in args.precisions}  # fmt: skip

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int | None = None, warm_up: int = 2) -> list[float]:
        """Of several calls, after some that do not count."""
        taken = []
        for i in range(warm_up + (repeats or self.repeats)):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            if i >= warm_up:
                taken.append(time.perf_counter() - start)
        return taken

    def matrix_rate(self, precision: str, size: int) -> float:
        """Floating point operations per second of a plain matrix product."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / statistics.median(self.seconds(lambda: a @ b, 10))

    def peak(self) -> float:
        """Bytes; on a CPU those of the process so far."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else host_peak()

    def forget(self) -> None:
        # a function that is compiled for too many networks is no longer compiled
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def say(self, line: str) -> None:
        self.lines.append(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self.output:
            self.output.write_text("\n".join(self.lines) + "\n")

    def attempt(self, what: str, how: str, work: Callable[[], object], *times: int) -> list[float]:
        """`seconds`; what does not fit into the memory, or cannot be compiled here, is told as that, and nothing
        returned."""
        try:
            return self.seconds(work, *times)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            self.say(f"| {what} | {how} | {type(e).__name__} | | | |")
            return []

    def row(self, what: str, way: Way, samples: int, flops: int, work: Callable[[], object]) -> None:
        """Measures and tells."""
        if not (taken := self.attempt(what, way.name, work)):
            return
        low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
        share = f"{flops / middle / self.rates[way.precision]:.0%}" if flops else ""
        told = f"{middle:.4f} [{low:.4f}, {high:.4f}] | {samples / middle:.1f} | {share} | {self.peak() / GB:.2f}"
        self.say(f"| {what} | {way.name} | {told} |")


def count(work: Callable[[], object]) -> int:
    """Floating point operations; 0 where memory is too small for the work as it is counted, which keeps every
    activation."""
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    except torch.OutOfMemoryError:
        return 0
    return counter.get_total_flops()


def pretraining(bench: Bench, name: str, encoder: str, samples: int, ways: list[Way]) -> None:
    flops = 0
    for way in ways:
        torch.manual_seed(0)
        method = METHODS[name](PRESETS[encoder]).to(bench.device).train()
        views = method.views()
        drawn = [views.draw(NoiseVolume(tuple(views.padded_below)), np.random.default_rng(i)) for i in range(2)]
        batch = {k: torch.stack([drawn[i % 2][k] for i in range(samples)]).to(bench.device) for k in drawn[0]}
        optimizer = adamw([{"params": [p for p in method.parameters() if p.requires_grad]}], 1e-5)

        def step(method=method, batch=batch, optimizer=optimizer, way=way) -> None:
            for part in range(method.num_parts):
                with way.autocast(bench.device):
                    loss = method(batch, part)["loss"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        # counted once, as it is computed without any of the ways
        flops = flops or count(step)
        carry_out(method, way.compiled, way.checkpointed)
        bench.forget()
        bench.row(f"{name}, {encoder}, {samples} samples", way, samples, flops, step)
        del method, batch, optimizer, step
        bench.forget()


def networks(tiny: bool) -> Iterator[tuple[str, int, Callable[[], nn.Module]]]:
    """Name, edge of the patch, and how to build it: ours, and what nnU-Net plans for patches of this size."""
    edge = TINY_PATCH if tiny else PATCH
    for preset in ("vit_nano_p8",) if tiny else FINETUNED:
        spec = PRESETS[preset].with_(img_size=(edge,) * 3, cls_token=False, pos_embed="learned")
        spec = spec.with_(**ENCODERS[spec.kind].finetuning)
        kwargs = spec.to_dict()
        network = resolve_name(ENCODERS[spec.kind].network)
        width = 48 if spec.kind == "convvit" else 32
        yield preset, edge, lambda n=network, k=kwargs, w=width: n(k["in_channels"], CLASSES, decoder_width=w,
            **{key: value for key, value in k.items() if key != "in_channels"})  # fmt: skip
    stages = 4 if tiny else 5
    shared = {
        "input_channels": 1,
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**i, 320) for i in range(stages)],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3] * 3] * stages,
        "strides": [[1] * 3, *[[2] * 3] * (stages - 1)],
        "num_classes": CLASSES,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    decoder = [2] * (stages - 1)
    yield (
        "nnU-Net default",
        edge,
        lambda: PlainConvUNet(n_conv_per_stage=[2] * stages, n_conv_per_stage_decoder=decoder, **shared),
    )
    blocks = [1, 3, 4, 6, 6, 6][:stages]
    yield (
        "nnU-Net ResEnc-M",
        edge,
        lambda: ResidualEncoderUNet(n_blocks_per_stage=blocks, n_conv_per_stage_decoder=[1] * (stages - 1), **shared),
    )


def finetuning(bench: Bench, tiny: bool, ways: list[Way]) -> None:
    for name, edge, build in networks(tiny):
        flops, image = 0, torch.randn(BATCH, 1, edge, edge, edge, device=bench.device)
        for way in ways:
            torch.manual_seed(0)
            network = build().to(bench.device).train()
            optimizer = adamw([{"params": list(network.parameters())}], 1e-5)

            def step(network=network, optimizer=optimizer, way=way, image=image) -> None:
                with way.autocast(bench.device):
                    loss = network(image).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            flops = flops or count(step)
            if way.compiled:
                # as nnU-Net compiles
                network.compile()
            bench.forget()
            bench.row(f"fine-tuning, {name}, {BATCH} crops of {edge}³", way, BATCH, flops, step)
            del network, optimizer, step
            bench.forget()


def prediction(bench: Bench, tiny: bool) -> None:
    """nnU-Net's sliding window with mirroring over one volume, in its precision: 16 bits on a GPU alone."""
    how = "fp16" if bench.device.type == "cuda" else "fp32"
    shape = (TINY_PATCH,) * 3 if tiny else VOLUME
    volume = torch.randn(1, *shape)
    for name, edge, build in networks(tiny):
        network = build().to(bench.device).eval()
        predictor = nnUNetPredictor(device=bench.device, perform_everything_on_device=bench.device.type == "cuda",
                                    verbose=False, allow_tqdm=False)  # fmt: skip
        predictor.network, predictor.allowed_mirroring_axes = network, (0, 1, 2)
        predictor.configuration_manager = SimpleNamespace(patch_size=[edge] * 3)
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=CLASSES)
        bench.forget()
        what = f"prediction, {name}, {shape} voxels, mirrored"

        def predict(predictor=predictor) -> object:
            return predictor.predict_sliding_window_return_logits(volume)

        for seconds in bench.attempt(what, how, predict, 1, 0 if tiny else 1):
            bench.say(f"| {what} | {how} | {seconds:.2f} | {1 / seconds:.2f} | | {bench.peak() / GB:.2f} |")
        del network, predictor, predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="fewer repeats, bf16 only")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="also write the table there, line by line")
    args = parser.parse_args()
    args.repeats = 3 if args.tiny else 8 if args.quick else 20
    args.precisions = ("bf16",) if args.quick else ("bf16", "fp32")
    if args.tiny:
        args.precisions = ("fp32",)
    bench = Bench(args)
    name = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_model()}, {torch.get_num_threads()} threads"
    )
    rates = ", ".join(f"{precision} {rate / 1e12:.3g} TFLOP/s" for precision, rate in bench.rates.items())
    bench.say(f"{name}; torch {torch.__version__}; matrix product: {rates}\n")
    bench.say("| what | how | s, median [quartiles] | samples/s | share of the matrix product | peak GB |")
    bench.say("|---|---|---|---|---|---|")
    plain = [Way(precision) for precision in args.precisions]
    compiled = [] if args.no_compile else [Way(args.precisions[0], compiled=True)]
    checkpointed = [Way(args.precisions[0], checkpointed=True)]
    cases = TINY if args.tiny else PRETRAINING
    for case in cases:
        pretraining(bench, *case, [*plain, *checkpointed])
    finetuning(bench, args.tiny, plain)
    prediction(bench, args.tiny)
    # last, as compiling takes longest: a table that is cut off lacks only these rows
    for case in cases if compiled else ():
        pretraining(bench, *case, compiled)
    if compiled:
        finetuning(bench, args.tiny, compiled)


if __name__ == "__main__":
    main()
