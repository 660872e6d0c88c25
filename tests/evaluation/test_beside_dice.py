"""`hiendmae compare --metrics`, on predictions and labels as nnU-Net's validation leaves them."""

import csv
import json
import logging
import math
import pickle
import re

import command_line
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy import ndimage

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.evaluation import measuring
from nnunetv2_hiendmae.evaluation.compare import compare
from nnunetv2_hiendmae.evaluation.metrics import tolerances_mm
from nnunetv2_hiendmae.evaluation.report import as_json
from nnunetv2_hiendmae.evaluation.surfaces import measure

DATASET = "Dataset007_Toy"
LABELS = {"background": 0, "liver": 1, "spleen": 2}
# names that stock nnU-Net 2.8 gives to its own runs
OURS, LOWRES, RESENC, PRIMUS = (
    "nnUNetTrainer_HiEndMAE__nnUNetPlans_HiEndMAE__3d_fullres",
    "nnUNetTrainer_250epochs__nnUNetPlans__3d_lowres",
    "nnUNetTrainer__nnUNetResEncUNetLPlans__3d_cascade_fullres",
    "nnUNet_Primus_M_Trainer__nnUNetPlans__3d_fullres",
)
SPACING = (3.0, 1.0, 0.7)  # (D, H, W)
CASES = ["case_0", "case_1", "case_2"]
SETTING = "folds 0 to 4, no splits_final.json"
ALL = ["dice", "nsd", "hd95", "volume"]


def write_image(array, path, spacing=SPACING):
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def truth(case):
    """A liver that touches the border of the image, and a spleen in most cases."""
    array = np.zeros((8, 20, 22), dtype=np.uint8)
    array[2:7, 3:14, 0:12] = 1
    if case != "case_2":
        array[2:5, 12:17, 14:19] = 2
    return array


def shifted(array, voxels):
    """Along W; nothing comes back at the other side."""
    return ndimage.shift(array, (0, 0, voxels), order=0)


def write_run(nnunet, run, predictions, *, labels=LABELS, ignore=None, reader=SimpleITKIO, fold=0):
    """A fold of a run: predictions, and the summary.json that nnU-Net writes of them."""
    folder = nnunet.results / DATASET / run
    validation = folder / f"fold_{fold}" / "validation"
    for case, array in predictions.items():
        write_image(array, validation / f"{case}.nii.gz")
    about = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(about))
    plans = {"plans_name": run.split("__")[1], "image_reader_writer": reader.__name__}
    (folder / "plans.json").write_text(json.dumps(plans))
    keys = [
        tuple(v) if isinstance(v, list) else v for name, v in labels.items() if name not in ("background", "ignore")
    ]
    summarise(nnunet, validation, predictions, keys, ignore, reader)
    return validation


def summarise(nnunet, validation, cases, keys=(1, 2), ignore=None, reader=SimpleITKIO):
    rows = [
        compute_metrics(str(label_of(nnunet, case)), str(validation / f"{case}.nii.gz"), reader(), keys, ignore)
        for case in cases
    ]
    for row in rows:  # of another machine
        row["prediction_file"] = row["prediction_file"].replace(str(validation), "D:\\elsewhere").replace("/", "\\")
        row["metrics"] = {key: {"Dice": float(of["Dice"])} for key, of in row["metrics"].items()}
    save_summary_json({"metric_per_case": rows, "mean": {}}, str(validation / "summary.json"))


def label_of(nnunet, case):
    return nnunet.preprocessed / DATASET / "gt_segmentations" / f"{case}.nii.gz"


@pytest.fixture
def tree(nnunet):
    """A good run and a bad one, which finds a spleen where there is none."""
    for case in CASES:
        write_image(truth(case), label_of(nnunet, case))
    write_run(nnunet, OURS, {case: shifted(truth(case), 1) for case in CASES})
    bad = {case: shifted(truth(case), 3) for case in CASES}
    bad["case_2"][6, 18, 20] = 2
    write_run(nnunet, LOWRES, bad, reader=NibabelIO)
    return nnunet


def run_command(capsys, *arguments):
    return command_line.run(capsys, "compare", "-d", 7, *arguments)


def test_numbers_of_every_case_and_class(tree):
    report = compare(7, metrics=ALL, tolerance=["2", "spleen=0.5"], num_processes=1)
    assert [*report.others] == ["nsd", "hd95", "volume"]
    for run, voxels in ((OURS, 1), (LOWRES, 3)):
        for case in CASES:
            prediction = shifted(truth(case), voxels)
            if (run, case) == (LOWRES, "case_2"):
                prediction[6, 18, 20] = 2
            place = (SETTING, run, 0, case)
            for name, label, tolerance in (("liver", 1, 2), ("spleen", 2, 0.5)):
                found = measure(truth(case) == label, prediction == label, SPACING, tolerance)
                difference = found["predicted_ml"] - found["reference_ml"]
                known = not math.isnan(found["nsd"])
                expected = {"nsd": found["nsd"], "hd95": found["hd95"], "volume": abs(difference) if known else np.nan}
                for metric, value in expected.items():
                    # headers keep spacings as 32-bit floats
                    assert report.others[metric].values.loc[place, name] == pytest.approx(value, 1e-6, nan_ok=True)
                signed = report.others["volume"].signed.loc[place, name]
                assert signed == pytest.approx(difference if known else np.nan, 1e-6, nan_ok=True)
    # Dice is what it was
    assert report.dice.equals(compare(7).dice)


def test_ranks_tests_and_notes_of_metrics(tree):
    report = compare(7, metrics=ALL, num_processes=1)
    for metric in (report, *report.others.values()):
        [result] = metric.settings
        # two shifted cases keep their volumes
        ranks = (1 + 1 / 3, 2 - 1 / 3) if metric.metric.name == "volume" else (1, 2)
        assert result.runs.set_index("run")["mean_rank"][[OURS, LOWRES]].tolist() == pytest.approx(ranks)
        assert result.common_cases == 3 and result.comparisons["pairs"].tolist() == [3]
    hd95 = report.others["hd95"].settings[0]
    # a spleen that is not there: the diagonal of the image, and told
    diagonal = np.linalg.norm(np.multiply(SPACING, (8, 20, 22)))
    assert report.others["hd95"].values["spleen"].max() == pytest.approx(diagonal)
    assert report.others["nsd"].values["spleen"].min() == 0
    assert [note for note in hd95.notes if "spleen 1" in note] == hd95.notes
    assert [note.split(":")[0] for note in hd95.notes] == [LOWRES]
    # bias of a spleen that is cut off at the border, over the cases that hold one in truth or prediction
    of_run = report.others["volume"].settings[0].runs.set_index("run").loc[LOWRES, "per_class"]["liver"]
    assert of_run["mean_signed"] == pytest.approx(0, abs=1e-6) and of_run["mean_over_cases"] == pytest.approx(
        0, abs=1e-6
    )


def test_output(tree, tmp_path, capsys):
    code, out, _ = run_command(
        capsys, "--metrics", "dice,nsd,volume", "--tolerance", "spleen=3", "-np", 1, "-o", tmp_path
    )
    assert code == 0 and "# NSD\n" in out and "# volume difference (mL)\n" in out and "# HD95" not in out
    assert "Tolerance: 1 mm for liver, 3 mm for spleen." in out
    assert "Signed difference, prediction − truth" in out
    with (tmp_path / "cases_volume.csv").open() as f:
        assert {*next(csv.DictReader(f))} == {"setting", "run", "fold", "case", "class", "volume", "signed"}
    for name in ("runs_nsd.csv", "tests_nsd.csv", "cases_nsd.csv", "comparison_nsd.png", "comparison.tex"):
        assert (tmp_path / name).stat().st_size
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [*content["metrics"]] == ["nsd", "volume"] and content["metrics"]["nsd"]["higher_is_better"] is True
    assert content["metrics"]["volume"]["settings"][0]["runs"][0]["per_class"]["liver"]["mean_signed"] is not None
    del content["metrics"]
    # without metrics beside Dice nothing changes
    assert content == as_json(compare(7)) and "all_pairs" not in content["settings"][0]


def test_regions_and_an_ignore_label(nnunet):
    labels = {"background": 0, "whole": [1, 2], "spleen": [2], "ignore": 3}
    predictions = {}
    for case in CASES[:2]:
        array = truth(case)
        array[:, :, 18:] = 3
        write_image(array, label_of(nnunet, case))
        predictions[case] = shifted(truth(case), 2)
    write_run(nnunet, OURS, predictions, labels=labels, ignore=3)
    others = compare(7, metrics=["nsd", "volume"], num_processes=1).others
    found, volumes = (others[name].values.loc[SETTING, OURS, 0] for name in ("nsd", "volume"))
    counted = np.arange(22) < 18
    for case in CASES[:2]:
        for name, members in (("whole", [1, 2]), ("spleen", [2])):
            masks = [np.isin(array, members) & counted for array in (truth(case), predictions[case])]
            assert found.loc[case, name] == pytest.approx(measure(*masks, SPACING, 1)["nsd"])
            lost = (masks[0].sum() - masks[1].sum()) * np.prod(SPACING) / 1000
            assert volumes.loc[case, name] == pytest.approx(abs(lost), 1e-6)
    # a part of it went below the ignore label
    assert others["volume"].signed.loc[(SETTING, OURS, 0, CASES[0]), "spleen"] < 0


def test_what_is_known_is_not_measured_again(tree, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    first = compare(7, metrics=ALL, num_processes=1)
    measured = []
    monkeypatch.setattr(measuring, "measure", lambda *arguments: measured.append(1) or measure(*arguments))

    def again(expected_cases, **options):
        measured.clear()
        report = compare(7, metrics=ALL, num_processes=1, **options)
        assert len(measured) == 2 * expected_cases  # two classes
        return report

    for name, report in again(0).others.items():
        assert report.values.equals(first.others[name].values)
    again(6, tolerance=["2"])
    again(6)
    # also of files that are the same: summary.json was not made of them
    summary = tree.results / DATASET / OURS / "fold_0" / "validation" / "summary.json"
    text = summary.read_text()
    summary.write_text(text.replace('"Dice": 0.', '"Dice": 0.1', 1))
    with pytest.raises(UserError, match="1 of its cases"):
        compare(7, metrics=ALL, num_processes=1)
    summary.write_text(text)
    again(1)
    cache = tree.results / DATASET / OURS / "fold_0" / "validation" / measuring.CACHE
    cache.write_text(cache.read_text()[:-20])
    again(3)
    content = json.loads(cache.read_text())
    del content["case_1"]["classes"]["2"], content["case_2"]
    cache.write_text(json.dumps(content))
    again(2)
    assert str(cache) in caplog.text
    again(0)
    # a new validation
    validation = cache.parent
    write_image(truth("case_0"), validation / "case_0.nii.gz")
    summarise(tree, validation, CASES)
    assert again(1).others["hd95"].values.loc[:, OURS, 0, :]["liver"].tolist()[0] == 0


def test_a_folder_that_cannot_be_written(tree, caplog):
    (tree.results / DATASET / OURS / "fold_0" / "validation" / measuring.CACHE).mkdir()
    report = compare(7, metrics=["nsd"], num_processes=1)
    assert report.others["nsd"].values.shape == (6, 3)
    assert "not kept for the next call" in caplog.text and measuring.CACHE in caplog.text


def test_labels_of_the_raw_dataset(tree):
    """Results on a machine that never preprocessed."""
    raw = tree.raw / DATASET / "labelsTr"
    raw.parent.mkdir()
    (tree.preprocessed / DATASET / "gt_segmentations").rename(raw)
    assert compare(7, metrics=["nsd"], num_processes=1).others["nsd"].values["liver"].notna().all()


def test_missing_predictions_are_told_at_once(tree, capsys):
    for run, case in ((OURS, "case_0"), (OURS, "case_2"), (LOWRES, "case_1")):
        (tree.results / DATASET / run / "fold_0" / "validation" / f"{case}.nii.gz").unlink()
    assert run_command(capsys)[0] == 0  # Dice needs none
    code, out, err = run_command(capsys, "--metrics", "nsd", "-np", 1)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1
    for run, cases in ((OURS, ["case_0", "case_2"]), (LOWRES, ["case_1"])):
        trainer, plans, configuration = run.split("__")
        command = f"nnUNetv2_train 7 {configuration} 0 -p {plans} -tr {trainer} --val"
        assert f"{run} fold 0, {len(cases)} of its cases: " in err and command in err
        assert all(f"{case} (no prediction" in err for case in cases)


def test_files_that_do_not_fit_are_told_at_once(tree, capsys):
    validation = tree.results / DATASET / OURS / "fold_0" / "validation"
    (validation / "case_0.nii.gz").write_bytes((validation / "case_0.nii.gz").read_bytes()[:40])
    write_image(shifted(truth("case_1"), 1), validation / "case_1.nii.gz", (3, 1, 0.8))
    write_image(truth("case_2"), validation / "case_2.nii.gz")
    write_image(truth("case_0")[:, :-1], tree.results / DATASET / LOWRES / "fold_0" / "validation" / "case_0.nii.gz")
    code, out, err = run_command(capsys, "--metrics", "hd95", "-np", 1)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and f"{OURS} fold 0, 3 of" in last and f"{LOWRES} fold 0, 1 of" in last
    for told in (
        r"case_0 \(prediction validation/case_0.nii.gz cannot be read: ",
        r"case_1 \(the label has \(8, 20, 22\) voxels of \(3.0, 1.0, 0.7\) mm, .* \(3.0, 1.0, 0.8\) mm\)",
        r"case_2 \(Dice of class 1 is 1.0000 and summary.json says 0.\d+",
        r"case_0 \(the label has \(8, 20, 22\) .* \(8, 19, 22\)",
    ):
        assert re.search(told, last), told
    # what could be measured is known
    assert {*json.loads((tree.results / DATASET / LOWRES / "fold_0/validation" / measuring.CACHE).read_text())} == set(
        CASES[1:]
    )


def test_patients_are_the_pairs_of_every_metric(tree):
    (tree.preprocessed / DATASET / "patients.json").write_text(json.dumps({"one": CASES[:2], "other": CASES[2:]}))
    report = compare(7, metrics=ALL, num_processes=1)
    for of_metric in (report, *report.others.values()):
        assert of_metric.settings[0].comparisons["pairs"].tolist() == [2]
        # margins are Dice points
        assert ("equivalent" in of_metric.settings[0].comparisons) is (of_metric is report)


def test_a_run_without_a_finished_fold_needs_nothing(tree):
    (tree.results / DATASET / RESENC / "fold_0").mkdir(parents=True)
    assert compare(7, metrics=["nsd"], num_processes=1).others["nsd"].values.shape == (6, 3)


def test_a_run_without_its_plans(tree, capsys):
    (tree.results / DATASET / OURS / "plans.json").unlink()
    code, _, err = run_command(capsys, "--metrics", "nsd", "-np", 1)
    assert code == 2 and f"{OURS}/plans.json is missing" in err
    (tree.results / DATASET / OURS / "plans.json").write_text('{"image_reader_writer": "MyReader"}')
    code, _, err = run_command(capsys, "--metrics", "nsd", "-np", 1)
    assert code == 2 and "MyReader" in err


def test_jobs_travel_to_other_processes(tree, monkeypatch):
    monkeypatch.setattr(measuring, "in_processes", lambda jobs, *_: (pickle.loads(pickle.dumps(job))() for job in jobs))
    assert compare(7, metrics=["nsd"]).others["nsd"].values.shape == (6, 3)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--metrics", "dice,nds"], "'nds' .*: dice,nsd,hd95,volume"),
        (["--tolerance", "2"], "--tolerance .*--metrics dice,nsd"),
        (["--metrics", "nsd", "--tolerance", "kidney=2"], "'kidney'; there are: liver, spleen"),
        (["--metrics", "nsd", "--tolerance", "wide"], "'wide'"),
        (["--metrics", "nsd", "--tolerance", "liver=-1"], "'liver=-1'"),
        (["--metrics", "nsd", "--tolerance", "nan"], "'nan'"),
        (["--metrics", "nsd", "--tolerance", "1", "2"], "'2'"),
        (["--metrics", "nsd", "--tolerance", "liver=1", "liver=2"], "class liver"),
        (["--metrics", "nsd", "-np", 0], "-np is 0, needed 1"),
    ],
)
def test_bad_input(tree, capsys, arguments, told):
    code, out, err = run_command(capsys, *arguments)
    assert code == 2 and not out and re.search(told, err) and len(err.splitlines()) == 1


def test_tolerances():
    assert tolerances_mm([], ["a", "b=c"]) == [1, 1]
    assert tolerances_mm(["b=c=0", "2.5"], ["a", "b=c"]) == [2.5, 0]


def test_any_stock_run_stands_beside_ours(tree):
    """Other trainers, plans, spacings and cascades: predictions lie on the images' own grid."""
    for run in (RESENC, PRIMUS):
        write_run(tree, run, {case: truth(case) for case in CASES})
    report = compare(7, metrics=["hd95"], baseline=OURS, num_processes=1)
    assert [*report.labels.values()] == [run.split("__")[0] for run in report.labels]
    perfect = report.others["hd95"].settings[0].runs.set_index("run")["mean_over_cases"]
    assert perfect[RESENC] == perfect[PRIMUS] == 0 < perfect[OURS]
    assert {*report.settings[0].comparisons["second"]} == {OURS}
