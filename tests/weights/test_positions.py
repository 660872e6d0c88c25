"""The grid of a foreign position table: read off where it is the formula, said where it is not, never made up."""

import pytest
import torch
from foreign_files import SPECS, WITHOUT_PLAN, authors_state, container, random_state

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.architectures.tokens import sincos_positions
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.weights import ConvertOptions, convert_checkpoint, load_encoder, translate_checkpoint

OBLONG = (4, 1, 2)
# as many tokens as a cube of 2
XYZ = ("hiendmae", "mim", "glmae", "mae3d")


def write_file(path, kind, grid, *, dtype=torch.float32, formula=True, **changes):
    """A checkpoint whose positions are those of `grid` in the file's axis order; gives its spec in that order."""
    spec = SPECS[kind]
    spec = spec.with_(img_size=tuple(g * p for g, p in zip(grid, spec.patch_size, strict=True)), **changes)
    state = random_state(spec)
    if formula:
        state["pos_embed"] = sincos_positions(grid, spec.embed_dim)
    state = {k: v.to(dtype) for k, v in state.items()}
    torch.save(container(kind, authors_state(kind, state)), path)
    return spec


def in_our_order(kind, size):
    return tuple(size[::-1] if kind in XYZ else size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_an_oblong_grid_is_read_off_the_formula(tmp_path, kind, dtype):
    """Also where a cube has as many tokens: that one would be wrong."""
    spec = write_file(tmp_path / "c.pth", kind, OBLONG, dtype=dtype)
    metadata = translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2)).metadata
    assert metadata.spec.img_size == in_our_order(kind, spec.img_size)
    assert metadata.spec.pos_embed == "sincos"
    size = " ".join(map(str, metadata.spec.img_size))
    assert any(f"the crop {size} was read off" in note for note in metadata.notes)
    assert not any("taken as a cube" in note for note in metadata.notes)


@pytest.mark.parametrize("width", [12, 13, 48])
@pytest.mark.parametrize("grid", [(2, 2, 2), (6, 6, 6), (8, 8, 8), (3, 4, 18), (1, 1, 27), (711, 1, 1)])
def test_every_grid_of_a_formula(tmp_path, grid, width):
    """710 is nearly a multiple of the sine's period: the last row alone does not tell."""
    heads = 1
    write_file(tmp_path / "c.pth", "timm", grid, embed_dim=width, num_heads=heads)
    assert translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=heads)).metadata.spec.grid == grid


@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_a_learned_table_is_said_to_be_taken_as_a_cube(tmp_path, kind, capsys):
    spec = write_file(tmp_path / "c.pth", kind, (2, 2, 2), formula=False)
    assert (
        cli.main(["convert", str(tmp_path / "c.pth"), "-o", str(tmp_path / "e.safetensors"), "--num-heads", "2"]) == 0
    )
    assert "note: the grid was taken as a cube, the crop as" in capsys.readouterr().out
    said = ConvertOptions(num_heads=2, img_size=spec.img_size)
    assert not any("cube" in note for note in translate_checkpoint(tmp_path / "c.pth", said).metadata.notes)
    # methods that never train their table: an odd one is worth a look
    odd = any("not the sin-cos table" in n for n in translate_checkpoint(tmp_path / "c.pth", said).metadata.notes)
    assert odd == (kind in XYZ)


@pytest.mark.parametrize("kind", WITHOUT_PLAN)
def test_a_wrong_permutation_of_the_crop_is_refused(tmp_path, kind):
    spec = write_file(tmp_path / "c.pth", kind, OBLONG)
    right = in_our_order(kind, spec.img_size)
    assert translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, img_size=right))
    cube = tuple(2 * p for p in spec.patch_size)
    for wrong in (right[::-1], (right[1], right[0], right[2]), cube):
        with pytest.raises(UserError, match=rf"--img-size .*give --img-size {' '.join(map(str, right))}, "):
            translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2, img_size=wrong))


@pytest.mark.parametrize("kind", ["hiendmae", "mim", "glmae", "mae3d"])
def test_encoder_and_decoder_have_the_same_positions(tmp_path, kind):
    spec, name = SPECS[kind], {"hiendmae": "module.decoder_pos_embed", "glmae": "module.backbone.decoder_pos_embed"}
    state = authors_state(kind, random_state(spec))
    rows = next(v for k, v in state.items() if k.endswith("pos_embed")).shape[1]
    name = name.get(kind, "decoder_pos_embed")
    for count, message in ((rows, None), (27, rf"pos_embed .*\(1, {rows}, .*decoder_pos_embed \(1, 27, 5\)")):
        state[name] = torch.zeros(1, count, 5)
        torch.save(container(kind, state), tmp_path / "c.pth")
        if message is None:
            translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
            continue
        with pytest.raises(UserError, match=message):
            translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))


def test_fixed_positions_stay_fixed_and_as_they_are(tmp_path):
    """Turned round, the table is no longer the formula of its grid: it is what the file says, and is not trained."""
    write_file(tmp_path / "c.pth", "hiendmae", OBLONG)
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "e.safetensors", ConvertOptions(num_heads=2))
    encoder, metadata = load_encoder(done.path)
    assert metadata.spec.pos_embed == "sincos" and not encoder.pos_embed.requires_grad
    assert not torch.allclose(encoder.pos_embed, sincos_positions(metadata.spec.grid, 12), atol=0.1)
    turned = sincos_positions(OBLONG, 12).unflatten(1, OBLONG).permute(0, 3, 2, 1, 4).flatten(1, 3)
    torch.testing.assert_close(encoder.pos_embed.detach(), turned, rtol=0, atol=1e-6)


def test_no_crop_no_formula_no_cube(tmp_path):
    write_file(tmp_path / "c.pth", "timm", (2, 3, 2), formula=False)
    with pytest.raises(UserError, match=r"12 tokens.*--img-size D H W"):
        translate_checkpoint(tmp_path / "c.pth", ConvertOptions(num_heads=2))
