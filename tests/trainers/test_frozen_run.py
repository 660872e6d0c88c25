"""Frozen means frozen in stock nnU-Net's own training: its loop, its optimizer step, its checkpoints."""

import json
import re

import pytest
import torch
from nnunet_data import TINY, make_dataset, save_tiny_encoder, write_fingerprint
from safetensors.torch import load_file
from workplace import make_workplace, prepare

from nnunetv2_hiendmae.architectures import EncoderSpec

HYBRID = EncoderSpec((32, 32, 64), (16,) * 3, 12, 2, 2, kind="convvit", stem_dims=(2, 4, 6), stem_depths=(1, 1, 1))
# γ of LayerScale and relative positions: of the encoder, in no file
FRESH = {"gamma": 1.0, "rel_pos_bias": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("method, spec", [("hiendmae", TINY), ("mim", HYBRID)])
def test_nnunet_trains_and_continues_without_touching_a_frozen_encoder(tmp_path, method, spec):
    """Bit for bit, at a rate and a weight decay that would show; the decoder learns."""
    workplace = make_workplace(tmp_path / "nnunet")
    save_tiny_encoder(workplace.encoder_file, method=method, spec=spec, seed=3)
    name = make_dataset(workplace.folders, 1, cases=2, shape=(24, 28, 24))
    write_fingerprint(workplace.folders, name)
    recipe = {"epochs": 1, "warmup_epochs": 0, "lr": 0.01, "weight_decay": 0.5, "drop_path_rate": 0.5}
    planned = prepare(workplace, name, freeze_encoder=True, **recipe)
    workplace.train(planned, "all")
    checkpoint = workplace.results(planned, "all") / "checkpoint_final.pth"
    before = check_frozen(checkpoint, workplace.encoder_file)
    plans = json.loads(planned.path.read_text())
    plans["hiendmae"]["recipe"]["epochs"] = 2
    planned.path.write_text(json.dumps(plans))
    assert "Epoch 1" in workplace.train(planned, "all", "--c")
    after = check_frozen(checkpoint, workplace.encoder_file)
    assert any(not torch.equal(after[key], before[key]) for key in after if not key.startswith("encoder."))


def check_frozen(checkpoint, encoder_file) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint whose encoder is that of the file, and whose optimizer knows the decoder alone."""
    stored, state = load_file(encoder_file), torch.load(checkpoint, weights_only=False)
    weights = state["network_weights"]
    names = [key.removeprefix("encoder.") for key in weights if key.startswith("encoder.")]
    assert {"pos_embed"} < set(names) & set(stored)
    for key in names:
        fresh = FRESH.get(key.rpartition(".")[2])
        expected = stored[key] if fresh is None else torch.full_like(weights[f"encoder.{key}"], fresh)
        assert torch.equal(weights[f"encoder.{key}"], expected), key
    moments = sorted(tuple(s["exp_avg"].shape) for s in state["optimizer_state"]["state"].values())
    # running statistics are not trained, and blocks of dynamic-network-architectures name their layers twice
    skipped = r"^encoder\.|\.all_modules\.|\.running_(mean|var)$|\.num_batches_tracked$"
    assert moments == sorted(tuple(w.shape) for key, w in weights.items() if not re.search(skipped, key))
    return weights
