"""More of what would fail on a GPU where there is none, or would make it wait: see test_fake_device.py. A tensor that
holds no numbers refuses to hand them to the CPU."""

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from test_fake_device import GPU, KINDS, SPECS, gpu, move  # noqa: F401 (a fixture)
from test_methods import NoiseVolume, build
from torch import Tensor

from nnunetv2_hiendmae.architectures import ConvViTUNETR, ViTUNETR, build_encoder
from nnunetv2_hiendmae.classification.network import Classifier, weighted_cross_entropy
from nnunetv2_hiendmae.inspection.attention import encoder_attention
from nnunetv2_hiendmae.pretraining import METHODS, Method, swinpretexts
from nnunetv2_hiendmae.pretraining.method import Reconstruction
from nnunetv2_hiendmae.pretraining.probe import cell_means

TURN = swinpretexts.turn
RECONSTRUCTING = [name for name, method in METHODS.items() if method.reconstruct is not Method.reconstruct]


@pytest.fixture
def to_gpu(gpu):  # noqa: F811
    """Makes a tensor one of the GPU's that holds no numbers."""
    return lambda tensor: gpu.from_tensor(tensor).to(GPU)


def all_on_gpu(*tensors: Tensor) -> bool:
    return {t.device for t in tensors} == {GPU}


def test_turns_stay_on_the_device(gpu, to_gpu):  # noqa: F811
    with gpu:
        turned = TURN(to_gpu(torch.zeros(3, 1, 2, 4, 4)), to_gpu(torch.tensor([0, 1, -1])))
        assert all_on_gpu(turned) and turned.shape == (3, 1, 2, 4, 4)


@pytest.mark.parametrize("name", RECONSTRUCTING)
def test_pictures(gpu, to_gpu, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(swinpretexts, "turn", TURN)
    method = build(name, SPECS[KINDS.get(name, "vit")])
    drawn = [method.views().draw(NoiseVolume(1, seed), np.random.default_rng(seed)) for seed in range(2)]
    batch = torch.utils.data.default_collate(drawn)
    with gpu:
        move(method.eval(), to_gpu)
        made = method.reconstruct({k: to_gpu(v) for k, v in batch.items()})
        for pictures in made.values():
            assert isinstance(pictures, Reconstruction)
            assert all_on_gpu(pictures.input, pictures.masked, pictures.reconstruction, pictures.hidden)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("frozen", [False, True])
def test_classifiers(gpu, to_gpu, kind, frozen):  # noqa: F811
    network = Classifier(build_encoder(SPECS[kind]), 3, frozen=frozen).train()
    with gpu:
        move(network, to_gpu)
        logits = network(to_gpu(torch.zeros(4, 1, 32, 32, 32)))
        targets, weights = to_gpu(torch.arange(4) % 3), to_gpu(torch.ones(3))
        assert all_on_gpu(weighted_cross_entropy(logits, targets, weights))


@pytest.mark.parametrize("kind", SPECS)
def test_probes_and_attention(gpu, to_gpu, kind):  # noqa: F811
    spec = SPECS[kind]
    encoder, crop = build_encoder(spec).eval(), torch.zeros(1, 1, 32, 32, 32)
    with gpu, torch.no_grad():
        move(encoder, to_gpu)
        image = to_gpu(crop)
        tokens, taps = encoder(image)
        assert all_on_gpu(tokens, *taps, cell_means(image, spec))
        (row,) = encoder_attention(encoder, image, [spec.depth - 1], query=spec.num_tokens - 1)
        assert all_on_gpu(row) and row.shape == (spec.num_heads, encoder.num_prefix_tokens + spec.num_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", [ViTUNETR, ConvViTUNETR])
def test_nnunets_loss(gpu, to_gpu, network, dtype):  # noqa: F811
    """As its trainer computes it: inside of autocast, on what the network gives in 16 bits."""
    torch.set_autocast_dtype("cuda", dtype)
    spec = SPECS["vit" if network is ViTUNETR else "convvit"].with_(img_size=(64,) * 3)
    fields = spec.with_(**network.encoder_classes[0].finetuning).to_dict()
    built = network(fields.pop("in_channels"), 3, **fields)
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)
    target = torch.zeros(2, 1, 64, 64, 64)
    with gpu:
        move(built, to_gpu)
        logits = built(to_gpu(torch.zeros(2, 1, 64, 64, 64)))
        assert logits.dtype == dtype and all_on_gpu(loss(logits, to_gpu(target)))
