"""The classifier network, its class weights and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from run_data import TINY_SPEC
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from nnunetv2_hiendmae.classification.inputs import Inputs
from nnunetv2_hiendmae.classification.network import (
    Classifier,
    ClassifierMetadata,
    balanced_weights,
    build_classifier,
    load_classifier,
    save_classifier,
    weighted_cross_entropy,
)
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.optim import parameter_groups
from nnunetv2_hiendmae.volume_format import VolumeFormat

IMAGES = torch.rand(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
VOLUMES = VolumeFormat((3.0, 3.0, 3.0), (-175.0, 250.0), "SimpleITKIO", None, None, ("CTNormalization",), ("CT",))


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_reads_the_pooled_tokens(pool, cls_token):
    spec = TINY_SPEC.with_(cls_token=cls_token)
    if pool == "cls" and not cls_token:
        with pytest.raises(ValueError, match="needs an encoder with a CLS token"):
            build_classifier(spec, 3, pool)
        return
    network = build_classifier(spec, 3, pool).eval()
    tokens, _ = network.encoder(IMAGES)
    assert tokens.shape[1] == spec.num_tokens + cls_token
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, int(cls_token) :].sum(1) / spec.num_tokens
    expected = F.linear(F.layer_norm(pooled, (24,)), network.head.weight, network.head.bias)
    torch.testing.assert_close(network(IMAGES), expected, atol=1e-6, rtol=1e-5)


class PlainEncoder(torch.nn.Module):
    """As much of an encoder as the classifier may rely on."""

    spec, num_prefix_tokens = TINY_SPEC, 0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 24)

    def forward(self, x):
        return self.layer(x.reshape(len(x), -1, 8)), []


def test_needs_nothing_of_the_encoder_but_its_contract():
    assert Classifier(PlainEncoder(), 2)(IMAGES).shape == (3, 2)


def test_same_seed_same_weights():
    first, again, other = (build_classifier(TINY_SPEC, 2, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("frozen", [False, True])
def test_what_trains(frozen):
    network = build_classifier(TINY_SPEC, 2, frozen=frozen).train()
    assert network.training and network.encoder.training is not frozen
    network(IMAGES).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    head = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert trained == head if frozen else trained == {n for n, p in network.named_parameters() if p.requires_grad}
    groups = [p for group in parameter_groups(network, 0.1) for p in group["params"]]
    assert len(groups) == len(trained)


def test_class_weights_are_scikit_learns_balanced_ones():
    targets = np.array([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    weights = balanced_weights(torch.from_numpy(targets), 3)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights[torch.from_numpy(targets)].mean().item() == pytest.approx(1)


def test_weights_count_also_in_a_batch_of_one_class():
    logits, weights = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0.5, 4.0])
    plain = F.cross_entropy(logits, torch.tensor([1, 1]))
    assert weighted_cross_entropy(logits, torch.tensor([1, 1]), weights) == pytest.approx(4 * plain.item())
    assert weighted_cross_entropy(logits.half(), torch.tensor([1, 1]), weights).dtype == torch.float32


def metadata() -> ClassifierMetadata:
    inputs = Inputs("crops", (16, 16, 16), 3)
    return ClassifierMetadata(
        TINY_SPEC, ("0", "1, or 2"), "cls", inputs, VOLUMES, "Plans", "3d_fullres", "mae3d", ("@a{b}",), 4
    )


def test_a_file_holds_everything(tmp_path):
    network = build_classifier(TINY_SPEC, 2, "cls", frozen=True, seed=5)
    save_classifier(tmp_path / "c.safetensors", network, metadata())
    loaded, told = load_classifier(tmp_path / "c.safetensors")
    assert replace(told, version="") == metadata() and told.version
    assert not loaded.training and torch.equal(loaded(IMAGES), network.eval()(IMAGES))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no classifier at"):
        load_classifier(tmp_path / "c.safetensors")
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a readable classifier"):
        load_classifier(file)
    save_classifier(file, build_classifier(TINY_SPEC, 3), metadata())
    with pytest.raises(UserError, match="not a readable classifier"):
        load_classifier(file)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("spec", {"depth": 10**7}, "10000000 blocks"),
        ("spec", {"embed_dim": 24.0}, r"spec\.embed_dim: "),
        ("spec", {"mlp_ratio": float("inf")}, r"spec\.mlp_ratio: "),
        ("spec", {"img_size": [8000] * 3}, "numbers"),
        ("inputs", {"size": [8000] * 3}, r"inputs\.size \(8000"),
        ("volumes", {"window_hu": ["0", "1"]}, r"window_hu\.0: "),
        ("volumes", {"intensity_scale": 0.0}, "intensity_scale is 0"),
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, part, changes, told):
    """One line, before anything of such a size is built."""
    file = tmp_path / "c.safetensors"
    save_classifier(file, build_classifier(TINY_SPEC, 2), metadata())
    header = json.loads(metadata().to_json())
    header[part] |= changes
    save_file(load_file(file), file, metadata={"hiendmae_classifier": json.dumps(header)})
    with pytest.raises(UserError, match=rf"c\.safetensors is not a readable classifier \(.*{told}"):
        load_classifier(file)
