"""Primus' own segmentation network: its encoder, and a few transposed convolutions from patches to voxels."""

from typing import ClassVar

from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor

from nnunetv2_hiendmae.architectures.layers import Axes
from nnunetv2_hiendmae.architectures.primus import PrimusEncoder
from nnunetv2_hiendmae.architectures.spec import EncoderSpec, require
from nnunetv2_hiendmae.architectures.unetr import SegmentationNetwork


class PrimusNetwork(SegmentationNetwork):
    """The network of the Primus paper (arXiv 2503.01835), with the decoder of dynamic-network-architectures.

    Takes (B, C, D, H, W) with every axis a multiple of the patch, gives logits (B, num_classes, D, H, W). The decoder
    reads the encoder's normed output alone, and has no width of its own. Arguments and errors: `SegmentationNetwork`;
    the patch has to be powers of two of at least 2.
    """

    encoder_classes = (PrimusEncoder,)
    trainers = "nnUNetTrainer_Pretrained, nnUNetTrainer_HiEndMAE, nnUNetTrainer_MAE3D or nnUNetTrainer_ViTUNETR"
    axes: ClassVar = {
        r"up_projection\.decode\.\d+\.0\.weight": Axes.KERNEL,
        r"up_projection\.decode\.\d+\.1\.weight": Axes.NONE,
        r"up_projection\.decode\.\d+\.weight": Axes.KERNEL,
        r"up_projection\..*\.bias": Axes.NONE,
    }

    @classmethod
    def check_spec(cls, spec: EncoderSpec) -> None:
        patch = spec.patch_size
        fits = max(patch) > 1 and not any(p & (p - 1) for p in patch)
        require(fits, f"PrimusNetwork needs a patch of powers of two, at least 2 along one axis, got {patch}")

    def build_decoder(self, input_channels: int, width: int) -> None:
        """Nothing: the head is all."""

    def build_head(self, width: int, num_classes: int) -> None:
        self.up_projection = PatchDecode(self.spec.patch_size, self.spec.embed_dim, num_classes)
        self.up_projection.apply(InitWeights_He(1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) → logits (B, num_classes, D, H, W)."""
        # plain memory order: as in `ViTUNETR`, the weights alone decide about the decoder's memory format
        return self.up_projection(self.encoder.feature_maps(x)[-1].contiguous())
