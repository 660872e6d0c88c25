"""Trainers take their settings from the plans and put the encoder file into the network once."""

import inspect
import json
import math
import os
from datetime import timedelta
from functools import reduce
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunet_data import TINY, make_dataset, save_tiny_encoder, write_fingerprint
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from primus_util import TINY_PRIMUS
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hiendmae import cli, trainers
from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.environment import EXT_TRAINER_VARIABLE, with_discovery
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning import plan_finetuning
from nnunetv2_hiendmae.recipes import trainer_of
from nnunetv2_hiendmae.trainers import nnUNetTrainer_HiEndMAE, nnUNetTrainer_MAE3D, nnUNetTrainer_ViTUNETR
from nnunetv2_hiendmae.trainers.schedule import learning_rate
from nnunetv2_hiendmae.weights import convert_checkpoint, load_encoder, load_into

EPOCHS, WARMUP = 10, 2
HYBRID = EncoderSpec((32, 32, 64), (16,) * 3, 12, 2, 2, kind="convvit", stem_dims=(2, 4, 6), stem_depths=(1, 1, 1))


@pytest.fixture
def encoder_file(tmp_path):
    return save_tiny_encoder(tmp_path / "encoder.safetensors", seed=7)


@pytest.fixture
def make(nnunet, encoder_file, monkeypatch):
    """make(trainer class, **changes of the recipe) → trainer on the CPU; the base's data loading is left out."""
    name = make_dataset(nnunet, 1, cases=1)
    write_fingerprint(nnunet, name)
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)

    def build(trainer=nnUNetTrainer_HiEndMAE, section=None, planned_with=None, **recipe):
        planned = plan_finetuning(
            name,
            encoder_file,
            from_scratch=trainer is nnUNetTrainer_ViTUNETR,
            **{"epochs": EPOCHS, "warmup_epochs": WARMUP, "decoder_width": 4, "batch_size": 2, **(planned_with or {})},
        )
        plans = json.loads(planned.path.read_text())
        plans["hiendmae"]["recipe"].update(recipe)
        plans["hiendmae"].update(section or {})
        return from_plans(trainer, plans)

    def from_plans(trainer, plans):
        plans["continue_training"] = False
        data = nnunet.preprocessed / name / plans["configurations"]["3d_fullres"]["data_identifier"]
        data.mkdir(exist_ok=True)
        # by this nnU-Net recognises its storage format
        (data / "case_000.b2nd").touch()
        dataset_json = json.loads((nnunet.preprocessed / name / "dataset.json").read_text())
        return trainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))

    build.from_plans, build.dataset = from_plans, name
    return build


def batch(size=(24, 24, 24), seed=0):
    torch.manual_seed(seed)
    target = torch.randint(0, 3, (2, 1, *size)).float()
    return {"data": torch.randn(2, 1, *size), "target": target}


def test_signature_is_nnunets():
    for name in trainers.__all__:
        ours = inspect.signature(getattr(trainers, name).__init__).parameters
        theirs = inspect.signature(nnUNetTrainer.__init__).parameters
        assert list(ours) == list(theirs)
        assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


@pytest.mark.parametrize("name", trainers.__all__)
def test_nnunet_finds_the_trainers(name, monkeypatch):
    monkeypatch.setenv(EXT_TRAINER_VARIABLE, with_discovery(os.environ.get(EXT_TRAINER_VARIABLE)))
    assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)


def test_settings_come_from_the_plans(make):
    trainer = make(lr=0.5, weight_decay=0.25, iterations_per_epoch=3, val_iterations_per_epoch=2, betas=[0.9, 0.95])
    trainer.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (10, 3, 2)
    assert (trainer.initial_lr, trainer.weight_decay, trainer.enable_deep_supervision) == (0.5, 0.25, False)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert trainer._get_deep_supervision_scales() is None
    trainer.set_deep_supervision_enabled(False)


def test_memory_is_given_back_between_training_and_validation(make, monkeypatch):
    done = []
    monkeypatch.setattr(nnUNetTrainer, "on_train_end", lambda self: done.append("end"))
    monkeypatch.setattr("nnunetv2_hiendmae.trainers.trainers.give_back_freed_memory", lambda: done.append("back"))
    make().on_train_end()
    assert done == ["end", "back"]


def test_biases_norms_and_positions_do_not_decay(make):
    trainer = make(weight_decay=0.25)
    trainer.initialize()
    decays = {p: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    names = dict(trainer.network.named_parameters())
    assert len(decays) == len(names) == sum(len(g["params"]) for g in trainer.optimizer.param_groups)
    for name, parameter in names.items():
        exempt = parameter.ndim < 2 or "pos_embed" in name
        assert decays[parameter] == (0 if exempt else 0.25), name
    assert decays[names["encoder.pos_embed"]] == 0


def test_training_starts_from_the_file_and_changes_nothing_else(make, encoder_file, capsys):
    trainer = make()
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.on_train_start()
    after, stored = trainer.network.state_dict(), load_file(encoder_file)
    assert set(before) == set(after)
    for key, value in after.items():
        inside = key.removeprefix("encoder.")
        assert torch.equal(value, stored[inside] if key.startswith("encoder.") else before[key]), key
    kernel = "encoder.patch_embed.proj.weight"
    assert not torch.equal(before[kernel], after[kernel])
    # the file has a CLS token, the network does not
    told = capsys.readouterr().out
    assert "1 dropped" in told and "cls_token" in told and "@a{b}" in told


def test_an_uninitialised_trainer_starts_too(make, encoder_file):
    trainer = make()
    trainer.on_train_start()
    assert torch.equal(trainer.network.encoder.norm.weight, load_file(encoder_file)["norm.weight"])


@pytest.mark.parametrize("wrapped", ["compile", "ddp", "both"])
def test_weights_go_through_the_wrappers(make, encoder_file, wrapped, tmp_path):
    trainer = make()
    trainer.initialize()
    encoder = trainer.network.encoder
    if wrapped != "ddp":
        trainer.network = torch.compile(trainer.network)
    if wrapped != "compile":
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if wrapped != "compile":
            trainer.network = DistributedDataParallel(trainer.network)
        trainer.on_train_start()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert torch.equal(encoder.patch_embed.proj.weight, load_file(encoder_file)["patch_embed.proj.weight"])


def test_continuing_needs_no_file_and_gives_the_same_rate(make, encoder_file, tmp_path, capsys):
    trainer = make()
    trainer.on_train_start()
    assert capsys.readouterr().out.count("@a{b}") == 1
    trainer.current_epoch = 3
    trainer.on_train_epoch_start()
    trainer.train_step(batch())
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    trainer.lr_scheduler.step(4)

    again = make()
    encoder_file.unlink()
    again.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    again.on_train_start()
    # cited once, when training began
    assert again.current_epoch == 4 and "@a{b}" not in capsys.readouterr().out
    again.on_train_epoch_start()
    assert [g["lr"] for g in again.optimizer.param_groups] == [g["lr"] for g in trainer.optimizer.param_groups]
    assert again.optimizer.param_groups[0]["lr"] == learning_rate(4, 1e-4, EPOCHS, WARMUP)
    for a, b in zip(again.network.parameters(), trainer.network.parameters(), strict=True):
        assert torch.equal(a, b)
    # the next step is the same too
    assert again.train_step(batch())["loss"] == trainer.train_step(batch())["loss"]
    for a, b in zip(again.network.parameters(), trainer.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_missing_and_changed_files_stop_the_start(make, encoder_file):
    changed, missing = make(), make()
    encoder_file.write_bytes(encoder_file.read_bytes() + b"\0")
    with pytest.raises(RuntimeError, match=r"encoder\.safetensors changed .*run: hiendmae plan"):
        changed.on_train_start()
    encoder_file.unlink()
    with pytest.raises(RuntimeError, match=r"encoder\.safetensors does not exist.*run: hiendmae plan"):
        missing.on_train_start()


def test_pretrained_weights_of_nnunet_are_refused_beside_an_encoder_file(make, tmp_path):
    donor = make(nnUNetTrainer_ViTUNETR)
    donor.on_train_start()
    donor.save_checkpoint(str(tmp_path / "donor.pth"))

    trainer = make()
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(tmp_path / "donor.pth"))
    with pytest.raises(RuntimeError, match="-pretrained_weights"):
        trainer.on_train_start()

    scratch = make(nnUNetTrainer_ViTUNETR)
    scratch.initialize()
    load_pretrained_weights(scratch.network, str(tmp_path / "donor.pth"))
    scratch.on_train_start()
    for a, b in zip(scratch.network.parameters(), donor.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_means_frozen(make, tmp_path):
    """No gradient, no decay, no stochastic depth, no optimizer state: bit-identical after training and continuing."""
    trainer = make(planned_with={"freeze_encoder": True, "drop_path_rate": 0.5}, weight_decay=0.5, lr=0.1)
    trainer.on_train_start()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        assert not any(m.training for m in trainer.network.encoder.modules()) and trainer.network.ups.training
        losses = [trainer.train_step(batch())["loss"] for _ in range(2)]
        trainer.on_validation_epoch_start()
    assert losses[0] != losses[1]
    for key, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("encoder."), key
    assert all(p.grad is None for p in trainer.network.encoder.parameters())
    inside = {id(p) for p in trainer.network.encoder.parameters()}
    assert not inside & {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert not inside & {id(p) for p in trainer.optimizer.state}

    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    again = make(planned_with={"freeze_encoder": True})
    again.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    again.on_train_start()
    again.on_train_epoch_start()
    again.train_step(batch())
    for key, value in again.network.encoder.state_dict().items():
        assert torch.equal(value, before[f"encoder.{key}"]), key


def test_layer_decay_scales_the_rate_of_every_layer(make):
    trainer = make(planned_with={"layer_decay": 0.5}, lr=1.0)
    trainer.on_train_start()
    trainer.current_epoch = WARMUP
    trainer.on_train_epoch_start()
    rates = {p: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    peak = learning_rate(WARMUP, 1.0, EPOCHS, WARMUP)
    for name, parameter in trainer.network.named_parameters():
        if name.startswith("encoder.blocks."):
            # three blocks: the last is one layer below norm and decoder
            factor = 0.5 ** (3 - int(name.split(".")[2]))
        elif name.startswith("encoder.") and not name.startswith("encoder.norm."):
            factor = 0.5**4
        else:
            factor = 1.0
        assert rates[parameter] == pytest.approx(peak * factor), name
    decays = {p: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(peak)
    assert decays[trainer.network.encoder.pos_embed] == 0 and len(decays) == len(list(trainer.network.parameters()))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.network.state_dict().items()}


def run_epoch(trainer, epoch: int) -> float:
    """One step of an epoch, and the last loss."""
    trainer.current_epoch = epoch
    trainer.on_train_epoch_start()
    torch.manual_seed(epoch)
    return trainer.train_step(batch(trainer.configuration_manager.patch_size))["loss"]


@pytest.mark.parametrize(
    "method, spec, network",
    [("hiendmae", TINY, None), ("mim", HYBRID, None), ("openmind", TINY_PRIMUS, "primus")],
)
def test_the_encoder_is_frozen_until_the_decoder_is_warm(make, encoder_file, tmp_path, capsys, method, spec, network):
    """To the bit, at a rate and a decay that would show; then it starts with its own warm-up and fresh moments.
    Continued before and after, in the same way."""
    save_tiny_encoder(encoder_file, method=method, spec=spec, seed=7)
    options = {"decoder_warmup": 2, "encoder_lr_scale": 0.5, "drop_path_rate": 0.5}
    options |= {"network": network, "decoder_width": None} if network else {}
    trainer_class = getattr(trainers, trainer_of(method))

    def build():
        return make(trainer_class, planned_with=options, weight_decay=0.5, lr=0.1)

    trainer = build()
    trainer.on_train_start()
    before = weights_of(trainer)
    for epoch in range(4):
        if epoch in (1, 3):
            path = tmp_path / f"{epoch}.pth"
            trainer.current_epoch = epoch - 1
            trainer.save_checkpoint(str(path))
            again = build()
            again.load_checkpoint(str(path))
            again.on_train_start()
            trainer = again
        decoder = {k: v for k, v in weights_of(trainer).items() if not k.startswith("encoder.")}
        loss = run_epoch(trainer, epoch)
        assert math.isfinite(loss)
        after = weights_of(trainer)
        assert any(not torch.equal(v, after[k]) for k, v in decoder.items())
        rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert trainer.optimizer.param_groups[0]["lr"] == learning_rate(epoch, 0.1, EPOCHS, WARMUP)
        trained = [p for p in trainer.network.encoder.parameters() if id(p) in rates]
        told = capsys.readouterr().out
        if epoch < 2:
            assert "Encoder: frozen" in told and not any(m.training for m in trainer.network.encoder.modules())
            assert {rates[id(p)] for p in trained} == {0}
            assert all(p.grad is None and p not in trainer.optimizer.state for p in trained)
            assert all(torch.equal(v, before[k]) for k, v in after.items() if k.startswith("encoder."))
        else:
            rate = 0.5 * learning_rate(epoch - 2, 0.1, EPOCHS - 2, WARMUP)
            assert {rates[id(p)] for p in trained} == {rate} and f"{rate:.5g}" in told
            assert all(m.training for m in trainer.network.encoder.modules())
            steps = {int(trainer.optimizer.state[p]["step"]) for p in trained if p in trainer.optimizer.state}
            assert steps == {epoch - 1}
            moved = [k for k, v in after.items() if k.startswith("encoder.") and not torch.equal(v, before[k])]
            assert len(moved) > len(trained) / 2


def test_continuing_inside_and_after_the_warm_up_changes_nothing(make, tmp_path):
    """The same bits as a run that nobody stopped."""

    def build():
        return make(planned_with={"decoder_warmup": 2, "layer_decay": 0.5}, lr=0.01)

    straight = build()
    straight.on_train_start()
    stopped = build()
    stopped.on_train_start()
    stopped.network.load_state_dict(straight.network.state_dict())
    for epoch in range(4):
        assert run_epoch(stopped, epoch) == run_epoch(straight, epoch)
        path = str(tmp_path / "checkpoint.pth")
        stopped.save_checkpoint(path)
        stopped = build()
        stopped.load_checkpoint(path)
        stopped.on_train_start()
    assert all(torch.equal(v, stopped.network.state_dict()[k]) for k, v in straight.network.state_dict().items())


def test_what_a_network_draws_depends_on_seed_and_epoch(make):
    trainer, drawn = make(seed=5), []
    trainer.initialize()
    with torch.random.fork_rng():
        for trainer.current_epoch in (1, 2, 1):
            trainer.on_train_epoch_start()
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_continuing_with_another_schedule_is_refused(make, tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    trainer = make()
    trainer.initialize()
    trainer.save_checkpoint(path)
    for other in ({"decoder_warmup": 1}, {"freeze_encoder": True}, {"layer_decay": 0.5}):
        changed = make(**other)
        changed.initialize()
        with pytest.raises(RuntimeError, match=r"--freeze-encoder.*--decoder-warmup"):
            changed.load_checkpoint(path)
        assert not changed.continues


def train_as_one_of_two(plans: dict, dataset_json: dict, store: str, rank: int, output: str) -> None:
    """In a process: an epoch with a frozen encoder, and two after it; each process has batches of its own."""
    trainer = nnUNetTrainer_HiEndMAE(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    # after which nnU-Net would look for a GPU
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    trainer.network = DistributedDataParallel(trainer.network)
    for epoch in range(3):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer.train_step(batch(seed=rank))
    torch.save([trainer._plain_network().state_dict(), trainer.optimizer.state_dict()["state"]], output)


def test_processes_release_the_encoder_together(make, tmp_path):
    """Two gloo processes end with the same weights, of encoder and decoder: all gradients are averaged, only those."""
    trainer = make(planned_with={"decoder_warmup": 1}, lr=0.01)
    trainer.initialize()
    plans = {**trainer.plans_manager.plans, "continue_training": False}
    files = [str(tmp_path / str(rank)) for rank in range(2)]
    arguments = [(plans, trainer.dataset_json, str(tmp_path / "store"), rank, file) for rank, file in enumerate(files)]
    children = [forked.SERVER.Process(target=train_as_one_of_two, args=a) for a in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(forked.TIMEOUT_S)
        assert child.exitcode == 0
    (first, moments), (second, _) = (torch.load(file) for file in files)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert sorted({int(s["step"]) for s in moments.values()}) == [2, 3]


@pytest.mark.parametrize("clip", [0.01, 12.0])
def test_gradients_are_clipped(make, clip):
    trainer = make(grad_clip=clip)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(batch())
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.network.parameters()]))
    assert norm <= clip * 1.001
    assert norm > 0.009


def test_wrong_plans_are_refused_before_a_folder_is_made(make, nnunet):
    with pytest.raises(RuntimeError, match=r"weights of 'hiendmae'.*use -tr nnUNetTrainer_HiEndMAE"):
        make(nnUNetTrainer_MAE3D)
    with pytest.raises(RuntimeError, match=r"training from scratch.*use -tr nnUNetTrainer_ViTUNETR"):
        make(nnUNetTrainer_HiEndMAE, section={"method": None, "encoder_file": None, "encoder_sha256": None})
    with pytest.raises(RuntimeError, match=r"surprise.*run: hiendmae plan"):
        make(section={"surprise": 1})
    plans = json.loads(next(nnunet.preprocessed.rglob("nnUNetPlans_*.json")).read_text())
    del plans["hiendmae"]
    with pytest.raises(RuntimeError, match=r"have no 'hiendmae' section.*run: hiendmae plan"):
        make.from_plans(nnUNetTrainer_HiEndMAE, plans)
    assert not list(nnunet.results.iterdir())


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("hiendmae.encoder_file", None, "encoder_file"),
        ("hiendmae.method", 5, "method.*5"),
        ("hiendmae.citations", "@a{b}", "citations.*@a"),
        ("hiendmae.recipe.freeze_encoder", "false", "freeze_encoder.*'false'"),
        ("hiendmae.recipe.epochs", 3.5, r"epochs.*3\.5"),
        *((f"hiendmae.recipe.{rate}", value, rate) for rate in ("lr", "weight_decay") for value in (1e39, math.inf)),
        ("hiendmae.recipe.lr", math.nan, "lr.*nan"),
        ("hiendmae.recipe.betas", [0.9, 1.0], r"betas.*1\.0"),
        ("configurations.3d_fullres.normalization_schemes", "CTNormalization", "normalization_schemes.*CTNorm"),
        ("foreground_intensity_properties_per_channel.0.std", 0.0, r"std of CT channel 0"),
    ],
)
def test_plans_that_were_edited_wrongly_are_refused(make, nnunet, where, value, told):
    make()
    plans = json.loads(next(nnunet.preprocessed.rglob("nnUNetPlans_*.json")).read_text())
    *path, key = where.split(".")
    reduce(dict.__getitem__, path, plans)[key] = value
    with pytest.raises(RuntimeError, match=rf"{told}.*run: hiendmae plan") as e:
        make.from_plans(nnUNetTrainer_HiEndMAE, plans)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("trainer", [nnUNetTrainer_HiEndMAE, nnUNetTrainer_ViTUNETR])
def test_the_encoder_of_a_checkpoint_can_be_converted(make, nnunet, tmp_path, trainer):
    """nnU-Net's own file, with a number of numpy's in it; the encoder serves another fine-tuning."""
    trained = make(trainer)
    trained.initialize()
    trained._best_ema = np.float64(0.5)
    source = tmp_path / "checkpoint_final.pth"
    trained.save_checkpoint(str(source))
    done = convert_checkpoint(source, tmp_path / "e.safetensors")
    assert all(torch.equal(v, done.state[k]) for k, v in trained.network.encoder.state_dict().items())
    metadata, plans = done.metadata, trained.plans_manager.plans
    assert metadata.spec == trained.network.spec and metadata.method == (trainer.method or "supervised")
    assert metadata.citations == (("@a{b}",) if trainer.method else ()) and trainer.__name__ in metadata.notes[0]
    known = (metadata.volume.spacing_mm, metadata.volume.image_reader_writer, metadata.volume.channel_names)
    assert known == ((1.5, 1.5, 1.5), plans["image_reader_writer"], ("CT",))
    assert metadata.volume.window_hu == ((-175.0, 250.0) if trainer.method else metadata.volume.window_hu)
    dropped = {r.source for r in done.report.with_status("dropped")}
    assert "pretraining" not in done.report.text()
    assert {k for k in trained.network.state_dict() if not k.startswith("encoder.")} <= {
        name.removeprefix("network_weights.") for name in dropped
    }
    load_into(trained.network.encoder, done.path)
    again = plan_finetuning(make.dataset, done.path, epochs=EPOCHS, warmup_epochs=WARMUP, plans_name="Again")
    assert again.path.is_file()


def test_the_encoder_of_nnunets_own_primus_can_be_converted(make, nnunet, tmp_path):
    """Its trainer builds the network whatever the plans name; heads are known by the width, the crop by the plans."""
    make()
    plans = json.loads(next(nnunet.preprocessed.rglob("nnUNetPlans_*.json")).read_text())
    trained = make.from_plans(nnUNet_Primus_S_Trainer, plans)
    trained.initialize()
    torch.nn.init.normal_(trained.network.eva.pos_embed)
    trained.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    done = convert_checkpoint(tmp_path / "checkpoint_final.pth", tmp_path / "e.safetensors")
    encoder, metadata = load_encoder(done.path)
    assert (metadata.spec.num_heads, metadata.spec.depth, metadata.method) == (6, 12, "supervised")
    assert metadata.volume.window_hu == (-175.0, 250.0) and "nnUNet_Primus_S_Trainer" in "".join(metadata.notes)
    network, x = trained.network.eval(), torch.randn(1, 1, *metadata.spec.img_size)
    with torch.no_grad():
        features = network.eva(network.down_projection(x).flatten(2).transpose(1, 2))[0]
        ours = encoder(x)[0]
    assert (ours - features).norm() < 1e-5 * features.norm()
    planned = plan_finetuning(make.dataset, done.path, network="primus", plans_name="Again")
    assert planned.trainer == "nnUNetTrainer_Pretrained"


@pytest.mark.parametrize("network", ["dynamic_network_architectures.architectures.unet.PlainConvUNet", None])
def test_checkpoints_of_other_networks_are_named(make, tmp_path, capsys, network):
    trained = make(nnUNetTrainer_ViTUNETR)
    trained.initialize()
    source = tmp_path / "checkpoint_final.pth"
    trained.save_checkpoint(str(source))
    content = torch.load(source, weights_only=False)
    configuration = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    configuration["architecture"]["network_class_name"] = network
    if network is None:
        # plans of nnU-Net before 2.4 have no such key
        del configuration["architecture"]
    content["trainer_name"] = "nnUNetTrainer"
    torch.save(content, source)
    told = rf"nnU-Net's nnUNetTrainer with .*{(network or 'old plans').rpartition('.')[2]}"
    with pytest.raises(UserError, match=told):
        convert_checkpoint(source, tmp_path / "e.safetensors")
    assert cli.main(["inspect", str(source)]) == 0 and cli.main(["inspect", str(source), "--check"]) == 2
    assert "kind: nnU-Net checkpoint" in capsys.readouterr().out
    content["init_args"]["plans"] = {}
    torch.save(content, source)
    with pytest.raises(UserError, match="nnUNetTrainer are damaged"):
        convert_checkpoint(source, tmp_path / "e.safetensors")


@pytest.mark.parametrize("good_steps", [0, 1])
def test_an_epoch_without_a_finite_loss_ends_the_training(make, good_steps):
    trainer = make()
    trainer.initialize()
    trainer.current_epoch = 1
    trainer.logger.log("train_losses", 0.5, 0)
    losses = [trainer.train_step(batch()) for _ in range(good_steps)]
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    broken = batch()
    broken["data"][:] = torch.nan
    losses += [trainer.train_step(broken) for _ in range(2)]
    assert all(torch.equal(v, before[k]) for k, v in trainer.network.state_dict().items())
    if good_steps:
        trainer.on_train_epoch_end(losses)
        return
    with pytest.raises(RuntimeError, match=r"all 2 losses of epoch 1 are nan .*checkpoint_latest\.pth.*--lr"):
        trainer.on_train_epoch_end(losses)
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=False)
    assert saved["current_epoch"] == 1
    assert all(torch.equal(v, before[k]) for k, v in saved["network_weights"].items())


def broken_epoch(trainer, good_steps: int = 0) -> list[dict]:
    """Outputs of an epoch of two steps, of which so many are good."""
    broken = batch()
    broken["data"][:] = torch.nan
    return [trainer.train_step(batch() if step < good_steps else broken) for step in range(2)]


def test_a_failure_in_the_first_epoch_can_be_continued(make, encoder_file):
    trainer = make()
    trainer.on_train_start()
    with pytest.raises(RuntimeError, match=r"all 2 losses of epoch 0 "):
        trainer.on_train_epoch_end(broken_epoch(trainer))
    encoder_file.unlink()
    again = make.from_plans(nnUNetTrainer_HiEndMAE, trainer.plans_manager.plans)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    again.on_train_start()
    assert again.current_epoch == 0
    again.on_train_epoch_end([again.train_step(batch())])
    assert math.isfinite(again.logger.get_value("train_losses", 0))


def test_weights_that_are_not_finite_are_not_kept(make):
    trainer = make()
    trainer.on_train_start()
    with torch.no_grad():
        trainer.network.encoder.norm.weight[0] = torch.inf
    with pytest.raises(RuntimeError, match=r"nothing was saved, as the weights are not finite either.*--lr"):
        trainer.on_train_epoch_end(broken_epoch(trainer))
    assert not (Path(trainer.output_folder) / "checkpoint_latest.pth").exists()


@pytest.mark.parametrize("good_steps", [1, 0])
def test_processes_stop_together(make, tmp_path, good_steps):
    """Two gloo processes; in the first one every loss is NaN, in the second one `good_steps` are not."""
    trainer = make()
    trainer.on_train_start()
    # before there is a child: one that is forked has none of its parent's threads, and would wait for them
    outputs = broken_epoch(trainer), broken_epoch(trainer, good_steps)
    trainer.is_ddp = True
    child = os.fork()
    trainer.local_rank = rank = 0 if child else 1
    stopped = 2
    try:
        store = dist.FileStore(str(tmp_path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        trainer.network = DistributedDataParallel(trainer.network)
        trainer.on_train_epoch_end(outputs[rank])
        stopped = 0
    except RuntimeError as e:
        stopped = 1 if "all 4 losses of epoch 0 are nan" in str(e) else 3
    finally:
        if not child:
            os._exit(stopped)
        dist.destroy_process_group()
    expected = 0 if good_steps else 1
    assert stopped == expected == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (Path(trainer.output_folder) / "checkpoint_latest.pth").exists() == bool(expected)
