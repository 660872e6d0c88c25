"""What convert tells besides the tensors: sizes that differ from the released ones, lookalikes, unknown volumes."""

import pytest
import torch
from foreign_files import SPECS, VIT, authors_state, container, random_state, write_checkpoint

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.weights import ConvertOptions, convert_checkpoint, translate_checkpoint

OPTIONS = ConvertOptions(num_heads=2)


def notes_of(path, options=OPTIONS):
    return "\n".join(translate_checkpoint(path, options).metadata.notes)


@pytest.mark.parametrize(("kind", "width", "depth", "heads"), [("hiendmae", 768, 12, 12), ("mim", 96, 11, 3)])
def test_another_depth_or_other_heads_than_released(tmp_path, kind, width, depth, heads):
    """A last block that is lost leaves no other trace."""
    changes = {"embed_dim": width, "mlp_ratio": 0.25, "taps": () if kind == "mim" else (0,), "num_heads": heads}
    source = write_checkpoint(tmp_path / "c.pth", kind, SPECS[kind].with_(depth=depth, **changes), torch.float16)
    assert "released" not in notes_of(source, ConvertOptions())
    assert "released" not in notes_of(source, ConvertOptions(num_heads=heads))
    assert f"2 heads: {kind} encoders of width {width} that were released have {heads}" in notes_of(source, OPTIONS)
    shorter = SPECS[kind].with_(depth=depth - 1, **changes)
    source = write_checkpoint(tmp_path / "d.pth", kind, shorter, torch.float16)
    told = notes_of(source, ConvertOptions())
    assert (
        f"{depth - 1} blocks: {kind} encoders of width {width} that were released have {depth}; was one lost?" in told
    )


def test_a_width_that_was_not_released_has_no_notes_on_size(tmp_path):
    assert "released" not in notes_of(write_checkpoint(tmp_path / "c.pth", "hiendmae"))


def test_a_bare_glmae_looks_like_others_and_convert_says_so(tmp_path):
    """With its decoder it has the names of MAE3D, without it those of timm, whose arrays are taken as (z, y, x)."""
    state = authors_state("mae3d", random_state(VIT))
    for content, taken in (
        (state, "mae3d"),
        ({k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_"))}, "timm"),
    ):
        source = tmp_path / f"{taken}.pth"
        torch.save({"model": content}, source)
        translated = translate_checkpoint(source, OPTIONS)
        assert translated.format == taken
        assert any("GL-MAE" in note and "--format glmae" in note for note in translated.metadata.notes)
        assert "--format glmae" not in notes_of(source, ConvertOptions(num_heads=2, format=taken))
        said = translate_checkpoint(source, ConvertOptions(num_heads=2, format="glmae")).metadata
        assert said.method == "glmae" and "(x, y, z)" in said.notes[0] and "--format" not in "".join(said.notes)
    in_container = write_checkpoint(tmp_path / "glmae.pth", "glmae")
    assert "--format" not in notes_of(in_container)


@pytest.mark.parametrize("kind", SPECS)
def test_volumes_of_which_nothing_is_known(tmp_path, kind):
    source = write_checkpoint(tmp_path / "c.pth", kind)
    metadata = translate_checkpoint(source, OPTIONS).metadata
    unknown = metadata.volume.orientation == "unknown"
    assert unknown == (kind in ("mae3d", "timm", "monai"))
    assert unknown == any("which way they lay" in note and "--reader" in note for note in metadata.notes)


@pytest.mark.parametrize("kind", ["hiendmae", "timm"])
def test_several_channels_have_no_names(tmp_path, kind):
    source = write_checkpoint(tmp_path / "c.pth", kind, VIT.with_(in_channels=2))
    metadata = translate_checkpoint(source, OPTIONS).metadata
    assert metadata.volume.channel_names == () and metadata.spec.in_channels == 2
    assert any("2 input channels" in note for note in metadata.notes)
    one = translate_checkpoint(write_checkpoint(tmp_path / "d.pth", kind), OPTIONS).metadata
    assert one.volume.channel_names == (("CT",) if kind == "hiendmae" else ())
    assert not any("input channels" in note for note in one.notes)


def test_monais_layer_norms_differ(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "h.pth", "hiendmae")
    command = ["convert", str(source), "--num-heads", "2", "-o"]
    assert cli.main([*command, str(tmp_path / "m.safetensors"), "--to", "monai"]) == 0
    assert "note: monai's LayerNorms have eps 1e-05, this encoder's 1e-06" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "t.safetensors"), "--to", "timm"]) == 0
    assert "LayerNorms" not in capsys.readouterr().out
    # the note is about the file, not about the encoder: it does not come back with it
    assert "LayerNorms" not in "".join(translate_checkpoint(tmp_path / "m.safetensors").metadata.notes)
    torch.save(container("monai", authors_state("monai", random_state(VIT))), tmp_path / "monai.pth")
    done = convert_checkpoint(tmp_path / "monai.pth", tmp_path / "n.safetensors", OPTIONS, to="monai")
    assert done.metadata.spec.norm_eps == 1e-5 and not any("LayerNorms" in note for note in done.notes)
    done = convert_checkpoint(tmp_path / "monai.pth", tmp_path / "o.safetensors", OPTIONS, to="timm")
    assert any("timm's LayerNorms have eps 1e-06" in note for note in done.notes)
