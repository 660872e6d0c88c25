"""Every method pretrains a Primus; its encoder goes to nnssl's container and comes back to the bit."""

import pytest
import torch
from matplotlib.figure import Figure
from primus_util import FULL_PRIMUS
from run_data import PLANS, tiny_settings, write_preprocessed

from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.loop import run_pretraining
from nnunetv2_hiendmae.training.volumes import find_cases
from nnunetv2_hiendmae.weights import convert_checkpoint, load_encoder

SPEC = FULL_PRIMUS.with_(register_tokens=0)


@pytest.mark.parametrize("method", list(METHODS))
def test_pretrain_export_and_back(nnunet, tmp_path, monkeypatch, method):
    write_preprocessed(nnunet.preprocessed, {"a": (20, 24, 28), "b": (18, 20, 22)})
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    settings = tiny_settings(method, spec=SPEC, epochs=1, steps_per_epoch=2, warmup_epochs=0)
    run = tmp_path / "run"
    run_pretraining(settings, find_cases(settings.datasets, PLANS, "3d_fullres"), run)
    encoder, metadata = load_encoder(run / ENCODER)
    assert metadata.spec == SPEC and metadata.method == method
    exported = convert_checkpoint(run / ENCODER, tmp_path / "n.pth", to="nnssl").path
    back, known = load_encoder(convert_checkpoint(exported, tmp_path / "back.safetensors").path)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in encoder.state_dict().items())
    for name in ("spec", "method", "volume", "citations", "licence", "training"):
        assert getattr(known, name) == getattr(metadata, name), name
    # the checkpoint of the run gives the same
    direct = convert_checkpoint(run / CHECKPOINT, tmp_path / "direct.pth", to="nnssl").path
    ours, theirs = (torch.load(path, weights_only=True)["network_weights"] for path in (exported, direct))
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
