"""UNETR: a ViT encoder and a convolutional decoder for segmentation."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.layers import Axes, Encoder
from nnunetv2_hiendmae.architectures.primus import PrimusEncoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec
from nnunetv2_hiendmae.architectures.vit import ViTEncoder

Factor = tuple[int, int, int]


def upsampling_factors(patch_size: Sequence[int]) -> tuple[list[Factor], Factor | None]:
    """How four up-sampling steps lead from the token grid to the voxels, for any patch.

    Returns:
        Factors (d, h, w) of the first three steps, and of the last one; None: the last step interpolates to the
        size of the image, which all axes do as soon as the patch of one is not a power of two (ours, after the
        authors' network for patches of 12 voxels).

    Each axis doubles as late as it can, so that an axis with thin patches keeps its resolution at the levels that
    have many channels. What a patch beyond 16 voxels needs on top goes into the last step: earlier it would make
    every level finer, with eight times the memory and the work per doubling.
    """
    early, last = [], []
    for p in patch_size:
        power_of_two = p & (p - 1) == 0
        # the last step takes one doubling, or the fraction that is left of an odd patch
        doublings = min(3, max(0, p.bit_length() - 1 - power_of_two))
        early.append([1] * (3 - doublings) + [2] * doublings)
        last.append(p >> doublings if power_of_two else None)
    return list(zip(*early, strict=True)), None if None in last else tuple(last)


# (in, out): two 3³ convolutions without bias, instance norm without affine, leaky ReLU, projected skip connection
residual_block = partial(
    BasicBlockD,
    nn.Conv3d,
    kernel_size=3,
    stride=1,
    norm_op=nn.InstanceNorm3d,
    norm_op_kwargs={"eps": 1e-5, "affine": False},
    nonlin=nn.LeakyReLU,
    nonlin_kwargs={"negative_slope": 0.01, "inplace": True},
)


def transposed_conv(in_channels: int, out_channels: int, factor: Factor) -> nn.ConvTranspose3d:
    """Up-sampling by a whole factor per axis; kernels do not overlap."""
    return nn.ConvTranspose3d(in_channels, out_channels, kernel_size=factor, stride=factor, bias=False)


def skip_branch(embed_dim: int, width: int, factors: Sequence[Factor]) -> nn.Sequential:
    """Brings a tap (B, E, d, h, w) to the level of `len(factors)` steps up: (B, width, D', H', W')."""
    layers = [transposed_conv(embed_dim, width, factors[0])]
    for factor in factors[1:]:
        layers += [transposed_conv(width, width, factor), residual_block(width, width)]
    return nn.Sequential(*layers)


class UpStep(nn.Module):
    """One level up: up-sample, concatenate the skip, residual block. `factor` None interpolates to the skip's size."""

    def __init__(self, in_channels: int, out_channels: int, factor: Factor | None):
        super().__init__()
        self.interpolate = factor is None
        channels = in_channels, out_channels
        self.up = transposed_conv(*channels, factor) if factor else nn.Conv3d(*channels, kernel_size=3, padding=1)
        self.block = residual_block(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, in, …) and the skip (B, out, D', H', W') → (B, out, D', H', W')."""
        if self.interpolate:
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.block(torch.cat([self.up(x), skip], dim=1))


class SegmentationNetwork(nn.Module):
    """An encoder and a decoder with one output. The signature is nnU-Net's, so that plans can name such a class.

    There is deliberately no `initialize`: nnU-Net would apply it to the encoder's patch embedding too.

    Attributes:
        encoder_classes: kinds of encoders that it reads.
        trainers: those that switch deep supervision off.
        default_width: of the decoder.
        axes: as `Encoder.axes`, of the tensors that are not the encoder's.

    Args:
        input_channels: channels of the image, cascade inputs included.
        num_classes: channels of the logits.
        deep_supervision: must be false; there is one output.
        decoder_width: channels w of the decoder at full resolution; None: `default_width`.
        spec_kwargs: the fields of `EncoderSpec` without `in_channels`, lists allowed for tuples; those of the kind's
            `finetuning` are set.

    Raises:
        ValueError: deep supervision is asked for, or the spec is invalid, of another kind or does not fit the decoder.
    """

    encoder_classes: ClassVar[tuple[type[Encoder], ...]]
    trainers: ClassVar[str]
    default_width: ClassVar[int] = 32
    axes: ClassVar[dict[str, Axes]] = {r".*\.weight": Axes.KERNEL, r".*\.bias": Axes.NONE}

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        decoder_width: int | None = None,
        **spec_kwargs: Any,
    ):
        super().__init__()
        name, kind = type(self).__name__, spec_kwargs.get("kind", EncoderSpec.kind)
        if deep_supervision:
            told = f"{name} has one output, deep supervision needs several"
            raise ValueError(f"{told}: train with -tr {self.trainers}, which switch it off")
        encoder_class = next((encoder for encoder in self.encoder_classes if encoder.kind == kind), None)
        if encoder_class is None:
            needed = " or ".join(f"'{encoder.kind}'" for encoder in self.encoder_classes)
            raise ValueError(f"{name} needs an encoder of kind {needed}, got '{kind}'")
        fields = {"in_channels": input_channels, **spec_kwargs, **encoder_class.finetuning}
        self.spec = EncoderSpec.from_dict(fields)
        self.check_spec(self.spec)
        self.encoder = encoder_class(self.spec)
        width = self.default_width if decoder_width is None else decoder_width
        self.build_decoder(input_channels, width)
        self.build_head(width, num_classes)

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        """Refuses an encoder's spec that the network has no decoder for (ValueError)."""

    def build_decoder(self, input_channels: int, width: int) -> None:
        """Adds the modules between encoder and head."""
        raise NotImplementedError

    def build_head(self, width: int, num_classes: int) -> None:
        """Adds what gives the logits."""
        self.head = nn.Conv3d(width, num_classes, kernel_size=1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of learning-rate decay from the bottom, in timm's form: what comes before the transformer, each of
        its blocks, and the final norm with all that is not the encoder. Relative position biases are among the last:
        they belong to every block at once, and pretraining has none."""
        # sorts after any block; timm's own 99999 would join the rest to the last block
        above = 9999
        return {
            "stem": r"^encoder\.(?!blocks\.|norm\.|rel_pos_bias)",
            "blocks": [(r"^encoder\.blocks\.(\d+)", None), (r".*", (above,))],
        }


class ViTUNETR(SegmentationNetwork):
    """UNETR (Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", 2022) on a transformer.

    Takes (B, C, D, H, W) with every axis a multiple of the patch and more than one token in all, gives logits
    (B, num_classes, D, H, W). The decoder has w = `decoder_width` channels at full resolution, 2w, 4w and 8w below. It
    keeps PyTorch's default initialisation, with which the published fine-tuning recipes (AdamW, 1e-4) were found. The
    encoder needs three taps. Arguments and errors: `SegmentationNetwork`.
    """

    encoder_classes = (ViTEncoder, PrimusEncoder)
    trainers = "nnUNetTrainer_Pretrained, nnUNetTrainer_HiEndMAE, nnUNetTrainer_MAE3D or nnUNetTrainer_ViTUNETR"

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        if len(spec.taps) != 3:
            raise ValueError(f"ViTUNETR needs an encoder with three taps, got {spec.taps}")

    def build_decoder(self, input_channels: int, width: int) -> None:
        e, w = self.spec.embed_dim, width
        early, last = upsampling_factors(self.spec.patch_size)
        self.image_block = residual_block(input_channels, w)
        # tap i joins the decoder after 3 - i steps
        self.skips = nn.ModuleList(skip_branch(e, (2 << i) * w, early[: 3 - i]) for i in range(3))
        widths = [e, 8 * w, 4 * w, 2 * w, w]
        self.ups = nn.ModuleList(UpStep(widths[i], widths[i + 1], f) for i, f in enumerate([*early, last]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) → logits (B, num_classes, D, H, W)."""
        # the maps come as transposed token rows, whose strides are those of channels-last: made plain, so that the
        # weights alone decide about the decoder's memory format
        maps = [m.contiguous() for m in self.encoder.feature_maps(x)]
        out = maps[3]
        for step, tap in enumerate((2, 1, 0)):
            out = self.ups[step](out, self.skips[tap](maps[tap]))
        return self.head(self.ups[3](out, self.image_block(x)))
