"""nnU-Net's step as on a GPU: autocast to 16 bits and a gradient scaler, which CPUs have too."""

import pytest
import torch
from nnunet_data import TINY, save_tiny_encoder
from primus_util import TINY_PRIMUS
from test_trainers import HYBRID, batch, encoder_file, make, weights_of  # noqa: F401 (fixtures)

from nnunetv2_hiendmae import trainers
from nnunetv2_hiendmae.recipes import trainer_of

MODULE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
KINDS = {"hiendmae": (TINY, None), "mim": (HYBRID, None), "openmind": (TINY_PRIMUS, "primus")}


def started(make, method, network, **planned_with):  # noqa: F811
    options = {"drop_path_rate": 0.0, **planned_with}
    options |= {"network": network, "decoder_width": None} if network else {}
    trainer = make(getattr(trainers, trainer_of(method)), planned_with={"seed": 1, **options}, lr=0.01)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def in_half(trainer, patch) -> None:
    patch.setattr(f"{MODULE}.dummy_context", lambda: torch.autocast("cpu", torch.float16))
    trainer.grad_scaler = torch.amp.GradScaler("cpu")


@pytest.mark.parametrize("method", KINDS)
def test_steps_are_those_of_float32_to_rounding(make, encoder_file, monkeypatch, method):  # noqa: F811
    spec, network = KINDS[method]
    save_tiny_encoder(encoder_file, method=method, spec=spec, seed=7)
    losses = []
    for half in (False, True):
        trainer = started(make, method, network)
        if half:
            in_half(trainer, monkeypatch)
        crop = batch(trainer.configuration_manager.patch_size)
        losses.append([float(trainer.train_step(crop)["loss"]) for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], abs=5e-3) and losses[0][-1] < losses[0][0]
    # nothing overflowed, so that the steps were taken
    assert trainer.grad_scaler.get_scale() == 2.0**16
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {4}


@pytest.mark.parametrize("frozen", [{}, {"freeze_encoder": True}, {"decoder_warmup": 2}], ids=str)
def test_an_overflow_leaves_weights_and_moments(make, monkeypatch, frozen):  # noqa: F811
    trainer = started(make, "hiendmae", None, **frozen)
    in_half(trainer, monkeypatch)
    trainer.train_step(batch())
    before, states = weights_of(trainer), trainer.optimizer.state
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in states.items()}
    trainer.grad_scaler.update(2.0**100)
    trainer.train_step(batch(seed=1))
    assert all(torch.equal(v, before[k]) for k, v in weights_of(trainer).items())
    for p, state in states.items():
        assert all(torch.equal(v, moments[p][k]) for k, v in state.items())
    assert trainer.grad_scaler.get_scale() == 2.0**99
    trainer.grad_scaler.update(2.0**10)
    trainer.train_step(batch(seed=2))
    assert not torch.equal(trainer.network.head.weight, before["head.weight"])
