"""The probe while pretraining: known answers, and that it changes nothing of the run."""

import json
import pickle
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_data import PLANS, SHAPES, TINY_SPEC, tiny_settings, write_case, write_labelled, write_preprocessed
from test_continue import asked_to_stop, each_step
from test_loop import _interrupt, cli_arguments, read_log, run

from nnunetv2_hiendmae import cli, load_encoder, load_report
from nnunetv2_hiendmae.architectures import PRESETS, build_encoder
from nnunetv2_hiendmae.errors import Stopped, UserError
from nnunetv2_hiendmae.files import CHECKPOINT, ENCODER, PROBE_ENCODER, SETTINGS
from nnunetv2_hiendmae.pretraining import METHODS
from nnunetv2_hiendmae.pretraining.probe import (
    RIDGE,
    Probe,
    ProbeResult,
    cell_means,
    effective_rank,
    probe_encoder,
    share_dice,
)
from nnunetv2_hiendmae.pretraining.progress import draw_progress
from nnunetv2_hiendmae.pretraining.settings import PretrainSettings, ProbeCases
from nnunetv2_hiendmae.training.labelled import find_labelled
from nnunetv2_hiendmae.training.views import grid_corners
from nnunetv2_hiendmae.training.volumes import CaseVolume

CASES = {"a": (20, 24, 28), "b": (18, 20, 22), "c": (24, 20, 18), "d": (20, 20, 20)}
FOLDS = [{"train": ["a", "b"], "val": ["c", "d"]}]
CHOSEN = ProbeCases("Dataset002_Labelled", 0, ("a", "b"), ("c", "d"))
TIMES = ("samples_per_second", "probe_seconds", "probe_share")


@pytest.fixture(autouse=True)
def preprocessed(nnunet) -> Path:
    """The folder of the labelled dataset's arrays."""
    write_preprocessed(nnunet.preprocessed, SHAPES)
    return write_labelled(nnunet.preprocessed, CASES, FOLDS)


def probed(method: str = "mae3d", **changes) -> PretrainSettings:
    return tiny_settings(method, probe=CHOSEN, probe_epochs=1, **changes)


def without_times(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(run_dir)]


def test_effective_rank_of_known_matrices():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.full((50, 8), 3.0)) == pytest.approx(1)
    rng = np.random.default_rng(0)
    (left, _), (right, _) = (np.linalg.qr(rng.standard_normal((n, 3))) for n in (40, 9))
    # singular values 2, 1, 1: parts 1/2, 1/4, 1/4, whose entropy is 1.5 ln 2
    tokens = (left * [2, 1, 1]) @ right.T
    assert effective_rank(tokens) == pytest.approx(2**1.5) == effective_rank(1000 * tokens.astype(np.float32))


def test_dice_of_shares():
    predicted = np.array([[1, 0.5, 0, 0.2], [0, 1.5, 0, 0.2], [1, -1, 0, 0]], float)
    true = np.array([[1, 0.25, 0.5, 0], [1, 0.5, 0, 0], [0, 0, 0, 0]], float)
    # one hit, one miss, one false; overlaps of .25 and .5 over 1.5 and .75; nothing predicted; no such class
    np.testing.assert_allclose(share_dice(predicted, true), [2 / 4, 2 * 0.75 / 2.25, 0, np.nan])


def test_means_of_cells():
    crop = torch.arange(2 * 8**3, dtype=torch.float32).reshape(1, 2, 8, 8, 8)
    spec = TINY_SPEC.with_(img_size=(8, 8, 8), patch_size=(8, 4, 2), in_channels=2)
    means = cell_means(crop, spec)
    # 1 x 2 x 4 patches of 4 x 4 x 2 cells, of 2 x 1 x 1 voxels, and 2 channels
    assert means.shape == (1, 8, 64)
    torch.testing.assert_close(means[0, 3, :2], crop[0, :, :2, 0, 6].mean(1))


@pytest.mark.parametrize(("shape", "crops"), [((16, 17, 40), 6), ((9, 16, 16), 1), ((33, 33, 33), 27)])
def test_crops_cover_a_volume(shape, crops):
    corners, seen = grid_corners(shape, (16, 16, 16)), np.zeros(shape, bool)
    for corner in corners:
        seen[tuple(slice(max(0, c), c + 16) for c in corner)] = True
        assert all(0 <= c <= s - 16 or (s < 16 and c == -((16 - s) // 2)) for c, s in zip(corner, shape, strict=True))
    assert seen.all() and len(set(corners)) == len(corners) == crops


def test_shares_of_classes_in_tokens(nnunet, preprocessed):
    """Against counting; voxels outside and ignored ones are not labelled; a region has several values."""
    labels = np.random.default_rng(0).integers(-1, 4, (20, 20, 20)).astype(np.int16)
    labels[:8, :8, :8], labels[8:16, :8, :8] = 3, 1
    write_case(preprocessed / "a", np.zeros((1, 20, 20, 20), np.float32), labels)
    classes = {"background": 0, "any": [1, 2], "bright": 2, "ignore": 3}
    about = json.loads((preprocessed.parent / "dataset.json").read_text()) | {"labels": classes}
    (preprocessed.parent / "dataset.json").write_text(json.dumps(about))
    cases = find_labelled(2, PLANS, "3d_fullres")
    assert cases.classes == {"any": (1, 2), "bright": (2,)} and cases.ignored == 3
    probe = Probe(cases, TINY_SPEC.with_(img_size=(24, 24, 24)))
    found, shares = probe._tokens(cases.train[0], lambda crops: cell_means(crops, probe.spec))
    padded = np.pad(labels, 2, constant_values=3)
    blocks = padded.reshape(3, 8, 3, 8, 3, 8).transpose(0, 2, 4, 1, 3, 5).reshape(27, 512)
    known = (blocks != 3).sum(1)
    expected = [[np.isin(b, v).sum() / (b != 3).sum() for v in ((1, 2), (2,))] for b in blocks[known >= 64]]
    assert len(found) == len(expected) == 26
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


def test_of_many_crops_those_with_most_foreground_count(monkeypatch):
    """And of many tokens as many of each training case; all test tokens are scored."""
    every = Probe(find_labelled(2, PLANS, "3d_fullres"), TINY_SPEC)._crops
    monkeypatch.setattr("nnunetv2_hiendmae.pretraining.probe.MOST_CROPS", 2)
    monkeypatch.setattr("nnunetv2_hiendmae.pretraining.probe.MOST_TOKENS", 11)
    probe = Probe(find_labelled(2, PLANS, "3d_fullres"), TINY_SPEC)
    for case, crops in probe._crops.items():
        shares = sorted((float(crop.shares.sum()) for crop in every[case]), reverse=True)
        assert len(crops) == 2 and [float(crop.shares.sum()) for crop in crops] == shares[:2]
    drawn = probe._draw(np.random.default_rng(0), np.arange(20), np.arange(20) + 1)
    assert len({*drawn[0]}) == 6 and np.array_equal(drawn[0] + 1, drawn[1])


def test_is_a_ridge_regression_on_standardised_features():
    cases = find_labelled(2, PLANS, "3d_fullres")
    probe = Probe(cases, TINY_SPEC)

    def features(crops):
        return cell_means(crops, TINY_SPEC)[..., ::8]

    dice, _ = probe.measure(features)
    parts = {part: [probe._tokens(c, features) for c in getattr(cases, part)] for part in ("train", "test")}
    x, y = map(np.concatenate, zip(*parts["train"], strict=True))
    mean, std, base = x.mean(0), x.std(0), y.mean(0)
    z = (x - mean) / std
    weights = np.linalg.solve(z.T @ z / len(z) + RIDGE * np.eye(8), z.T @ (y - base) / len(z))
    by_case = [share_dice((x - mean) / std @ weights + base, y) for x, y in parts["test"]]
    np.testing.assert_allclose(list(dice.values()), np.mean(by_case, 0), rtol=1e-4)
    assert list(dice) == ["ball", "bright"] and probe.of_voxels() == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize(
    "spec",
    [
        TINY_SPEC.with_(in_channels=2),
        PRESETS["convvit_tiny"].with_(img_size=(32, 32, 32), in_channels=2),
        PRESETS["primus_nano"].with_(img_size=(16, 16, 16), in_channels=2),
    ],
    ids=lambda spec: spec.kind,
)
def test_every_kind_of_encoder_is_left_as_it_was(nnunet, spec):
    write_labelled(nnunet.preprocessed, CASES, FOLDS, "Dataset003_Two", channels=2)
    encoder = build_encoder(spec).train()
    encoder.blocks[0].eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = probe_encoder(encoder, find_labelled(3, PLANS, "3d_fullres"))
    assert 0.3 < found.dice < 1 and 1 < found.effective_rank < spec.embed_dim
    assert found == probe_encoder(encoder, find_labelled(3, PLANS, "3d_fullres"))
    assert [module.training for module in encoder.modules()] == modes and {*modes} == {True, False}
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


def test_collapsed_tokens_are_told(nnunet):
    cases = find_labelled(2, PLANS, "3d_fullres")
    encoder = build_encoder(TINY_SPEC)
    whole = probe_encoder(encoder, cases)
    probe, heads = Probe(cases, TINY_SPEC), encoder.num_prefix_tokens
    with torch.no_grad():
        final = [probe._tokens(c, lambda crops: encoder.eval()(crops)[0][:, heads:])[0] for c in cases.test]
    assert whole.effective_rank == pytest.approx(effective_rank(np.concatenate(final)), abs=1e-3)
    with torch.no_grad():
        encoder.norm.weight.zero_()
        encoder.norm.bias.fill_(0.5)
    assert probe_encoder(encoder, cases).effective_rank == 1 < whole.effective_rank / 2


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_are_those_without_it(tmp_path, caplog, method):
    plain, with_probe = tmp_path / "plain", tmp_path / "probe"
    run(plain, tiny_settings(method, steps_per_epoch=1))
    log = run(with_probe, probed(method, steps_per_epoch=1))
    start, *steps = log
    # three steps and four probes
    shares = [line["probe_share"] for line in steps]
    assert all(0 < share < 1 for share in shares)
    assert caplog.text.count("raise --probe-every or lower --probe-cases") == (max(shares) > 0.05)
    assert start["step"] == -1 and start.keys() >= {"probe_dice", "probe_dice_voxels", "probe_rank"}
    assert [line["step"] for line in steps if "probe_dice" in line] == [0, 1, 2]
    of_run = [{k: v for k, v in line.items() if not k.startswith(("probe", "samples"))} for line in steps]
    assert of_run == [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(plain)]
    assert (with_probe / ENCODER).read_bytes() == (plain / ENCODER).read_bytes()
    states = [torch.load(d / CHECKPOINT, weights_only=True)["method"] for d in (plain, with_probe)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_best_encoder_is_kept_with_what_it_was_chosen_by(tmp_path, monkeypatch, capsys):
    values = iter([0.6, 0.5, 0.8, 0.7])
    made = monkeypatch.setattr
    made(Probe, "of_encoder", lambda *_: ProbeResult(value := next(values), {"ball": value}, 3.5))
    made(Probe, "of_voxels", lambda _: 0.4)
    run(tmp_path / "run", probed(steps_per_epoch=1))
    _, metadata = load_encoder(tmp_path / "run" / PROBE_ENCODER)
    chosen = {"dataset": "Dataset002_Labelled", "fold": 0, "train": ["a", "b"], "test": ["c", "d"], "dice": 0.8}
    chosen |= {"dice_per_class": {"ball": 0.8}, "effective_rank": 3.5, "dice_at_start": 0.6, "dice_of_voxels": 0.4}
    assert metadata.training["probe"] == chosen and metadata.training["step"] == 2
    assert "probe" not in load_encoder(tmp_path / "run" / ENCODER)[1].training
    assert cli.main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["encoder_probe"]["training"]["probe"]["dice"] == 0.8 and told["settings"]["probe"]["test"] == ["c", "d"]
    assert "0 adapted" in load_report(tmp_path / "run" / PROBE_ENCODER).summary()


def test_features_that_stay_below_the_start_are_told_once(tmp_path, monkeypatch, caplog):
    values = iter([0.6, 0.5, 0.6, 0.4])
    monkeypatch.setattr(Probe, "of_encoder", lambda *_: ProbeResult(next(values), {}, 3.5))
    run(tmp_path / "run", probed(steps_per_epoch=1))
    assert caplog.text.count("no probe was above the one before the first step (0.6000, 0.6000 there)") == 1


@pytest.mark.parametrize(("stop", "checkpoint_epochs"), [("SIGTERM", 9), ("kill", 2), ("kill", 9)])
def test_stopped_and_continued(tmp_path, stop, checkpoint_epochs):
    """By a signal, or killed after probes that no checkpoint has; before the first one the log begins anew."""
    settings = probed(steps_per_epoch=1, epochs=5, picture_epochs=9, checkpoint_epochs=checkpoint_epochs)
    run(tmp_path / "whole", settings)
    with pytest.raises((Stopped, KeyboardInterrupt)), pytest.MonkeyPatch.context() as patch:
        if stop == "kill":
            each_step(patch, lambda step: _interrupt() if step == 3 else None)
        else:
            asked_to_stop(patch, signal.SIGTERM, 3)
        run(tmp_path / "stopped", settings)
    run(tmp_path / "stopped", settings, resume=True)
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")
    for file in (ENCODER, PROBE_ENCODER):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_which_of_its_settings_may_change(tmp_path):
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        asked_to_stop(patch, signal.SIGTERM, 3)
        run(tmp_path / "run", probed())
    recorded = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert recorded["probe"] == json.loads(json.dumps(vars(CHOSEN))) and recorded["probe_epochs"] == 1
    other = replace(probed(), probe=replace(CHOSEN, train=("a",), test=("c",)))
    with pytest.raises(UserError, match=r"probe was .*'test': \['c', 'd'\].*, is .*'test': \['c'\]"):
        run(tmp_path / "run", other, resume=True)
    lines = run(tmp_path / "run", replace(probed(), probe_epochs=2), resume=True)
    assert [line["step"] for line in lines if "probe_dice" in line] == [-1, 2, 5, 8]
    read = PretrainSettings.from_dict({k: v for k, v in recorded.items() if k != "data_sha256"})
    assert read.probe == CHOSEN
    # a run without one gets none later: its encoder at the start is gone
    run(tmp_path / "without")
    with pytest.raises(UserError, match="probe was None"):
        run(tmp_path / "without", tiny_settings(probe=CHOSEN, probe_epochs=1), resume=True)


def test_blocks_that_are_compiled_are_not_compiled_again(tmp_path, monkeypatch):
    """In eval mode they are computed as they are."""
    compiled = []

    def compile(function):
        return lambda *args, **more: (compiled.append(torch.is_grad_enabled()), function(*args, **more))[1]

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("nnunetv2_hiendmae.pretraining.steps.check_compiler", lambda _: None)
    run(tmp_path / "plain", probed(epochs=1, steps_per_epoch=2))
    log = run(tmp_path / "run", probed(epochs=1, steps_per_epoch=2, compile=True, checkpoint_activations=True))
    assert compiled and all(compiled)
    assert without_times(tmp_path / "plain") == [{k: v for k, v in line.items() if k not in TIMES} for line in log]


def test_an_unknown_dataset_and_options_without_one(nnunet, tmp_path, capsys):
    def told(*options: str) -> str:
        assert cli.main([*cli_arguments("mae3d", tmp_path / "run"), *options]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert re.search(r"--probe 9: no dataset '9'.*Dataset002_Labelled", told("--probe", "9"))
    (nnunet.preprocessed / "Dataset004_Raw").mkdir()
    assert re.search(r"no plans.*hiendmae preprocess.*nnUNetv2_preprocess -d 4 ", told("--probe", "4"))
    assert "belong to --probe DATASET" in told("--probe-cases", "2")
    assert "--probe-cases is 0, needed at least 1" in told("--probe", "2", "--probe-cases", "0")
    said = told("--probe", "2", "--probe-cases", "3")
    assert re.search(r"--probe 2: fold 0 has 2 training and 2 test cases, needed 3 of each", said)
    assert re.search(r"folds 0 to 0, no 4", told("--probe", "2", "--probe-fold", "4"))


def test_all_that_is_wrong_with_a_dataset_is_told_at_once(nnunet, tmp_path):
    """Channels, spacing, classes and the fold in one line; arrays of `hiendmae preprocess` hold no labels."""
    spacing = {"channels": 2, "spacing": (1.0, 1.0, 1.0)}
    root = write_preprocessed(nnunet.preprocessed, CASES, "Dataset003_Bad", **spacing).parent
    like = find_labelled(2, PLANS, "3d_fullres").format
    with pytest.raises(UserError) as e:
        find_labelled(3, PLANS, "3d_fullres", like=like)
    told = str(e.value)
    assert all(part in told for part in ("('CT', 'CT'), needed ('CT',)", "(1.0, 1.0, 1.0), needed (3.0, 3.0, 3.0)"))
    assert "no label besides background" in told and "splits_final.json is missing" in told and "\n" not in told
    for splits, expected in (
        (FOLDS, r"arrays of a, b, c and 1 more hold no labels.*nnUNetv2_preprocess -d 3 -plans_name TinyPlans"),
        ([{"train": ["a", "z"], "val": ["c", "d"]}], "z of fold 0 is not preprocessed"),
        ([{"train": ["a", "b"], "val": ["b", "d"]}], r"its own test cases \(b\)"),
        ([{"train": ["a", "b"], "val": []}], "2 training and 0 test cases, needed 1 of each"),
        ({}, "splits_final.json is damaged"),
    ):
        (root / "splits_final.json").write_text(json.dumps(splits))
        with pytest.raises(UserError, match=expected):
            find_labelled(3, PLANS, "3d_fullres")


def test_cases_without_foreground_and_damaged_ones(preprocessed):
    for case in "cd":
        write_case(preprocessed / case, np.zeros((1, *CASES[case]), np.float32), np.zeros(CASES[case], np.int16))
    with pytest.raises(UserError, match="the test cases hold no foreground"):
        find_labelled(2, PLANS, "3d_fullres")
    # where a label may be ignored, nnU-Net records all other voxels too
    properties = pickle.loads((preprocessed / "c.pkl").read_bytes())
    properties["class_locations"][-1, 0, 1, 2] = np.zeros((9, 4), int)
    (preprocessed / "c.pkl").write_bytes(pickle.dumps(properties))
    with pytest.raises(UserError, match="the test cases hold no foreground"):
        find_labelled(2, PLANS, "3d_fullres")
    write_case(preprocessed / "c", np.zeros((1, *CASES["c"]), np.float32), np.ones(CASES["c"], np.int16))
    cases = find_labelled(2, PLANS, "3d_fullres")
    with pytest.raises(UserError, match="no patch of 64 x 64 x 64 voxels has an eighth"):
        Probe(cases, TINY_SPEC.with_(img_size=(64, 64, 64), patch_size=(64, 64, 64)))
    (preprocessed / "b.pkl").write_bytes(b"garbage")
    with pytest.raises(UserError, match="case Dataset002_Labelled/b"):
        find_labelled(2, PLANS, "3d_fullres")
    (preprocessed / "a_seg.b2nd").write_bytes(b"garbage")
    with pytest.raises(UserError, match="case Dataset002_Labelled/a"):
        Probe(cases, TINY_SPEC)


def test_numbers_that_are_not_finite_are_told(preprocessed):
    image = np.zeros((1, *CASES["a"]), np.float32)
    image[0, 3, 4, 5] = np.nan
    write_case(preprocessed / "a", image, np.ones(CASES["a"], np.int16))
    probe = Probe(find_labelled(2, PLANS, "3d_fullres"), TINY_SPEC)
    with pytest.raises(UserError, match=r"voxels of case Dataset002_Labelled/a .* NaN .*--probe-fold"):
        probe.of_voxels()
    # weights may be finite, and what is computed of them in half precision is not
    with pytest.raises(UserError, match=r"tokens of case Dataset002_Labelled/b .* NaN .*--precision fp32"):
        probe._tokens(probe.cases.train[1], lambda crops: torch.full((len(crops), 8, 24), torch.inf))


def test_cases_are_drawn_by_their_names_and_tested_ones_that_were_seen_are_told(tmp_path, caplog):
    few = [find_labelled(2, PLANS, "3d_fullres", cases=1) for _ in range(2)]
    assert few[0] == few[1] and len(few[0].train) == len(few[0].test) == 1
    command = [*cli_arguments("mae3d", tmp_path / "run"), "--probe", "2", "--dry-run"]
    assert cli.main(command) == 0
    assert "among the images of pretraining" not in caplog.text
    assert cli.main([*command, "-d", "2"]) == 0
    assert "the probe's test cases c, d of Dataset002_Labelled are among the images of pretraining" in caplog.text


def test_how_often_it_comes_follows_from_crops_and_samples(tmp_path, capsys):
    """20 crops of 16³ over the four cases; 12 samples an epoch, 5 % of which are 0.6 crops."""
    assert sum(len(grid_corners(shape, (16, 16, 16))) for shape in CASES.values()) == 32
    assert cli.main([*cli_arguments("mae3d", tmp_path / "run"), "--probe", "2", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "probe: Dataset002_Labelled fold 0, a, b to fit, c, d to test, every 54 epochs" in told
    assert not (tmp_path / "run").exists()


def test_progress_draws_the_probe(tmp_path, drawn):
    lines = [
        {"step": -1, "epoch": 0, "probe_dice": 0.5, "probe_dice_voxels": 0.4, "probe_rank": 9.0, "probe_seconds": 1.0}
    ]
    for step in range(6):
        line = {"step": step, "epoch": 0, "loss": 1.0, "accuracy": 0.1, "lr": 1e-4, "samples_per_second": 9.0}
        found = {"probe_dice": 0.5 + step / 10, "probe_rank": 8.0, "probe_seconds": 1.0, "probe_share": 0.1}
        lines.append(line | (found if step % 2 else {}))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    draw_progress(tmp_path)
    axes = drawn[-1].axes
    labels = [[curve.get_label() for curve in axis.lines if curve.get_label()[0] != "_"] for axis in axes]
    start = ["probe_dice", "at the start", "of voxels"]
    assert labels == [["loss"], ["accuracy"], start, ["probe_rank", "at the start"], [], []]
    dice, level, voxels = axes[2].lines
    assert dice.get_xdata().tolist() == [-1, 1, 3] and dice.get_ydata().tolist() == pytest.approx([0.5, 0.6, 0.8])
    assert {*level.get_ydata()} == {0.5} and {*voxels.get_ydata()} == {0.4}


def test_weights_that_are_not_finite_end_the_run_before_they_are_probed(tmp_path):
    def spoil(self, progress):
        with torch.no_grad():
            self.decoder.head.bias[0] = torch.inf

    with pytest.raises(UserError, match=r"infinite or NaN before step 3 "), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2_hiendmae.pretraining.method.Method.after_step", _at(2, spoil))
        run(tmp_path / "run", probed())


def _at(step: int, do):
    calls = []

    def after_step(self, progress):
        calls.append(progress)
        if len(calls) == step + 1:
            do(self, progress)

    return after_step


def test_voxels_outside_of_a_small_case_are_those_that_training_sees():
    cases = find_labelled(2, PLANS, "3d_fullres")
    probe = Probe(cases, TINY_SPEC.with_(img_size=(32, 32, 32)))
    seen = []
    probe._tokens(cases.test[1], lambda crops: (seen.append(crops), cell_means(crops, probe.spec))[1])
    expected = CaseVolume(cases.test[1], cases.format).read((-6, -6, -6), (32, 32, 32))
    assert np.array_equal(seen[0][0].numpy(), expected)


def test_the_encoder_of_a_stopped_run_is_not_taken_for_one_of_another_run(tmp_path):
    """Not even where it had no checkpoint yet; before its first probe a new run may take the folder."""
    for step in (0, 3):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            each_step(patch, lambda now, last=step: _interrupt() if now == last else None)
            run(tmp_path / str(step), probed(steps_per_epoch=1, epochs=4, checkpoint_epochs=4))
    kept = (tmp_path / "3" / PROBE_ENCODER).read_bytes()
    with pytest.raises(UserError, match="already holds a run; continue it with --c"):
        run(tmp_path / "3", tiny_settings("hiendmae"))
    assert (tmp_path / "3" / PROBE_ENCODER).read_bytes() == kept
    run(tmp_path / "0", tiny_settings("hiendmae", epochs=1, steps_per_epoch=1, warmup_epochs=0))
    assert json.loads((tmp_path / "0" / SETTINGS).read_text()).keys().isdisjoint(("probe", "probe_epochs"))
