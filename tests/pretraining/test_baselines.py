"""The baselines of the papers: their losses against plain formulas, what is drawn, and what is refused."""

import pytest
import torch
from primus_util import FULL_PRIMUS
from run_data import TINY_SPEC
from test_methods import make_batch

from nnunetv2_hiendmae.architectures import PRESETS
from nnunetv2_hiendmae.architectures import tokens as tk
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining import METHODS, Method

WIDE = TINY_SPEC.with_(img_size=(32, 32, 32))


def build(name: str, spec=TINY_SPEC, **options) -> Method:
    torch.manual_seed(0)
    return METHODS[name](spec, **options)


@pytest.mark.parametrize(("edge", "hidden"), [(1, 39), (2, 40), (4, None)])
def test_simmim_hides_whole_cubes_of_tokens(edge, hidden):
    """Of 64 tokens in 4³: int(64·.4) = 25 stay, or int(8·.4) = 3 cubes of 8; one cube cannot be divided."""
    if hidden is None:
        with pytest.raises(UserError, match=r"mask_ratio 0\.6 leaves 0 of 1 cubes"):
            build("simmim", WIDE, mask_edge=edge)
        return
    method = build("simmim", WIDE, mask_edge=edge)
    batch = make_batch(method, samples=2)
    assert batch["ids_shuffle"].sort(1)[0].eq(torch.arange(64)).all()
    made = method.reconstruct(batch)["crop"]
    cubes = tk.patchify(made.hidden[:, None].float(), (8 * edge,) * 3).mean(2)
    assert set(cubes.unique().tolist()) == {0.0, 1.0} and made.hidden.sum() == 2 * hidden * 8**3
    assert not torch.equal(made.hidden[0], made.hidden[1])


@pytest.mark.parametrize("spec", [WIDE, WIDE.with_(cls_token=False)], ids=["cls", "plain"])
def test_simmim_is_l1_of_masked_voxels_behind_mask_tokens(spec):
    """The encoder's steps one by one, with the token in place of what is hidden, then voxels one by one."""
    method = build("simmim", spec).eval()
    batch = make_batch(method, samples=2)
    image, encoder = batch["image"], method.encoder
    hidden = method.reconstruct(batch)["crop"].hidden
    tokens = encoder.patch_embed(tk.patchify(image, spec.patch_size))
    tokens[tk.patchify(hidden[:, None], spec.patch_size)[..., 0]] = method.mask_token[0, 0]
    tokens = tokens + encoder.pos_embed
    if spec.cls_token:
        tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1)
    for block in encoder.blocks:
        tokens = block(tokens)
    voxels = tk.unpatchify(method.head(encoder.norm(tokens)[:, -64:]), spec.grid, spec.patch_size)
    expected = (voxels - image)[hidden[:, None]].abs().mean()
    torch.testing.assert_close(method(batch)["loss"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [TINY_SPEC, FULL_PRIMUS], ids=["vit", "primus"])
def test_simmim_sees_visible_voxels_alone(spec):
    method = build("simmim", spec, mask_edge=1).eval()
    batch = make_batch(method, samples=1)
    hidden = method.reconstruct(batch)["crop"].hidden[:, None]
    predicted = [
        method.predict(torch.where(where, 0, batch["image"]), batch["ids_shuffle"])
        for where in (torch.zeros_like(hidden), hidden, ~hidden)
    ]
    assert torch.equal(predicted[0], predicted[1]) and not torch.equal(predicted[0], predicted[2])


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("convvit_tiny", {}, r"^simmim .*'convvit'.*--encoder"),
        ("vit_nano_p8", {"mask_edge": 4}, r"^mask_edge is 4, .*\(6, 6, 6\).*--set mask_edge"),
    ],
)
def test_simmim_refuses(preset, options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        METHODS["simmim"](PRESETS[preset], **options)
