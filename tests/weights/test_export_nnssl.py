"""A Primus of ours in nnssl's container: what nnU-Net's door asks for is there, and it is the same encoder."""

import json
import re

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from foreign_files import VIT, random_state
from primus_util import FULL_PRIMUS, TINY_PRIMUS, PrimusFixture

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import ConvertOptions, EncoderMetadata, convert_checkpoint, load_encoder, save_encoder
from nnunetv2_hiendmae.weights.convert import translate_checkpoint

SEEN = VolumeFormat((1.0, 1.0, 1.0), None, "SimpleITKIO", normalization_schemes=("ZScoreNormalization",))
SPECS = [TINY_PRIMUS.with_(img_size=(16, 24, 32)), FULL_PRIMUS.with_(register_tokens=0, in_channels=2)]


def encoder_file(tmp_path, spec, volume=SEEN, seed=0):
    path = tmp_path / "encoder.safetensors"
    state = random_state(spec, seed=seed)
    save_encoder(path, state, EncoderMetadata(spec, "mae3d", volume, ("@a{b}",), training={"steps": 3}))
    return path


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back_is_the_same_encoder(tmp_path, spec):
    file = encoder_file(tmp_path, spec)
    exported = convert_checkpoint(file, tmp_path / "n.pth", to="nnssl")
    back = convert_checkpoint(exported.path, tmp_path / "back.safetensors")
    (ours, told), (theirs, known) = load_encoder(file), load_encoder(back.path)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert told.spec == known.spec and (told.method, told.volume, told.citations) == (
        known.method,
        known.volume,
        known.citations,
    )
    assert known.training == {"steps": 3} and back.format == "nnssl" and not back.metadata.notes
    assert {r.status for r in exported.report.records} == {"loaded"}
    with pytest.raises(UserError, match="--token-order: it is a file of ours"):
        translate_checkpoint(exported.path, ConvertOptions(token_order="hwd"))


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_dnas_primus_takes_it_as_nnunet_gives_it(tmp_path, spec):
    """Built from the plan's arch_kwargs, stem and encoder loaded strictly: the same features."""
    exported = convert_checkpoint(encoder_file(tmp_path, spec), tmp_path / "n.pth", to="nnssl").path
    content = torch.load(exported, weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    kwargs = plan["architecture_plans"]["arch_kwargs"]
    network = Primus(
        kwargs["input_channels"],
        kwargs["embed_dim"],
        kwargs["patch_embed_size"],
        3,
        kwargs["encoder_eva_depth"],
        kwargs["encoder_eva_numheads"],
        kwargs["input_shape"],
        init_values=kwargs["init_values"],
        scale_attn_inner=kwargs["scale_attn_inner"],
    ).eval()
    for key in (plan["key_to_stem"], plan["key_to_encoder"]):
        inside = {k: v for k, v in content["network_weights"].items() if k.startswith(f"{key}.")}
        network.get_submodule(key).load_state_dict({k.removeprefix(f"{key}."): v for k, v in inside.items()})
    assert {k for k in content["network_weights"] if not k.startswith(("eva.", "down_projection."))} == set()
    assert plan["key_to_lpe"] in content["network_weights"]
    assert all(f"{key}.weight" in content["network_weights"] for key in plan["keys_to_in_proj"])
    x = torch.randn(1, spec.in_channels, *spec.img_size)
    tokens = network.down_projection(x).flatten(2).transpose(1, 2)
    features = network.eva(tokens)[0]
    ours = load_encoder(tmp_path / "encoder.safetensors")[0](x)[0]
    assert (ours - features).norm() < 1e-5 * features.norm()


def keys_of(tree, path=""):
    """Dotted keys of nested dictionaries."""
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")


def test_the_plan_has_every_key_of_nnssls(tmp_path):
    fixture = PrimusFixture("nnfoundation_vit", "large")
    theirs = fixture.content("checkpoint_large.pth")
    exported = convert_checkpoint(encoder_file(tmp_path, SPECS[0]), tmp_path / "n.pth", to="nnssl").path
    ours = torch.load(exported, weights_only=True)
    assert set(theirs) - set(ours) == {"trainer_name"} and set(ours) - set(theirs) == {"hiendmae_export"}
    style = {"noresample": "STYLE", "onemmiso": "STYLE"}
    wanted, there = (
        {re.sub("|".join(style), "STYLE", key) for key in keys_of(content["nnssl_adaptation_plan"])}
        for content in (theirs, ours)
    )
    assert wanted == there
    plan = ours["nnssl_adaptation_plan"]
    configuration = plan["pretrain_plan"]["configurations"]["onemmiso"]
    assert configuration["spacing"] == [1.0, 1.0, 1.0] and configuration["patch_size"] == [16, 24, 32]
    recorded = theirs["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["noresample"]
    for key in (key for key in recorded if key.startswith("resampling")):
        assert configuration[key] == recorded[key], key
    assert plan["architecture_plans"]["arch_class_name"] == "PrimusX"
    assert ours["citations"][0]["bibtex_citations"] == ["@a{b}"]
    assert json.loads(json.dumps(plan)) == plan


def test_what_nnssl_cannot_hold_is_refused(tmp_path):
    for spec, told in (
        (FULL_PRIMUS, "2 register tokens"),
        (TINY_PRIMUS.with_(mlp_ratio=4.0), "mlp_ratio of 4"),
        (TINY_PRIMUS.with_(norm_eps=1e-6), "norm_eps of 1e-06"),
        (VIT, "no encoder of kind 'vit'"),
    ):
        with pytest.raises(UserError, match=f"--to nnssl: .*{told}"):
            convert_checkpoint(encoder_file(tmp_path, spec), tmp_path / "n.pth", to="nnssl")
    with pytest.raises(UserError, match="--to timm: it has no encoder of kind 'primus'"):
        convert_checkpoint(encoder_file(tmp_path, TINY_PRIMUS), tmp_path / "n.pth", to="timm")
    assert not (tmp_path / "n.pth").exists()


def test_the_command_tells_what_nnunets_door_does_to_images(tmp_path, capsys):
    window = VolumeFormat((1.5, 1.5, 1.5), (-175.0, 250.0), normalization_schemes=("CTNormalization",))
    file = encoder_file(tmp_path, TINY_PRIMUS, window)
    arguments = ["convert", str(file), "-o", str(tmp_path / "n.pth"), "--to", "nnssl"]
    assert cli.main(arguments) == 0
    assert "this encoder saw the window (-175.0, 250.0) HU" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--force"]) == 0
    # what is exported twice is the same file
    first = (tmp_path / "n.pth").read_bytes()
    assert cli.main([*arguments, "--force"]) == 0
    assert first == (tmp_path / "n.pth").read_bytes()


def test_views_of_a_larger_storage_are_written_alone(tmp_path):
    """A program may keep all its numbers in one storage, the decoder's and others among them."""
    content = PrimusFixture("nnssl_simmim").content()
    weights, storage, at = content["network_weights"], torch.full((1_000_000,), 7.0), 0
    for name, tensor in weights.items():
        part = storage[at : at + tensor.numel()].view(tensor.shape)
        weights[name], at = part.copy_(tensor), at + tensor.numel()
    torch.save(content, tmp_path / "c.pth")
    done = convert_checkpoint(tmp_path / "c.pth", tmp_path / "n.pth", ConvertOptions(num_heads=2), to="nnssl")
    assert done.path.stat().st_size < 4 * at + 50_000
    exported = torch.load(done.path, weights_only=True)["network_weights"]
    assert exported and all(torch.equal(tensor, weights[name]) for name, tensor in exported.items())


def test_foreign_weights_can_go_on_to_nnssl(tmp_path):
    """OpenMind's own file in nnU-Net's order: the way to its door with right positions."""
    fixture = PrimusFixture("nnssl_evamae")
    source = fixture.write(tmp_path / "c.pth")
    done = convert_checkpoint(source, tmp_path / "n.pth", ConvertOptions(num_heads=3), to="nnssl")
    assert {r.target for r in done.report.records if r.target} == set(
        torch.load(done.path, weights_only=True)["network_weights"]
    )
    back = translate_checkpoint(done.path)
    direct = translate_checkpoint(source, ConvertOptions(num_heads=3))
    assert all(torch.equal(v, back.state[k]) for k, v in direct.state.items())
    assert back.metadata.source == "c.pth" and back.metadata.method == "nnssl"
