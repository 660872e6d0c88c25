"""How long one training step takes, against MONAI's networks of the same size in the same run.

Ours and the peer take turns, so that a busy machine slows both alike; the ratio is taken pair by pair. Where other
work fills the cores, `--clock cpu` with OMP_NUM_THREADS=1 counts this process's processor seconds instead of waiting.
Prints a markdown table: medians, and in brackets the quartiles. Needs the `benchmark` extra.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import monai
import torch
from machine import CLOCKS, cpu_model
from monai.networks.nets import UNETR, MaskedAutoEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures import EncoderSpec, ViTUNETR
from nnunetv2_hiendmae.architectures.tokens import normalize_patches, patchify
from nnunetv2_hiendmae.pretraining.hiendmae import HiEndMAE
from nnunetv2_hiendmae.pretraining.masked import MAE3D

EDGE, PATCH, MASK_RATIO, CLASSES = 96, 16, 0.75, 14
HEADS = {192: 3, 768: 12}
# the papers' decoder is 512 wide; MONAI's sin-cos table needs a multiple of 6, so both sides get 576
MAE_DECODER = {"width": 576, "depth": 8, "heads": 16}
UNETR_WIDTH = 16
WARM_UP = 1

Loss = Callable[[Tensor], Tensor]


class Step:
    """Forward and backward of a network, and the optimizer's step where there is an optimizer."""

    def __init__(self, network: nn.Module, loss: Loss, optimize: bool, args: argparse.Namespace):
        self.device, self.clock, self.bf16 = torch.device(args.device), CLOCKS[args.clock], args.precision == "bf16"
        self.network, self.loss = network.to(self.device).train(), loss
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95)) if optimize else None

    def __call__(self, image: Tensor) -> float:
        """Runs one step; seconds."""
        self._synchronize()
        start = self.clock()
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.loss(image)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        self._synchronize()
        return self.clock() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def spec_of(width: int, **changes) -> EncoderSpec:
    return EncoderSpec((EDGE,) * 3, (PATCH,) * 3, width, depth=12, num_heads=HEADS[width], **changes)


def our_method(method: nn.Module) -> tuple[nn.Module, Loss]:
    def loss(image: Tensor) -> Tensor:
        ids_shuffle = torch.rand(len(image), method.spec.num_tokens, device=image.device).argsort(dim=1)
        return method({"image": image, "ids_shuffle": ids_shuffle})["loss"]

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

    def loss(image: Tensor) -> Tensor:
        prediction, mask = network(image)
        masked = mask.bool()
        target = normalize_patches(patchify(image, (PATCH,) * 3)[masked], unbiased=True)
        return F.mse_loss(prediction[masked].float(), target)

    return network, loss


def mae3d(width: int) -> tuple[nn.Module, Loss]:
    decoder = {f"decoder_{k}": v for k, v in zip(("dim", "depth", "heads"), MAE_DECODER.values(), strict=True)}
    return our_method(MAE3D(spec_of(width), mask_ratio=MASK_RATIO, **decoder))


def hiendmae(width: int) -> tuple[nn.Module, Loss]:
    return our_method(HiEndMAE(spec_of(width), mask_ratio=MASK_RATIO))


def segmentation(network: nn.Module) -> tuple[nn.Module, Loss]:
    return network, lambda image: network(image).float().square().mean()


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
    "unetr": (our_unetr, monai_unetr, False),
}


def compare(ours: Step, peer: Step, image: Tensor, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns; who begins changes from pair to pair."""
    for _ in range(WARM_UP):
        ours(image), peer(image)
    times = {ours: [], peer: []}
    for i in range(repeats):
        for step in (ours, peer) if i % 2 else (peer, ours):
            times[step].append(step(image))
    return times[ours], times[peer]


def summary(values: list[float], digits: int = 3) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine(device: torch.device) -> str:
    """CPU or GPU model, cores, versions."""
    name = f"{cpu_model()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return f"{name}; torch {torch.__version__}, MONAI {monai.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to measure")
    parser.add_argument("--widths", nargs="+", type=int, choices=HEADS, default=list(HEADS), help="encoder widths")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16 is autocast")
    parser.add_argument("--batch", type=int, default=2, help=f"crops of {EDGE}³ voxels per step")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps, after the warm-up")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall: elapsed; cpu: processor seconds")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    device = torch.device(args.device)
    image = torch.rand(args.batch, 1, EDGE, EDGE, EDGE, device=device)

    print(
        f"{machine(device)}; precision {args.precision}, batch {args.batch}, {args.clock} clock, {args.repeats} pairs\n"
    )
    print("| case | E | parameters ours / peer (M) | ours (s) | MONAI (s) | ratio ours / MONAI |")
    print("|---|---|---|---|---|---|")
    for name in args.cases:
        make_ours, make_peer, optimize = CASES[name]
        for width in args.widths:
            torch.manual_seed(0)
            ours, peer = (Step(*make(width), optimize, args) for make in (make_ours, make_peer))
            times = compare(ours, peer, image, args.repeats)
            sizes = " / ".join(f"{sum(map(math.prod, map(Tensor.size, s.parameters))) / 1e6:.2f}" for s in (ours, peer))
            ratios = [a / b for a, b in zip(*times, strict=True)]
            print(f"| {name} | {width} | {sizes} | {summary(times[0])} | {summary(times[1])} | {summary(ratios, 2)} |")


if __name__ == "__main__":
    main()
