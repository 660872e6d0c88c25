"""Plans that are made anew under the name of trained folds, by nnU-Net's commands and in our comparison."""

import json
from dataclasses import replace

import pytest
from nnunet_data import make_dataset, save_tiny_encoder
from workplace import QUICK, SHAPE, make_workplace, prepare

from nnunetv2_hiendmae.evaluation.compare import compare
from nnunetv2_hiendmae.former_plans import Changes, changes
from nnunetv2_hiendmae.planning import plan_finetuning

pytestmark = pytest.mark.slow

CASES = ["case_000", "case_001", "case_002"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("former") / "nnunet")


@pytest.fixture(scope="module")
def toy(workplace):
    name = make_dataset(workplace.folders, 1, cases=3, shape=SHAPE)
    splits = [{"train": [c for c in CASES if c != case], "val": [case]} for case in CASES]
    (workplace.folders.raw / name / "splits_final.json").write_text(json.dumps(splits))
    return name


@pytest.fixture(scope="module")
def trained(workplace, toy):
    """Fold 0 of the first plans."""
    planned = prepare(workplace, toy, epochs=1, warmup_epochs=0)
    workplace.train(planned, 0)
    return planned


@pytest.fixture
def nnunet(workplace, monkeypatch):
    for variable, value in workplace.environment.items():
        monkeypatch.setenv(variable, value)


def last_line(said):
    return said.strip().splitlines()[-1]


def test_other_arrays_are_refused_by_every_command(workplace, toy, trained, nnunet, caplog):
    caplog.set_level("WARNING")
    planned = prepare(workplace, toy, epochs=1, warmup_epochs=0, window_hu=(-200, 400))
    assert planned.plans_name == trained.plans_name
    told = "CT window was [[-175.0, 250.0, -175.0, 425.0]], is [[-200.0, 400.0, -200.0, 600.0]]"
    assert "has fold 0 of other plans" in caplog.text and told in caplog.text and "--name" in caplog.text
    summary = workplace.results(planned, 0) / "validation" / "summary.json"
    before = summary.read_bytes()
    for options in (("--val",), ("--c",)):
        said = last_line(workplace.run(*command(planned, 0), *options, fails=True))
        assert said.startswith("RuntimeError: fold 0 was trained with other plans") and told in said
    assert summary.read_bytes() == before
    # nnU-Net would write these plans over those that predict with fold 0
    said = last_line(workplace.run(*command(planned, 1), fails=True))
    assert said.startswith("RuntimeError: fold 0 in") and told in said and "move that folder away" in said
    model = workplace.results(planned, 0).parent / "plans.json"
    assert json.loads(model.read_text())["foreground_intensity_properties_per_channel"]["0"]["mean"] == -175
    # the fold itself may be trained anew
    workplace.train(planned, 0)
    assert json.loads(model.read_text())["foreground_intensity_properties_per_channel"]["0"]["mean"] == -200
    prepare(workplace, toy, epochs=1, warmup_epochs=0)
    workplace.train(trained, 0)


def test_other_recipes_are_told_where_results_are_read(workplace, toy, trained, nnunet):
    planned = prepare(workplace, toy, epochs=1, warmup_epochs=0, lr=2e-3)
    said = workplace.train(planned, 1)
    assert "WARNING: fold 0 in" in said and "means over folds mix them: lr was 0.001, is 0.002" in said
    note = f"{planned.trainer}__{planned.plans_name}__3d_fullres: fold 1 was trained with other plans than fold 0: "
    assert f"{note}lr was 0.001, is 0.002" in compare(toy).notes
    assert compare(toy, folds=[1]).notes == []
    # continuing it is allowed, and told
    more = prepare(workplace, toy, epochs=2, warmup_epochs=0, lr=2e-3)
    assert "The plans changed since this training began: epochs was 1, is 2" in workplace.train(more, 1, "--c")


def test_arrays_that_are_missing_name_the_command(workplace, toy, nnunet):
    planned = prepare(workplace, toy, plans_name="Elsewhere", spacing_mm=(2, 2, 2))
    folder = json.loads(planned.path.read_text())["configurations"]["3d_fullres"]["data_identifier"]
    (planned.path.parent / folder).rename(planned.path.parent / "moved")
    said = last_line(workplace.run(*command(planned, 0), fails=True))
    assert said.endswith("run: nnUNetv2_preprocess -d 1 -plans_name Elsewhere -c 3d_fullres") and folder in said


def test_moved_plans_whose_reader_nnunet_changed_are_told(workplace, toy, nnunet, tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder.safetensors", image_reader_writer="NibabelIOWithReorient")
    planned = prepare(replace(workplace, encoder_file=encoder), toy, plans_name="Ras", epochs=1, warmup_epochs=0)
    told = "WARNING: these plans read images with SimpleITKIO, the encoder saw those of NibabelIOWithReorient"
    assert "WARNING" not in workplace.train(planned, 0)
    target = make_dataset(workplace.folders, 2, cases=2, shape=SHAPE)
    plan_finetuning(target, encoder, **{**QUICK, "plans_name": "Own"})
    workplace.run("nnUNetv2_move_plans_between_datasets", "-s", 1, "-t", 2, "-sp", "Ras")
    workplace.run("nnUNetv2_preprocess", "-d", 2, "-plans_name", "Ras", "-c", "3d_fullres", "-np", 1)
    assert told in workplace.run(*command(planned, "all", "2"))


def command(planned, fold, other_dataset=None):
    script, dataset, configuration, _, *rest = planned.next_commands[-2].split()
    return [script, other_dataset or dataset, configuration, fold, *rest, "-device", "cpu"]


def test_what_counts_as_a_change(trained):
    plans = json.loads(trained.path.read_text())
    assert changes(plans, plans) == Changes() and str(Changes()) == ""
    moved = {**plans, "hiendmae": {**plans["hiendmae"], "encoder_file": "/elsewhere/encoder.safetensors"}}
    assert changes(plans, moved) == Changes()
    other = {**plans, "hiendmae": {**plans["hiendmae"], "encoder_sha256": "0123456789abcdef"}}
    found = changes(plans, other)
    assert found == replace(Changes(), encoder=found.encoder) and found.encoder[0].endswith("is 01234567")
    # plans of a version that had fewer options
    older = json.loads(json.dumps(plans))
    del (
        older["hiendmae"]["recipe"]["seed"],
        older["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["dense"],
    )
    assert changes(older, plans) == changes(plans, older) == Changes()
    # stock plans, and what is none
    stock = {k: v for k, v in plans.items() if k != "hiendmae"}
    assert changes(stock, stock) == Changes()
    assert changes({}, plans) == changes(plans, {"configurations": None}) == Changes()
