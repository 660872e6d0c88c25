"""How long one training step takes, and how much memory: against MONAI's networks of the same size, another commit of
ours, and ours with blocks computed twice.

Each side is a process of its own. They take turns, so that a busy machine slows all alike; ratios are taken round by
round, as is the share of the rate at which a plain product of two 2048² matrices runs. Where other work fills the
cores, `--clock cpu` with OMP_NUM_THREADS=1 counts processor seconds instead of waiting. Prints a markdown table:
medians, and in brackets the quartiles. Needs the `benchmark` extra.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import monai
import numpy as np
import torch
from machine import CLOCKS, HERE, cpu_model, worktree
from mim_memory import NoiseVolume, host_peak
from monai.networks.nets import UNETR, MaskedAutoEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_hiendmae import optim
from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec, ViTUNETR
from nnunetv2_hiendmae.architectures.tokens import normalize_patches, patchify
from nnunetv2_hiendmae.pretraining import METHODS

EDGE, PATCH, MASK_RATIO, CLASSES = 96, 16, 0.75, 14
HEADS = {192: 3, 768: 12}
# the papers' decoder is 512 wide; MONAI's sin-cos table needs a multiple of 6, so both sides get 576
MAE_DECODER = {"width": 576, "depth": 8, "heads": 16}
UNETR_WIDTH = 16
WARM_UP = 1
MATRIX = 2048
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.05
OURS, MONAI, TWICE = "ours", "MONAI", "ours, blocks twice"

# an image → the parts of a loss, each of which goes backward before the next is computed
Loss = Callable[[Tensor], Iterator[Tensor]]


class Step:
    """Forward and backward of a network, and the optimizer's step where there is an optimizer."""

    def __init__(self, case: str, side: str, width: int, args: argparse.Namespace):
        ours, peer, optimize = CASES[case]
        self.device, self.clock, self.bf16 = torch.device(args.device), CLOCKS[args.clock], args.precision == "bf16"
        torch.manual_seed(0)
        network, self.loss = (peer if side == MONAI else ours)(width)
        self.network = network.to(self.device).train()
        if side == TWICE:
            from nnunetv2_hiendmae.pretraining.blocks import carry_out

            carry_out(network, compiled=False, checkpointed=True)
        if side != MONAI and args.device == "cpu":
            with suppress(ImportError):
                # other commits may not have it
                from nnunetv2_hiendmae.host_memory import set_freed_memory

                set_freed_memory(keep=side != TWICE)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = self._optimizer(side) if optimize else None
        self.image = torch.rand(args.batch, 1, EDGE, EDGE, EDGE, device=self.device)

    def _optimizer(self, side: str) -> torch.optim.Optimizer:
        if side == MONAI:
            return torch.optim.AdamW(self.parameters, lr=LR, betas=BETAS)
        groups = optim.parameter_groups(self.network, WEIGHT_DECAY)
        # other commits may not have our function
        return getattr(optim, "adamw", torch.optim.AdamW)(groups, lr=LR, betas=BETAS)

    def __call__(self) -> tuple[float, float]:
        """Runs one step; seconds of all of it, and of forward and backward."""
        start = self._now()
        losses = self.loss(self.image)
        while True:
            with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                loss = next(losses, None)
            if loss is None:
                break
            loss.backward()
        learned = self._now() - start
        if self.optimizer is not None:
            self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        return self._now() - start, learned

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def own_peak() -> float:
    """Bytes; on Linux of this process alone, where `host_peak` begins with what its parent had."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else host_peak()


def serve(case: str, side: str, width: int, args: argparse.Namespace) -> None:
    """One side in this process: a step for every line of stdin, told as JSON."""
    before = own_peak()
    step = Step(case, side, width, args)
    for _ in sys.stdin:
        seconds, learned = step()
        peak = torch.cuda.max_memory_allocated() if step.device.type == "cuda" else own_peak() - before
        print(json.dumps({"seconds": seconds, "learned": learned, "peak": peak}), flush=True)


@contextmanager
def served(case: str, side: str, width: int, package: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that has a step done by `serve` in a process with the package of that folder."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--serve", case, side, str(width)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(package)}, **pipes) as process:

        def step() -> dict[str, float]:
            process.stdin.write("step\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield step
        process.stdin.close()


def operations(case: str, width: int, args: argparse.Namespace) -> int:
    """Floating-point operations of our matrix products and convolutions in forward and backward, each once."""
    args = argparse.Namespace(**{**vars(args), "device": "cpu", "precision": "32"})
    # fused attention is not counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Step(case, OURS, width, args)()
    return counter.get_total_flops()


def matrix_rate(args: argparse.Namespace) -> float:
    """Operations per second of a matrix product, the best of three."""
    clock, dtype = CLOCKS[args.clock], torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, seconds = torch.rand(MATRIX, MATRIX, device=args.device, dtype=dtype), []
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for _ in range(4):
        synchronize()
        start = clock()
        a @ a
        synchronize()
        seconds.append(clock() - start)
    return 2 * MATRIX**3 / min(seconds[1:])


def spec_of(width: int, **changes) -> EncoderSpec:
    return EncoderSpec((EDGE,) * 3, (PATCH,) * 3, width, depth=12, num_heads=HEADS[width], **changes)


def our_method(method: nn.Module) -> tuple[nn.Module, Loss]:
    def loss(image: Tensor) -> Iterator[Tensor]:
        # "order" was its name before
        ids_shuffle = torch.rand(len(image), method.spec.num_tokens, device=image.device).argsort(dim=1)
        yield method({"image": image, "ids_shuffle": ids_shuffle, "order": ids_shuffle})["loss"]

    return method, loss


def monai_mae(width: int) -> tuple[nn.Module, Loss]:
    network = MaskedAutoEncoderViT(
        in_channels=1,
        img_size=EDGE,
        patch_size=PATCH,
        hidden_size=width,
        mlp_dim=4 * width,
        num_layers=12,
        num_heads=HEADS[width],
        masking_ratio=MASK_RATIO,
        decoder_hidden_size=MAE_DECODER["width"],
        decoder_mlp_dim=4 * MAE_DECODER["width"],
        decoder_num_layers=MAE_DECODER["depth"],
        decoder_num_heads=MAE_DECODER["heads"],
        qkv_bias=True,
    )

    def loss(image: Tensor) -> Iterator[Tensor]:
        prediction, mask = network(image)
        masked = mask.bool()
        target = normalize_patches(patchify(image, (PATCH,) * 3)[masked], unbiased=True)
        yield F.mse_loss(prediction[masked].float(), target)

    return network, loss


def mae3d(width: int) -> tuple[nn.Module, Loss]:
    decoder = {f"decoder_{k}": v for k, v in zip(("dim", "depth", "heads"), MAE_DECODER.values(), strict=True)}
    return our_method(METHODS["mae3d"](spec_of(width), mask_ratio=MASK_RATIO, **decoder))


def hiendmae(width: int) -> tuple[nn.Module, Loss]:
    return our_method(METHODS["hiendmae"](spec_of(width), mask_ratio=MASK_RATIO))


def mim(width: int) -> tuple[nn.Module, Loss]:
    """7 of the 21 views of as many volumes as there are images; `convvit_base`, whatever the width."""
    method = METHODS["mim"](PRESETS["convvit_base"], crops_level2=2, crops_level3=2)
    views = method.views()
    sample = views.draw(NoiseVolume(views.padded_below), np.random.default_rng(0))

    def loss(image: Tensor) -> Iterator[Tensor]:
        batch = {name: torch.stack([view] * len(image)).to(image.device) for name, view in sample.items()}
        for part in range(method.num_parts):
            yield method(batch, part)["loss"]

    return method, loss


def segmentation(network: nn.Module) -> tuple[nn.Module, Loss]:
    def loss(image: Tensor) -> Iterator[Tensor]:
        yield network(image).float().square().mean()

    return network, loss


def our_unetr(width: int) -> tuple[nn.Module, Loss]:
    spec = spec_of(width, cls_token=False, pos_embed="learned", norm_eps=1e-5).to_dict()
    return segmentation(ViTUNETR(spec.pop("in_channels"), CLASSES, decoder_width=UNETR_WIDTH, **spec))


def monai_unetr(width: int) -> tuple[nn.Module, Loss]:
    return segmentation(
        UNETR(
            in_channels=1,
            out_channels=CLASSES,
            img_size=EDGE,
            feature_size=UNETR_WIDTH,
            hidden_size=width,
            mlp_dim=4 * width,
            num_heads=HEADS[width],
            norm_name="instance",
            res_block=True,
            qkv_bias=True,
        )
    )


# name: ours, peer, whether the optimizer belongs to the step
CASES = {
    "mae3d": (mae3d, monai_mae, True),
    "hiendmae": (hiendmae, monai_mae, True),
    "mim": (mim, None, True),
    "unetr": (our_unetr, monai_unetr, False),
}


def summary(values: list[float], digits: int = 3) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine(device: torch.device) -> str:
    """CPU or GPU model, cores, versions."""
    name = f"{cpu_model()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return f"{name}; torch {torch.__version__}, MONAI {monai.__version__}"


def compare(case: str, width: int, sides: dict[str, Path], args: argparse.Namespace) -> Iterator[str]:
    """Rows of the table: steps of all sides in turns; who begins changes from round to round."""
    count, rates, rounds = operations(case, width, args), [], []
    with ExitStack() as held:
        steps = {side: held.enter_context(served(case, side, width, where)) for side, where in sides.items()}
        for _ in range(WARM_UP):
            for step in steps.values():
                step()
        for i in range(args.repeats):
            rates.append(matrix_rate(args))
            order = list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]
            found = {side: steps[side]() for side in order}
            rounds.append({side: found[side] for side in steps})
    for side in sides:
        own = [found[side] for found in rounds]
        ratios = [found[OURS]["seconds"] / found[side]["seconds"] for found in rounds]
        # others may do more than they have to
        shares = [count / found["learned"] / rate for found, rate in zip(own, rates, strict=True)]
        cells = [summary([f["seconds"] for f in own]), summary([f["learned"] for f in own]), summary(shares, 2)]
        peak = max(found["peak"] for found in own) / 1e9
        yield f"| {case} | {width} | {side} | {' | '.join(cells)} | {summary(ratios, 2)} | {peak:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to measure")
    parser.add_argument("--widths", nargs="+", type=int, choices=HEADS, default=list(HEADS), help="encoder widths")
    parser.add_argument("--sides", nargs="+", choices=(MONAI, "twice"), default=[MONAI, "twice"], help="beside ours")
    parser.add_argument("--against", metavar="REV", help="a commit of ours as a further side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16 is autocast")
    parser.add_argument("--batch", type=int, default=2, help=f"crops of {EDGE}³ voxels per step")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, after the warm-up")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall: elapsed; cpu: processor seconds")
    parser.add_argument("--serve", nargs=3, metavar=("CASE", "SIDE", "WIDTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        case, side, width = args.serve
        serve(case, side, int(width), args)
        return
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    print(f"{machine(torch.device(args.device))}; precision {args.precision}, batch {args.batch}, ", end="")
    print(
        f"{args.clock} clock, {args.repeats} rounds; a matrix product runs at {matrix_rate(args) / 1e9:.1f} GFLOP/s\n"
    )
    print("| case | E | side | step (s) | forward + backward (s) | share of the matrix rate | ours / it | peak (GB) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with TemporaryDirectory() as folder, ExitStack() as held:
        sides = {OURS: HERE}
        if args.against:
            sides[args.against] = held.enter_context(worktree(args.against, Path(folder) / "against"))
        for case in args.cases:
            more = {MONAI: HERE} if MONAI in args.sides and CASES[case][1] else {}
            # what a segmentation network keeps is its decoder's
            more |= {TWICE: HERE} if "twice" in args.sides and case != "unetr" else {}
            for width in args.widths if case != "mim" else [PRESETS["convvit_base"].embed_dim]:
                for row in compare(case, width, sides | more, args):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
