"""Blocks that are compiled or computed twice: same losses, same files, less memory."""

import shutil
from functools import partial
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from run_data import tiny_settings
from test_loop import cli_arguments, environment, losses, read_log, run
from torch import nn
from torch._dynamo.utils import counters

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.architectures.layers import transformer_blocks
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.blocks import carry_out, segments
from nnunetv2_hiendmae.pretraining.method import Method

HYBRID = EncoderSpec((32, 32, 32), (16, 16, 16), 24, 2, 2, kind="convvit", stem_dims=(4, 4, 8), stem_depths=(2, 1, 1))
KINDS = [*((method, {}) for method in METHODS), ("mim", {"spec": HYBRID}), ("mae3d", {"spec": HYBRID})]
kinds = pytest.mark.parametrize(
    ("method", "changes"), KINDS, ids=[f"{m}-{'convvit' if c else 'vit'}" for m, c in KINDS]
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile on a CPU needs a C++ compiler"
)


def batch_of(method: Method) -> dict[str, torch.Tensor]:
    def read(lower, size):
        return np.random.default_rng(0).random((1, *size), dtype=np.float32)

    volume = SimpleNamespace(spacing_mm=(1.0,) * 3, shape=(96,) * 3, read=read, is_foreground=lambda voxel: True)
    drawn = method.views().draw(volume, np.random.default_rng(0))
    return {name: torch.stack([view] * 2) for name, view in drawn.items()}


def computed(method: Method) -> tuple[list[torch.Tensor], list[torch.Tensor | None], int]:
    """Losses of the parts, gradients, and bytes that autograd kept for the backward pass at most."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    values, most, batch = [], 0, batch_of(method)
    for part in range(method.num_parts):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = method(batch, part)["loss"]
        most = max(most, sum(kept.values()))
        loss.backward()
        values.append(loss.detach())
    return values, [p.grad for p in method.parameters()], most


def same(ours: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@kinds
def test_computing_twice_gives_the_same_to_the_bit_and_keeps_less(method, changes):
    settings = tiny_settings(method, **changes)
    plain, twice = settings.build_method(), settings.build_method()
    carry_out(twice, compiled=False, checkpointed=True)
    assert list(plain.state_dict()) == list(twice.state_dict())
    (losses_, gradients, kept), (again, recomputed, less) = computed(plain), computed(twice)
    assert same(again, losses_) and same(recomputed, gradients)
    # the tiny networks have two to four blocks; of deeper ones less is left
    assert less < 0.6 * kept


@pytest.mark.parametrize("checkpointed", [False, True])
def test_random_numbers_are_drawn_once(checkpointed):
    spec = EncoderSpec((16,) * 3, (8,) * 3, 24, 4, 2)
    torch.manual_seed(0)
    network = nn.Sequential()
    network.blocks = transformer_blocks(spec, [0.5] * 4)
    x = torch.rand(8, 5, 24, requires_grad=True)
    found = []
    for on in (False, checkpointed):
        carry_out(network, compiled=False, checkpointed=on)
        torch.manual_seed(1)
        y = x
        for block in network.blocks:
            y = block(y)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)


@kinds
def test_every_block_is_a_segment(method, changes):
    built = tiny_settings(method, **changes).build_method()
    found = {id(module) for module, _ in segments(built)}
    missing = [name for name, m in built.named_modules() if type(m).__name__.endswith("Block") and id(m) not in found]
    assert found and not missing


def test_a_run_may_change_between_both(preprocessed, tmp_path):
    """Half a run as ever, the rest with blocks computed twice: no setting that decides the result."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.loop.draw_reconstruction", _interrupt)
        run(halves, tiny_settings(checkpoint_epochs=1))
    log = run(halves, tiny_settings(checkpoint_activations=True, accumulate=1), resume=True)
    assert losses(log) == losses(read_log(whole))
    assert (halves / ENCODER).read_bytes() == (whole / ENCODER).read_bytes()


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"accumulate": 2}], ids=["bf16", "accumulate"])
def test_with_autocast_and_micro_batches(preprocessed, tmp_path, changes):
    plain = run(tmp_path / "plain", tiny_settings("mim", **changes))
    twice = run(tmp_path / "twice", tiny_settings("mim", checkpoint_activations=True, **changes))
    assert losses(twice) == losses(plain)


@pytest.mark.parametrize("more", [(), ("--checkpoint-activations",)], ids=["plain", "twice"])
def test_the_dry_run_takes_it_too(preprocessed, tmp_path, monkeypatch, more):
    asked = []
    monkeypatch.setattr("nnunetv2_hiendmae.pretraining.steps.carry_out", lambda *values: asked.append(values[1:]))
    assert cli.main([*cli_arguments("mae3d", tmp_path / "run", *more), "--dry-run"]) == 0
    assert asked == [(False, bool(more))]


@pytest.mark.slow
def test_in_two_processes(preprocessed, nnunet, tmp_path):
    more = {"one": (), "two": ("--checkpoint-activations",)}
    for name, start in (("one", forked.run), ("two", forked.run_together)):
        start(["hiendmae", *cli_arguments("mim", tmp_path / name, *more[name])], environment(nnunet))
    one, two = (losses(read_log(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 9 and two == pytest.approx(one, abs=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_compiled_blocks_learn_the_same(preprocessed, tmp_path, twice, monkeypatch):
    """Losses differ by rounding, 1e-7 of about 1, which nine steps amplify; files have the same names, and a run goes
    on with or without."""
    # traced as for a GPU; kernels, which take a minute to make, are those of test_unetr.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = run(tmp_path / "plain", tiny_settings(picture_epochs=9))
    changes = {"compile": True, "checkpoint_activations": twice, "picture_epochs": 9}
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.loop.StepLog.end_epoch", _interrupt)
        run(tmp_path / "compiled", tiny_settings(checkpoint_epochs=1, **changes))
    saved = torch.load(tmp_path / "compiled" / CHECKPOINT, weights_only=True)["method"]
    assert list(saved) == list(torch.load(tmp_path / "plain" / CHECKPOINT, weights_only=True)["method"])
    run(tmp_path / "compiled", tiny_settings(**changes), resume=True)
    assert losses(read_log(tmp_path / "compiled")) == pytest.approx(losses(plain), abs=1e-5)
    assert not any("_orig_mod" in name for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), [("glmae", {}), ("mim", {"spec": HYBRID})], ids=["glmae", "mim"])
def test_nothing_is_compiled_again_after_the_first_step(method, changes, monkeypatch):
    """Nor given up: views have several sizes, a teacher takes no gradients, stages have widths of their own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    built, graphs = tiny_settings(method, **changes).build_method(), []
    carry_out(built, compiled=True, checkpointed=False)
    batch = batch_of(built)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(3):
            for part in range(built.num_parts):
                built(batch, part)["loss"].backward()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 1 and len({*graphs}) == 1 and not counters["graph_break"]


def test_no_compiler_is_one_line(preprocessed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nnunetv2_hiendmae.pretraining.blocks.shutil.which", lambda name: None)
    assert cli.main(cli_arguments("mae3d", tmp_path / "run", "--compile")) == 2
    told = capsys.readouterr().err
    assert "--compile on a CPU needs a C++ compiler" in told and len(told.splitlines()) == 1
