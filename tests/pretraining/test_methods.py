"""What every method must hold, whatever it does inside."""

import pytest
import torch
from run_data import TINY_OPTIONS, TINY_SPEC

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.method import parse_options

methods = pytest.mark.parametrize("name", list(METHODS))


def make_batch(spec: EncoderSpec, samples: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(samples, spec.in_channels, *spec.img_size, generator=generator)
    order = torch.stack([torch.randperm(spec.num_tokens, generator=generator) for _ in range(samples)])
    return {"image": image, "order": order}


def build(name: str, spec: EncoderSpec = TINY_SPEC):
    torch.manual_seed(0)
    return METHODS[name](spec, **TINY_OPTIONS[name])


@methods
@pytest.mark.parametrize("changes", [{}, {"cls_token": False}, {"in_channels": 2}, {"patch_size": (4, 8, 8)}])
def test_every_trainable_tensor_gets_a_gradient(name, changes):
    method = build(name, TINY_SPEC.with_(**changes))
    method(make_batch(method.spec))["loss"].backward()
    without = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)


@methods
def test_overfits_one_batch(name):
    """30 AdamW steps at 1e-2 on one batch: the loss falls to less than 0.8 of where it started (0.76 is seen for
    Hi-End-MAE's 12 channels, 0.43 for MAE3D; targets are noise of unit variance, so that nothing but memorising
    lowers the loss and a broken gradient path stays near 1)."""
    method = build(name)
    batch = make_batch(method.spec, samples=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = method(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@methods
def test_loss_ignores_what_is_masked_in_the_encoder(name):
    """Changing masked voxels changes no visible token."""
    method = build(name).eval()
    batch = make_batch(method.spec, samples=1)
    keep = batch["order"][:, : method.visible]
    tokens, _ = method.encoder(batch["image"], keep)
    made = method.reconstruct(batch)["crop"]
    tokens_masked, _ = method.encoder(made.masked, keep)
    assert torch.equal(tokens, tokens_masked)


@methods
def test_permuting_the_batch_permutes_nothing_else(name):
    method = build(name).eval()
    batch = make_batch(method.spec)
    flipped = {k: v.flip(0) for k, v in batch.items()}
    torch.testing.assert_close(method(batch)["loss"], method(flipped)["loss"], rtol=1e-6, atol=1e-7)
    forward, backward = method.reconstruct(batch)["crop"], method.reconstruct(flipped)["crop"]
    torch.testing.assert_close(forward.reconstruction, backward.reconstruction.flip(0), rtol=1e-5, atol=1e-6)


@methods
def test_autocast_gives_a_finite_loss_close_to_float32(name):
    method = build(name)
    batch = make_batch(method.spec)
    exact = method(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(batch)["loss"]
    # bf16 keeps 8 bits: a relative error of a few 2⁻⁸ on predictions that start near zero
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0)


@methods
def test_options_are_typed(name):
    assert parse_options(METHODS[name], ["mask_ratio=0.5"]) == {"mask_ratio": 0.5}
    for wrong in ("mask_ratio", "no_such_option=1", "mask_ratio=many"):
        with pytest.raises(UserError, match="--set"):
            parse_options(METHODS[name], [wrong])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_mask_ratio_must_leave_something_on_both_sides(ratio):
    with pytest.raises(UserError, match="mask_ratio"):
        METHODS["mae3d"](TINY_SPEC, mask_ratio=ratio, decoder_dim=12, decoder_depth=1, decoder_heads=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_step(name, dtype):
    method = build(name).cuda()
    batch = {k: v.cuda() for k, v in make_batch(method.spec).items()}
    with torch.autocast("cuda", dtype):
        loss = method(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)
