"""Training and prediction through the command line: it learns, repeats, continues, and says what is wrong."""

import csv
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from classification_data import Bench, label_rows, write_cases, write_csv
from lightning_fabric import Fabric
from nnunet_data import save_tiny_encoder
from run_data import PLANS, TINY_SPEC, write_case
from sklearn.metrics import roc_auc_score

from nnunetv2_hiendmae import cli, load_encoder
from nnunetv2_hiendmae.classification.labels import Split
from nnunetv2_hiendmae.classification.network import (
    BEST,
    LAST,
    Classifier,
    build_classifier,
    load_classifier,
    weighted_cross_entropy,
)
from nnunetv2_hiendmae.classification.predict import compute_probabilities, measure, predict
from nnunetv2_hiendmae.classification.train import _loss, train
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import CHECKPOINT
from nnunetv2_hiendmae.training.launch import launch
from nnunetv2_hiendmae.training.volumes import CaseVolume
from nnunetv2_hiendmae.weights import load_into

CROPS = ("--input", "crops", "--crops", 2)


@pytest.fixture
def bench(tmp_path, nnunet):
    return Bench(tmp_path, nnunet.preprocessed, count=30)


@pytest.fixture
def small(tmp_path, nnunet):
    return Bench(tmp_path, nnunet.preprocessed, count=20)


def mislabel(bench: Bench) -> None:
    """A split column whose validation cases have the other class: what is learnt makes them worse, and so the last
    model is not the best."""
    other = {"ill": "healthy", "healthy": "ill"}
    rows = [
        (case, other[label], "val") if i % 5 in (1, 4) else (case, label, "train")
        for i, (case, label) in enumerate(label_rows(bench.names))
    ]
    write_csv(bench.labels, rows, ("case", "label", "split"))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as f:
        return {row["case"]: row for row in csv.DictReader(f)}


def tensors(run: Path, file: str = LAST) -> dict[str, torch.Tensor]:
    return load_classifier(run / file)[0].state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error(capsys, arguments: list[str]) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def untrained_aucs(bench: Bench, task, seeds: int) -> list[float]:
    """Validation AUC of the pretrained encoder under fresh heads."""
    found = []
    fabric = launch("cpu", "fp32", 0.0, alone="hiendmae classify")
    for seed in range(seeds):
        network = build_classifier(TINY_SPEC, 2, task.settings.pool, seed=seed)
        load_into(network.encoder, bench.encoder)
        probabilities = compute_probabilities(
            fabric, fabric.setup(network), task.subset(task.split.val), task.settings.inputs, 0
        )
        found.append(measure(task.labels, task.split.val, probabilities)["auc"])
    return found


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--epochs", 8, "--lr", 1e-3), id="end-to-end"),
        pytest.param(("--epochs", 8, "--lr", 5e-2, "--freeze-encoder"), id="linear-probe"),
        pytest.param(("--epochs", 6, "--lr", 1e-3, "--input", "crops", "--crops", 3), id="crops"),
        pytest.param(("--epochs", 8, "--lr", 1e-3, "--pool", "cls", "--from-scratch"), id="cls-from-scratch"),
    ],
)
def test_a_visible_class_is_learnt(bench, options):
    """A bright ball or none, 18 training and 12 validation cases: the last model's AUC is at least 0.9, and at least
    0.2 above the mean of four fresh heads on the same encoder (any head sees the ball, some upside down)."""
    rows = [
        (case, label, "val" if i % 5 in (1, 4) else "train") for i, (case, label) in enumerate(label_rows(bench.names))
    ]
    write_csv(bench.labels, rows, ("case", "label", "split"))
    run = bench.train("run", "--batch-size", 4, *options)
    last = read_json(run / "metrics.json")["last"]["validation"]
    before = np.mean(untrained_aucs(bench, bench.task(*options), 4))
    assert last["cases"] == 12 and last["auc"] >= 0.9 and last["auc"] >= before + 0.2


def test_the_functions_do_what_the_commands_do(small):
    run, quick = small.train("command"), {"plans_name": PLANS, "epochs": 4, "lr": 1e-3, "workers": 0, "device": "cpu"}
    metrics = train([1], small.labels, small.encoder, **quick, output=small.folder / "function")
    assert metrics == small.folder / "function" / "metrics.json"
    for name in ("metrics.json", "predictions.csv", BEST, LAST):
        assert (metrics.parent / name).read_bytes() == (run / name).read_bytes()
    assert small.predict("command") == 0
    table = predict([1], metrics.parent, workers=0, device="cpu")
    assert table.read_bytes() == (run / "predictions_001.csv").read_bytes()
    with pytest.raises(UserError, match=r"--fraction is 2, needed more than 0, at most 1"):
        train([1], small.labels, small.encoder, fraction=2)
    with pytest.raises(UserError, match=r"--model is worst, needed one of best, last"):
        predict([1], run, model="worst")


def test_every_crop_has_the_label_of_its_case(small, nnunet, monkeypatch):
    """Images of ill cases are ones, all others zeros; a batch holds several cases with three crops each."""
    write_cases(nnunet.preprocessed, 20, fill=lambda number, shape: np.full(shape, float(number % 2)))
    seen = []

    def recorded(logits, targets, weights):
        seen[-1] = seen[-1], targets.tolist()
        return weighted_cross_entropy(logits, targets, weights)

    def forward(network, images):
        # the crops' insides: what reaches over the border of a volume is padded
        seen.append(images[:, 0, 7:9, 7:9, 7:9].amax((1, 2, 3)).round().int().tolist())
        return original(network, images)

    original = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", forward)
    monkeypatch.setattr("nnunetv2_hiendmae.classification.network.weighted_cross_entropy", recorded)
    options = ("--input", "crops", "--crops", 3, "--no-augmentation", "--epochs", 1)
    small.train("run", *options)
    steps = [pair for pair in seen if isinstance(pair, tuple)]
    assert len(steps) == 2 and all(shown == targets for shown, targets in steps)
    assert any(len(set(targets)) == 2 for _, targets in steps)


def test_what_a_run_leaves_behind(small):
    run = small.train("run", "-f", 2, "--fraction", 0.5)
    log, metrics, split = read_log(run), read_json(run / "metrics.json"), Split.read(run)
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert split == small.task("-f", 2, "--fraction", 0.5).split and (len(split.train), len(split.val)) == (8, 4)
    assert metrics["last"] == log[-1] and metrics["fold"] == "2" and metrics["training_cases"] == 8
    assert metrics["classes"] == ["healthy", "ill"] and metrics["test"] is None
    assert load_classifier(run / LAST)[1].epoch == 3
    table = read_table(run / "predictions.csv")
    assert tuple(table) == split.val and list(table[split.val[0]]) == [
        "case",
        "label",
        "p_healthy",
        "p_ill",
        "predicted",
    ]
    targets = [row["label"] == "ill" for row in table.values()]
    assert targets == [int(case[-2:]) % 2 == 1 for case in table]
    scores = [float(row["p_ill"]) for row in table.values()]
    assert metrics["validation"]["auc"] == roc_auc_score(targets, scores)
    assert all(float(r["p_ill"]) + float(r["p_healthy"]) == pytest.approx(1, abs=1e-7) for r in table.values())


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "mislabelled"])
def test_the_best_model_by_auc_and_log_loss(small, wrong):
    if wrong:
        mislabel(small)
    run = small.train("run")
    log, metrics = read_log(run), read_json(run / "metrics.json")
    ranks = [(line["validation"]["auc"], -line["validation"]["log_loss"]) for line in log]
    assert metrics["epoch"] == ranks.index(max(ranks)) == load_classifier(run / BEST)[1].epoch
    assert metrics["validation"] == log[metrics["epoch"]]["validation"]
    assert metrics["epoch"] < 3 or not wrong


def test_default_folder_and_three_classes_of_two_datasets(nnunet, tmp_path):
    bench = Bench(tmp_path, nnunet.preprocessed, count=9)
    write_cases(nnunet.preprocessed, 9, "Dataset002_More")
    places = [(f"Dataset00{d}_{n}", i) for d, n, count in ((1, "Tiny", 9), (2, "More", 9)) for i in range(count)]
    write_csv(bench.labels, [(f"{dataset}/c{i:02d}", i % 3) for dataset, i in places])
    arguments = bench.arguments("unused", "-f", 1, "--epochs", 1)
    # a dataset given twice is one dataset
    arguments[arguments.index("-d") + 1 : arguments.index("-p")] = ["1", "2", "Dataset002_More"]
    del arguments[arguments.index("-o") : arguments.index("-o") + 2]
    assert cli.main(arguments) == 0
    run = nnunet.results / "classification" / "cases_hiendmae_finetune_resize_100pct_fold1"
    assert read_json(run / "metrics.json")["classes"] == ["0", "1", "2"]
    table = read_table(run / "predictions.csv")
    assert {row["label"] for row in table.values()} == {"0", "1", "2"}
    assert {case[:10] for case in table} == {"Dataset001", "Dataset002"}


def test_same_seed_same_weights_for_any_number_of_workers(small):
    runs = [small.train(f"workers{n}", "--epochs", 2, *CROPS, "--workers", n) for n in (0, 1, 2)]
    for run in runs[1:]:
        assert equal(tensors(run), tensors(runs[0])) and read_log(run) == read_log(runs[0])
    other = small.train("other", "--epochs", 2, *CROPS, "--seed", 1)
    assert not equal(tensors(other), tensors(runs[0]))
    assert Split.read(other) == Split.read(runs[0])


@pytest.mark.parametrize("more", [(), ("--freeze-encoder",), ("--precision", "bf16")], ids=["all", "frozen", "bf16"])
def test_continuing_equals_an_undisturbed_run(small, more, monkeypatch):
    # the best model is of an epoch before the stop
    mislabel(small)
    whole = small.train("whole", *more)
    module = "nnunetv2_hiendmae.training.run"
    original, calls = sys.modules[module].save_state, []

    def interrupted(*state, **more):
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*state, **more)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.save_state", interrupted)
        assert cli.main(small.arguments("stopped", *more)) == 130
    stopped = small.folder / "stopped"
    assert torch.load(stopped / CHECKPOINT, weights_only=True)["epoch"] == 2 and len(read_log(stopped)) == 3
    # how often checkpoints are written does not decide the result
    small.train("stopped", *more, "--c", "--checkpoint-every", 3)
    for name in (BEST, LAST, "log.jsonl", "metrics.json", "predictions.csv"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    before = (stopped / LAST).read_bytes()
    small.train("stopped", *more, "--c")
    assert (stopped / LAST).read_bytes() == before


def at_step(patch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Does something within that training step (0-based, in this process)."""
    module = "nnunetv2_hiendmae.classification.train._loss"
    original, calls = _loss, []

    def loss(*arguments):
        calls.append(step)
        if len(calls) == step + 1:
            do()
        return original(*arguments)

    patch.setattr(module, loss)


# of 8 steps in each of 4 epochs
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 0), (signal.SIGINT, 11), (signal.SIGTERM, 15)])
def test_a_signal_loses_no_step(small, capsys, number, step):
    batch = ("--batch-size", 2)
    whole, stopped = small.train("whole", *batch), small.folder / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        assert cli.main(small.arguments("stopped", *batch)) == 128 + number
    told = capsys.readouterr().err.splitlines()[-1]
    where = f"after step {step % 8 + 1} of 8 in epoch {step // 8 + 1} of 4"
    assert where in told and told.endswith("continue with the same command and --c")
    small.train("stopped", *batch, "--c")
    for name in (BEST, LAST, "log.jsonl", "metrics.json", "predictions.csv"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_signal_in_the_last_step_stops_nothing(small):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 31, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = small.train("run", "--batch-size", 2)
    assert len(read_log(run)) == 4 and (run / "metrics.json").is_file()


def test_a_log_that_is_removed_in_mid_run_is_noticed(small, capsys):
    whole, log = small.train("whole"), small.folder / "run" / "log.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, log.unlink)
        assert cli.main(small.arguments("run")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{log} was removed" in told and "in epoch 2 of 4" in told and "--c" in told
    small.train("run", "--c")
    assert (small.folder / "run" / LAST).read_bytes() == (whole / LAST).read_bytes()


def test_a_frozen_encoder_stays_as_it_was(small):
    run = small.train("run", "--freeze-encoder", "--lr", 1e-1, "--weight-decay", 0.5)
    pretrained = load_encoder(small.encoder)[0].state_dict()
    trained = tensors(run)
    for name, tensor in pretrained.items():
        assert torch.equal(trained[f"encoder.{name}"], tensor), name
    fresh = build_classifier(TINY_SPEC, 2).state_dict()
    assert not torch.equal(trained["head.weight"], fresh["head.weight"])
    state = torch.load(run / CHECKPOINT, weights_only=True)["optimizer"]["state"]
    # two moments for norm and head, nothing for the encoder
    shapes = sorted(tuple(moments["exp_avg"].shape) for moments in state.values())
    assert shapes == sorted([(24,), (24,), (2, 24), (2,)])


def test_end_to_end_changes_the_encoder(small):
    trained = tensors(small.train("run"))
    pretrained = load_encoder(small.encoder)[0].state_dict()
    assert any(not torch.equal(trained[f"encoder.{name}"], tensor) for name, tensor in pretrained.items())


def test_probabilities_are_averaged_over_the_grid(small):
    task = small.task("--input", "crops", "--crops", 4)
    network = build_classifier(TINY_SPEC, 2).eval()
    with torch.no_grad():
        # far from linear, so that averaging logits would give something else
        network.head.weight *= 50
    data = task.subset(task.split.val)
    made = compute_probabilities(Fabric(accelerator="cpu"), network, data, task.settings.inputs, workers=0)
    for case, row in zip(data.cases, made, strict=True):
        images = task.settings.inputs.regular(CaseVolume(case, data.format))["image"]
        with torch.no_grad():
            expected = torch.stack([network(image[None])[0].softmax(0) for image in images]).mean(0)
        np.testing.assert_allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize("more", [(), CROPS], ids=["resize", "crops"])
def test_predict_reproduces_the_validation(small, more):
    # so that the best model is not the last
    mislabel(small)
    run = small.train("run", *more)
    assert small.predict("run") == 0
    validated, predicted = read_table(run / "predictions.csv"), read_table(run / "predictions_001.csv")
    assert len(predicted) == 20 and {row["label"] for row in predicted.values()} == {""}
    for case, row in validated.items():
        assert {**predicted[case], "label": row["label"]} == row
    assert not (run / "predictions_001.json").exists()
    # the labels of the validation cases alone: their metrics, and the other rows unlabelled
    write_csv(small.labels, [(case, row["label"]) for case, row in validated.items()])
    output = small.folder / "new" / "table.csv"
    assert small.predict("run", "--labels", small.labels, "-o", output) == 0
    assert read_json(output.with_suffix(".json")) == read_json(run / "metrics.json")["validation"]
    assert sum(row["label"] != "" for row in read_table(output).values()) == len(validated)
    assert small.predict("run", "--model", "last", "-o", output) == 0
    last = {case: float(row["p_ill"]) for case, row in read_table(output).items()}
    wanted = [row["label"] == "ill" for row in validated.values()]
    expected = read_json(run / "metrics.json")["last"]["validation"]["auc"]
    assert roc_auc_score(wanted, [last[case] for case in validated]) == expected


def test_labels_of_one_class_give_no_auc_which_is_told(small, caplog):
    small.train("run")
    output = small.folder / "table.csv"
    write_csv(small.labels, [(name, "ill") for name in small.names])
    assert small.predict("run", "--labels", small.labels, "-o", output) == 0
    assert "no AUC: none of the 20 labelled cases is of class healthy" in caplog.text
    measured = read_json(output.with_suffix(".json"))
    assert measured["auc"] is None and measured["auc_interval_95"] is None
    assert "nan" not in output.with_suffix(".json").read_text().lower()


def test_test_cases_never_train_nor_choose(small):
    places = ["train", "train", "train", "train", "val", "val", "test", "test", "train", "train"] * 2
    rows = [(*row, place) for row, place in zip(label_rows(small.names), places, strict=True)]
    write_csv(small.labels, rows, ("case", "label", "split"))
    run = small.train("run")
    before = {name: (run / name).read_bytes() for name in (BEST, LAST, "log.jsonl", "predictions.csv")}
    assert len(read_table(run / "predictions_test.csv")) == 4
    assert read_json(run / "metrics.json")["test"]["cases"] == 4 and read_json(run / "metrics.json")["fold"] is None
    # other labels of the test cases change nothing but their own metrics
    other = {"ill": "healthy", "healthy": "ill"}
    swapped = [(case, other[label] if place == "test" else label, place) for case, label, place in rows]
    write_csv(small.labels, swapped, ("case", "label", "split"))
    again = small.train("again")
    assert all((again / name).read_bytes() == content for name, content in before.items())
    tests = [read_json(r / "metrics.json")["test"]["auc"] for r in (run, again)]
    assert sum(tests) == pytest.approx(1)


def test_all_cases_train_without_validation(small):
    run = small.train("run", "-f", "all")
    assert not (run / BEST).exists() and not (run / "predictions.csv").exists()
    metrics = read_json(run / "metrics.json")
    assert metrics["validation"] is None and metrics["training_cases"] == 20 and metrics["model"] == LAST
    assert all("validation" not in line for line in read_log(run))
    assert small.predict("run") == 0
    assert small.predict("run", "--model", "best") == 2


def test_validation_every_few_epochs_and_at_the_end(small):
    log = read_log(small.train("run", "--validate-every", 3))
    assert ["validation" in line for line in log] == [False, False, True, True]


def test_two_channels_and_another_crop(nnunet, tmp_path, caplog):
    bench = Bench(tmp_path, nnunet.preprocessed, count=10)
    folder = nnunet.preprocessed / "Dataset001_Tiny"
    plans = read_json(folder / f"{PLANS}.json")
    plans["configurations"]["3d_fullres"]["normalization_schemes"] *= 2
    plans["foreground_intensity_properties_per_channel"] |= {
        "1": plans["foreground_intensity_properties_per_channel"]["0"]
    }
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "CT"}}))
    for name in bench.names:
        image = np.random.default_rng(0).random((2, 17, 18, 19), dtype=np.float32)
        write_case(folder / f"{PLANS}_3d_fullres" / name, image)
    run = bench.train("run", "--crop-size", 24, 16, 8, "--epochs", 1)
    spec = load_classifier(run / BEST)[1].spec
    assert spec.in_channels == 2 and spec.img_size == (24, 16, 8)
    assert bench.predict("run") == 0


def bad_cases(names):
    """Options, rows of the label file, and what the message must hold."""
    good = label_rows(names)
    return {
        "unknown case": ((), [*good, ("nobody", "ill")], "1 cases of .* are not preprocessed: nobody"),
        "one class": ((), [(name, "ill") for name in names], "all cases in .* have the label 'ill'"),
        "rare class": ((), [*good[:-1], (names[-1], "rare")], "class 'rare' has 1 cases, needed 5"),
        "no such fold": (("-f", 9), good, "no fold '9', needed one of 0, 1, 2, 3, 4 or all"),
        "crop size": (("--crop-size", 15, 16, 16), good, "not divisible by patch_size"),
        "warm-up": (("--warmup-epochs", 9), good, "--warmup-epochs is 9, needed 0 to 4"),
        "crops": (("--crops", 3), good, "--crops 3 with --input resize"),
        "precision": (("--precision", "fp16"), good, "--precision fp16 needs -device cuda"),
        "plans": (("-p", "Other"), good, "no plans 'Other'"),
        "encoder": (("-w", "nowhere.safetensors"), good, "no encoder file at nowhere.safetensors"),
    }


def test_mistakes_are_one_line_before_anything_is_written(small, capsys):
    for name, (options, rows, message) in bad_cases(small.names).items():
        write_csv(small.labels, rows)
        told = error(capsys, small.arguments("run", *options))
        assert re.search(message, told), f"{name}: {told}"
        assert not (small.folder / "run").exists(), name


def test_cls_needs_a_cls_token(small, capsys):
    save_tiny_encoder(small.encoder, spec=TINY_SPEC.with_(cls_token=False))
    assert "--pool cls, but the encoder has no CLS token" in error(capsys, small.arguments("run", "--pool", "cls"))


def test_a_run_folder_is_not_overwritten_nor_continued_with_other_settings(small, capsys):
    assert re.search(r"run\.json.* without --c$", error(capsys, small.arguments("run", "--c")))
    run = small.train("run")
    before = (run / BEST).read_bytes()
    assert re.search(rf"{run} .*--c, .*--name", error(capsys, small.arguments("run")))
    assert "lr was 0.001, is 0.01" in error(capsys, small.arguments("run", "--c", "--lr", 1e-2))
    write_csv(small.labels, label_rows(small.names)[:-1])
    assert "labels_sha256 was" in error(capsys, small.arguments("run", "--c", "-f", 0)).replace("\n", " ")
    assert (run / BEST).read_bytes() == before
    write_csv(small.labels, label_rows(small.names))
    (run / CHECKPOINT).write_bytes(b"garbage")
    assert re.search(rf"{CHECKPOINT} is damaged .*--name", error(capsys, small.arguments("run", "--c")))


@pytest.mark.parametrize("kind", ["train", "val"])
def test_broken_intensities_are_told(nnunet, small, capsys, kind):
    folder = nnunet.preprocessed / "Dataset001_Tiny" / f"{PLANS}_3d_fullres"
    broken = getattr(small.task().split, kind)[0]
    write_case(folder / broken.partition("/")[2], np.full((1, 16, 16, 16), np.nan, np.float32))
    told = error(capsys, small.arguments("run"))
    assert broken in told and {"train": "the loss is nan in epoch 0", "val": "are not finite"}[kind] in told


def test_a_loss_is_looked_at_once_in_a_step(small, monkeypatch):
    """After the backward pass: a GPU's work is waited for."""
    looks, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: looks.append(t.grad_fn is not None) or item(t))
    steps = -(-len(small.task().split.train) // small.task().settings.batch_size)
    small.train("run", "--epochs", 1)
    assert looks.count(True) == steps


def test_predictions_for_what_the_model_cannot_read(nnunet, small, capsys):
    predict = ["classify", "predict", "-device", "cpu", "-d", "1", "-m", str(small.folder / "run")]
    assert f"no run folder {small.folder / 'run'};" in error(capsys, predict)
    small.train("run", "--epochs", 1)
    write_csv(small.labels, [(small.names[0], "dead")])
    assert "does not know: dead" in error(capsys, [*predict, "--labels", str(small.labels)])
    folder = nnunet.preprocessed / "Dataset001_Tiny"
    (folder / f"{PLANS}.json").rename(folder / "Other.json")
    assert f"no plans '{PLANS}'" in error(capsys, predict)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_run_and_predict(small, precision):
    """The same probabilities from train and predict on the same GPU, to 1e-3 in any precision."""
    run = small.train("run", "-device", "cuda", "--precision", precision)
    assert small.predict("run", "-device", "cuda", "--precision", precision) == 0
    validated, predicted = read_table(run / "predictions.csv"), read_table(run / "predictions_001.csv")
    for case, row in validated.items():
        assert float(predicted[case]["p_ill"]) == pytest.approx(float(row["p_ill"]), abs=1e-3)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="hiendmae classify uses one device"):
        launch("cpu", "fp32", 0.0, alone="hiendmae classify")
