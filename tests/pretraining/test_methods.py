"""What every method must hold, whatever it does inside."""

import math
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from array_volume import ArrayVolume
from primus_util import FULL_PRIMUS
from run_data import TINY_OPTIONS, TINY_SPEC
from test_options import beyond

from nnunetv2_hiendmae.architectures import PRESETS, EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options import declared, kinds_of
from nnunetv2_hiendmae.pretraining import METHODS, Method
from nnunetv2_hiendmae.pretraining.masked import MaskedCropMethod
from nnunetv2_hiendmae.pretraining.settings import read_options

methods = pytest.mark.parametrize("name", list(METHODS))
masked_crop_methods = pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if issubclass(method, MaskedCropMethod)]
)


class NoiseVolume(ArrayVolume):
    """A volume of noise, 40³ voxels."""

    shape = (40, 40, 40)

    def __init__(self, channels: int, seed: int):
        super().__init__(np.random.default_rng(seed).random((channels, *self.shape), dtype=np.float32))


def make_batch(method: Method, samples: int = 4) -> dict[str, torch.Tensor]:
    """What a worker draws for `method` from volumes of noise."""
    views, channels = method.views(), method.spec.in_channels
    drawn = [views.draw(NoiseVolume(channels, seed), np.random.default_rng(seed)) for seed in range(samples)]
    return torch.utils.data.default_collate(drawn)


def build(name: str, spec: EncoderSpec = TINY_SPEC):
    torch.manual_seed(0)
    return METHODS[name](spec, **TINY_OPTIONS[name])


def total_loss(method: Method, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss over all parts."""
    return sum(method(batch, part)["loss"] for part in range(method.num_parts))


SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
PRIMUS = {k: v for k, v in FULL_PRIMUS.to_dict().items() if k not in SIZES}


@methods
@pytest.mark.parametrize(
    "changes", [{}, {"cls_token": False}, {"in_channels": 2}, {"patch_size": (4, 8, 8)}, PRIMUS], ids=str
)
def test_every_trainable_tensor_gets_a_gradient(name, changes):
    """In every part, since the last one's backward is the one that gradients are exchanged in; not zero over all."""
    method = build(name, TINY_SPEC.with_(**changes))
    batch = make_batch(method)
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    for part in range(method.num_parts):
        loss = method(batch, part)["loss"]
        assert None not in torch.autograd.grad(loss, list(trainable.values()), retain_graph=True, allow_unused=True)
        loss.backward()
    assert not [n for n, p in trainable.items() if not p.grad.any()]
    assert all(torch.isfinite(p.grad).all() for p in trainable.values())


@methods
@pytest.mark.parametrize("spec", [TINY_SPEC, FULL_PRIMUS], ids=["vit", "primus"])
def test_overfits_one_batch(name, spec):
    """30 AdamW steps at 1e-2 on one batch: the loss falls to less than 0.8 of where it started (0.76 is seen for
    Hi-End-MAE's 12 channels, 0.43 for MAE3D; targets are noise of unit variance, so that nothing but memorising
    lowers the loss and a broken gradient path stays near 1)."""
    method = build(name, spec)
    batch = make_batch(method, samples=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = total_loss(method, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@masked_crop_methods
def test_loss_ignores_what_is_masked_in_the_encoder(name):
    """Changing masked voxels changes no visible token."""
    method = build(name).eval()
    batch = make_batch(method, samples=1)
    keep = batch["ids_shuffle"][:, : method.visible]
    tokens, _ = method.encoder(batch["image"], keep)
    made = method.reconstruct(batch)["crop"]
    tokens_masked, _ = method.encoder(made.masked, keep)
    assert torch.equal(tokens, tokens_masked)
    hidden = made.hidden[:, None].expand_as(made.input)
    assert hidden.float().mean() == pytest.approx(1 - method.visible / method.spec.num_tokens)
    assert torch.equal(made.masked[~hidden], made.input[~hidden])
    assert (made.masked[hidden] == made.input.min()).all()


@methods
def test_permuting_the_batch_permutes_nothing_else(name):
    method = build(name).eval()
    batch = make_batch(method)
    flipped = {k: v.flip(0) for k, v in batch.items()}
    torch.testing.assert_close(total_loss(method, batch), total_loss(method, flipped), rtol=1e-6, atol=1e-7)
    forward, backward = method.reconstruct(batch), method.reconstruct(flipped)
    for view in forward:
        ours, theirs = forward[view].reconstruction, backward[view].reconstruction.flip(0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@methods
def test_autocast_gives_a_finite_loss_close_to_float32(name):
    method = build(name)
    batch = make_batch(method)
    exact = total_loss(method, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = total_loss(method, batch)
    # bf16 keeps 8 bits: a relative error of a few 2⁻⁸ on predictions that start near zero
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0)


@methods
def test_what_is_drawn_follows_from_the_generator_alone(name):
    """And the global generators are left as they were."""
    views = METHODS[name](TINY_SPEC, **TINY_OPTIONS[name], **({"augment": True} if name == "glmae" else {})).views()
    volume, drawn = NoiseVolume(1, 0), []
    for number in range(2):
        np.random.seed(number)  # noqa: NPY002
        torch.manual_seed(number)
        before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        drawn.append(views.draw(volume, np.random.default_rng(5)))
        after = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        assert torch.equal(before[0], after[0]) and str(before[1]) == str(after[1])
    other = views.draw(volume, np.random.default_rng(6))
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in other)
    assert any(not torch.equal(drawn[0][key], other[key]) for key in other)


@methods
def test_options_are_typed(name):
    method, wrong = METHODS[name], ["no_such_option=1"]
    for option in method.defaults():
        wrong.append(option)
        if kinds_of(method.Options, option) == (float,):
            assert read_options(method, [f"{option}=0.5"]) == {option: 0.5}
            wrong.append(f"{option}=many")
    for text in wrong:
        with pytest.raises(UserError, match=rf"^--set {text}\b"):
            read_options(method, [text])


@methods
def test_options_are_checked_and_cannot_be_changed_afterwards(name):
    """Every declared bound; what is no option is no argument either."""
    options = METHODS[name].Options
    assert options() == options(**METHODS[name].defaults())
    for option, (_, about) in declared(options).items():
        for wrong in beyond(about):
            told = rf"^{option} is {wrong}, needed {re.escape(about.needed)}.*--set {option}=…$"
            with pytest.raises(UserError, match=told):
                options(**{option: wrong})
        with pytest.raises(FrozenInstanceError):
            setattr(options(), option, 1)
    with pytest.raises(TypeError, match="no_such_option"):
        METHODS[name](TINY_SPEC, no_such_option=1)


@methods
def test_notes_are_about_options_and_recipe(name):
    method = METHODS[name]
    assert set(method.notes()) <= {*method.defaults(), *vars(method.recipe)}


@pytest.mark.parametrize(
    ("name", "options", "recipe"),
    [
        (
            "mim",
            {
                "mask_ratio_level1": 0.5,
                "mask_ratio_level2": 0.6,
                "mask_ratio_level3": 0.5,
                "crops_level2": 4,
                "crops_level3": 4,
                "alignment": "infonce",
                "tau": 0.1,
                "weight_level1": 1.0,
                "weight_level2": 1.0,
                "weight_level3": 1.0,
                "weight_align12": 0.1,
                "weight_align23": 0.1,
                "curriculum": "concurrent",
            },
            # 2e-4 for 512 views; ours: 24 volumes of 21
            {
                "epochs": 800,
                "warmup_epochs": 40,
                "batch_size": 24,
                "lr": 2e-4,
                "weight_decay": 0.05,
                "betas": (0.9, 0.95),
            },
        ),
        (
            "glmae",
            {
                "mask_ratio": 0.75,
                "normalize_target": True,
                "global_views": 2,
                "local_views": 4,
                "global_scale_min": 0.5,
                "global_scale_max": 1.0,
                "local_scale_min": 0.25,
                "local_scale_max": 0.5,
                "augment": False,
                "consistency_weight": 1.0,
                "embedding": "mean",
                "head_hidden": 2048,
                "head_dim": 512,
                "student_temperature": 0.1,
                "teacher_temperature": 0.04,
                "teacher_temperature_start": 0.07,
                "centre_momentum": 0.9,
                "teacher_momentum": 0.996,
                "decoder_dim": 512,
                "decoder_depth": 8,
                "decoder_heads": 16,
            },
            {"epochs": 1000, "batch_size": 64, "lr": 1.5e-4 * 64 / 256},
        ),
    ],
)
def test_defaults_are_the_methods_facts(name, options, recipe):
    """docs/methods.md, "MiM" and "GL-MAE"; what is not listed here is ours and may change."""
    method = METHODS[name]
    assert {k: method.defaults()[k] for k in options} == options
    assert {k: vars(method.recipe)[k] for k in recipe} == recipe


def test_hiendmae_needs_layers_to_cross_attend_to():
    with torch.device("meta"), pytest.raises(UserError, match=r"hiendmae.*'convvit'.*--encoder"):
        METHODS["hiendmae"](PRESETS["convvit_tiny"])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99, math.nan])
def test_mask_ratio_must_leave_something_on_both_sides(ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        METHODS["mae3d"](TINY_SPEC, mask_ratio=ratio, decoder_dim=12, decoder_depth=1, decoder_heads=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_step(name, dtype):
    method = build(name).cuda()
    batch = {k: v.cuda() for k, v in make_batch(method).items()}
    with torch.autocast("cuda", dtype):
        loss = total_loss(method, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)
