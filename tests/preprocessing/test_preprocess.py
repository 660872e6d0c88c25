"""Raw images, with labels, without, and broken, become the arrays that pretraining reads."""

import gzip
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_data import TINY, make_dataset, read_arrays, save_tiny_encoder, write_fingerprint, write_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import PreprocessOptions
from nnunetv2_hiendmae.planning.dataset import read_raw_dataset
from nnunetv2_hiendmae.preprocessing import cases, preprocess
from nnunetv2_hiendmae.preprocessing.fingerprint import body_mask, ensure_fingerprint
from nnunetv2_hiendmae.preprocessing.preprocess import PreprocessSummary, preprocess_datasets

PLANS = "HiEndMAEPretrain"
# what nnU-Net's own extractor writes, and the marker that the label-free one adds
FINGERPRINT_KEYS = {
    "spacings",
    "shapes_after_crop",
    "foreground_intensity_properties_per_channel",
    "median_relative_size_after_cropping",
}


def run(*datasets, spacing=(3, 3, 3), processes=1, **settings) -> PreprocessSummary:
    return preprocess_datasets(datasets, spacing_mm=spacing, num_processes=processes, **settings)


def make(nnunet, number=1, **kwargs):
    return make_dataset(nnunet, number, **{"cases": 2, "with_labels": False, **kwargs})


def image(nnunet, name, case=0, channel=0, ending=".nii.gz"):
    return nnunet.raw / name / "imagesTr" / f"case_{case:03d}_{channel:04d}{ending}"


def folder(nnunet, name, plans=PLANS):
    return nnunet.preprocessed / name / f"{plans}_3d_fullres"


def edit_json(nnunet, name, **changes):
    path = nnunet.raw / name / "dataset.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tree(root):
    """Every file below `root` with its content."""
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- what comes out


def test_a_label_free_fingerprint_gives_way_once_there_are_labels(nnunet):
    """Stock commands would otherwise plan supervised training with statistics of whole bodies."""
    name = make(nnunet)
    run(1)
    path = nnunet.preprocessed / name / "dataset_fingerprint.json"
    assert json.loads(path.read_text())["hiendmae_label_free"]
    labels = nnunet.raw / name / "labelsTr"
    labels.mkdir()
    for case in (0, 1):
        seg = sitk.Cast(sitk.ReadImage(str(image(nnunet, name, case))) > 0, sitk.sitkUInt8)
        sitk.WriteImage(seg, str(labels / f"case_{case:03d}.nii.gz"))
    before = read_arrays(nnunet, name)
    assert run(1).skipped == 2
    assert set(json.loads(path.read_text())) == FINGERPRINT_KEYS
    assert all(np.array_equal(array, before[case]) for case, array in read_arrays(nnunet, name).items())


def test_unlabelled_ct(nnunet):
    name = make(nnunet, spacing=(1.5, 3.0, 1.5))
    raw = tree(nnunet.raw)
    assert run(1) == PreprocessSummary(2, 0, ())
    assert tree(nnunet.raw) == raw
    fingerprint = json.loads((nnunet.preprocessed / name / "dataset_fingerprint.json").read_text())
    assert set(fingerprint) == FINGERPRINT_KEYS | {"hiendmae_label_free"}
    assert fingerprint["hiendmae_label_free"] is True
    assert fingerprint["spacings"] == [[1.5, 3.0, 1.5]] * 2
    assert fingerprint["shapes_after_crop"] == [[32, 34, 30]] * 2
    cases = read_arrays(nnunet, name)
    assert set(cases) == {"case_000", "case_001"}
    for array in cases.values():
        assert array.shape == (1, 16, 34, 15)
        # the default method's window, [-175, 250] HU, became [0, 1]
        assert array.min() == 0 and array.max() == 1
    source, _ = SimpleITKIO().read_images([str(image(nnunet, name))])
    run(1, spacing=(1.5, 3.0, 1.5), plans_name="Same")
    expected = (np.clip(source, -175, 250) + 175) / 425
    np.testing.assert_allclose(read_arrays(nnunet, name, "Same")["case_000"], expected, atol=1e-6)
    # imagesTs is never touched, nothing but cases lies in the folder, no temporary is left
    assert {p.name for p in folder(nnunet, name).iterdir()} == {
        f"case_{i:03d}{end}" for i in range(2) for end in (".b2nd", "_seg.b2nd", ".pkl")
    }
    assert not list(nnunet.preprocessed.rglob("*.partial"))


def test_statistics_are_of_body_voxels(nnunet):
    name = make(nnunet, cases=1, channels=("CT", "PET"))
    fingerprint, broken = ensure_fingerprint(read_raw_dataset(name), 1)
    assert broken == []
    ct, pet = (fingerprint["foreground_intensity_properties_per_channel"][c] for c in "01")
    source, _ = SimpleITKIO().read_images([str(image(nnunet, name, channel=c)) for c in range(2)])
    body = source[0][source[0] > -500]
    assert ct["min"] >= -500
    assert ct["mean"] == pytest.approx(body.mean(), abs=1)
    assert ct["percentile_99_5"] == pytest.approx(np.percentile(body, 99.5), abs=3)
    assert pet["min"] >= source[1].mean()
    assert set(ct) == {"mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"}


def test_body_mask_is_never_empty():
    assert body_mask(np.full((2, 2, 2), -1000.0), "CT").all()
    assert body_mask(np.full((2, 2, 2), 7.0), "T1").all()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [("CT",), ("T1", "T2")])
def test_labels_change_nothing(nnunet, channels):
    one, other = (
        make(nnunet, i, channels=channels, with_labels=labelled, name=n)
        for i, labelled, n in ((1, False, "Without"), (2, True, "With"))
    )
    # images with a black frame, so that cropping and its mask matter
    for name in (one, other):
        for case in range(2):
            for channel in range(len(channels)):
                path = image(nnunet, name, case, channel)
                array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
                write_image(path, np.pad(array[6:-6, 6:-6, 6:-6], 6))
    for case in range(2):
        seg = np.zeros((32, 34, 30))
        seg[8:12, 8:12, 8:12] = 1 + case
        write_image(nnunet.raw / other / "labelsTr" / f"case_{case:03d}.nii.gz", seg)
    run(1, 2)
    fingerprints = [
        json.loads((nnunet.preprocessed / n / "dataset_fingerprint.json").read_text()) for n in (one, other)
    ]
    assert "hiendmae_label_free" in fingerprints[0]
    assert set(fingerprints[1]) == FINGERPRINT_KEYS
    without, with_labels = read_arrays(nnunet, one), read_arrays(nnunet, other)
    for case in ("case_000", "case_001"):
        np.testing.assert_array_equal(without[case], with_labels[case])
        assert without[case].shape[1:] == (10, 11, 9)
    for end in ("_seg.b2nd", ".pkl"):
        assert (folder(nnunet, one) / f"case_000{end}").read_bytes() == (
            folder(nnunet, other) / f"case_000{end}"
        ).read_bytes()


def test_labels_for_some_cases_are_not_used(nnunet):
    name = make(nnunet, with_labels=True)
    (nnunet.raw / name / "labelsTr" / "case_001.nii.gz").unlink()
    run(1)
    assert json.loads((nnunet.preprocessed / name / "dataset_fingerprint.json").read_text())["hiendmae_label_free"]


@pytest.mark.slow
def test_broken_label_does_not_stop_pretraining(nnunet, caplog):
    name = make(nnunet, with_labels=True)
    (nnunet.raw / name / "labelsTr" / "case_001.nii.gz").write_bytes(b"")
    assert run(1).done == 2
    assert "--verify_dataset_integrity" in caplog.text
    assert json.loads((nnunet.preprocessed / name / "dataset_fingerprint.json").read_text())["hiendmae_label_free"]


def test_ct_without_window_must_not_see_labels(nnunet, tmp_path):
    name = make(nnunet, with_labels=True)
    write_fingerprint(nnunet, name, cases=2)
    encoder = save_tiny_encoder(tmp_path / "encoder.safetensors", window_hu=None)
    with pytest.raises(UserError, match=rf"CT .*{name} .*--window LO HI"):
        run(1, like=encoder)
    # statistics of bodies are no statistics of labels
    make(nnunet, 2)
    assert run(2, like=encoder).done == 2


def test_incomplete_dataset_json(nnunet):
    name = make(nnunet)
    edit_json(nnunet, name, labels=None, numTraining=None)
    raw = tree(nnunet.raw)
    assert run(1).done == 2
    assert tree(nnunet.raw) == raw
    completed = json.loads((nnunet.preprocessed / name / "dataset.json").read_text())
    assert completed["labels"] == {"background": 0} and completed["numTraining"] == 2


def test_existing_fingerprint_is_reused(nnunet):
    name = make(nnunet)
    path = write_fingerprint(nnunet, name, cases=2)
    before = path.read_bytes()
    run(1)
    assert path.read_bytes() == before


def test_fingerprint_that_was_cut_short_is_made_anew(nnunet):
    name = make(nnunet)
    path = write_fingerprint(nnunet, name)
    path.write_text(path.read_text()[:50])
    run(1)
    assert json.loads(path.read_text())["hiendmae_label_free"]


def test_paths_listed_in_dataset_json(nnunet):
    name = make(nnunet)
    elsewhere = nnunet.root / "elsewhere"
    shutil.move(nnunet.raw / name / "imagesTr", elsewhere)
    entry = {"images": [str(elsewhere / "case_001_0000.nii.gz")]}
    edit_json(nnunet, name, dataset={"scan": entry})
    with pytest.raises(UserError, match=r"dataset\.json has no 'label'"):
        run(1)
    edit_json(nnunet, name, dataset={"scan": {**entry, "label": ""}})
    assert run(1) == PreprocessSummary(1, 0, ())
    assert set(read_arrays(nnunet, name)) == {"scan"}


# ---- settings


def test_explicit_settings_win_over_an_encoder_file(nnunet, tmp_path):
    name = make(nnunet)
    encoder = save_tiny_encoder(
        tmp_path / "e.safetensors",
        spacing_mm=(2.0, 2.5, 3.0),
        window_hu=(-1000.0, 1000.0),
        image_reader_writer="NibabelIOWithReorient",
    )
    preprocess_datasets([1], like=encoder, num_processes=1, plans_name="Like")
    plans = json.loads((nnunet.preprocessed / name / "Like.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.0, 2.5, 3.0]
    assert configuration["patch_size"] == list(TINY.img_size)
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] == -1000
    preprocess_datasets(
        [1], like=str(encoder), spacing_mm=[3, 3, 3], window_hu=[-50, 50], num_processes=1, plans_name="Given"
    )
    plans = json.loads((nnunet.preprocessed / name / "Given.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3, 3, 3]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] == 50


def test_mr_is_z_scored_at_1_mm_in_one_orientation(nnunet, caplog, capsys):
    name = make(nnunet, cases=1, channels=("T1",), shape=(16, 18, 20))
    caplog.set_level(logging.INFO)
    assert cli.main(["preprocess", "-d", "1", "--like", "mri", "-p", "P", "-np", "1"]) == 0
    assert "--crop-size 160 192 160" in capsys.readouterr().out.splitlines()[-1]
    told = "spacing 1 1 1 mm (D H W) (mri's recipe); ZScoreNormalization (mri's recipe); linear interpolation"
    assert any(told in message for message in caplog.messages)
    # its target is not one for CT
    assert not [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    plans = json.loads((nnunet.preprocessed / name / "P.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["spacing"], configuration["patch_size"]) == ([1, 1, 1], [160, 192, 160])
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    (array,) = read_arrays(nnunet, name, "P").values()
    # of voxels before they were resampled
    assert array.shape == (1, 24, 27, 30) and abs(array.mean()) < 0.05 and 0.8 < array.std() < 1.05


def test_ct_is_not_mr(nnunet):
    make(nnunet, channels=("T1", "CT"))
    with pytest.raises(UserError, match=r"--like mri .* channel CT"):
        run(1, like="mri")
    make_dataset(nnunet, 2, cases=1, channels=("MR",))
    with pytest.raises(UserError, match=r"--window .* --like mri"):
        run(2, like="mri", window_hu=(-100, 200))


def test_options_may_be_an_object_with_changes_over_it(nnunet):
    name = make(nnunet, cases=1)
    options = PreprocessOptions(plans_name="P", spacing_mm=(3, 3, 3), num_processes=1)
    assert preprocess_datasets([1], options, spacing_mm=(4, 4, 4)).done == 1
    plans = json.loads((nnunet.preprocessed / name / "P.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [4, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"like": "no_such_method"}, r"--like 'no_such_method'.*\(hiendmae, mim, "),
        ({"spacing": (3, 0, 3)}, r"spacing_mm is \(3, 0, 3\).*--spacing"),
        ({"spacing": (3, 3)}, r"spacing_mm is \(3, 3\).*--spacing"),
        ({"window_hu": (250, -175)}, r"window_hu is \(250, -175\).*--window"),
        ({"plans_name": "a/b"}, "'a/b'.*-p"),
    ],
)
def test_bad_settings(nnunet, settings, message):
    make(nnunet)
    with pytest.raises(UserError, match=message):
        run(1, **settings)


def test_other_channels_keep_nnunets_normalisation_and_this_is_said_once(nnunet, caplog):
    one, other = (make(nnunet, i, channels=("CT", "T1")) for i in (1, 2))
    run(1, 2)
    assert [r.levelname for r in caplog.records if "nnU-Net's normalisation stays for: T1" in r.message] == ["WARNING"]
    for name in (one, other):
        ct, t1 = read_arrays(nnunet, name)["case_000"]
        assert ct.min() == 0 and ct.max() == 1
        assert abs(t1.mean()) < 0.1 and t1.min() < -0.8


@pytest.mark.parametrize("channels", [("CT", "T1"), ("T1",)])
def test_datasets_need_the_same_channels(nnunet, channels):
    make(nnunet, 1)
    make(nnunet, 2, channels=channels)
    with pytest.raises(UserError, match=r"Dataset001_Toy has the channels CT and Dataset002_Toy has .*T1"):
        run(1, 2)
    assert not list(nnunet.preprocessed.rglob("*.json"))


def test_a_dataset_given_twice_is_one(nnunet):
    name = make(nnunet)
    assert run(1, name).done == 2


# ---- running again


@pytest.mark.slow
def test_parallel_equals_serial_and_names_what_is_broken(nnunet):
    name = make(nnunet, cases=4)
    truncate(image(nnunet, name, 1))
    parallel = run(1, processes=2, plans_name="Parallel")
    assert (parallel.done, [case for _, case, _ in parallel.broken]) == (3, ["case_001"])
    assert run(1) == parallel
    for case, array in read_arrays(nnunet, name).items():
        np.testing.assert_array_equal(array, read_arrays(nnunet, name, "Parallel")[case])


def test_an_interrupted_run_goes_on(nnunet):
    name = make(nnunet, cases=3)
    assert run(1) == PreprocessSummary(3, 0, ())
    # as a killed process leaves it: one case not begun, one without its image, rubbish in the hidden folder
    for end in (".b2nd", "_seg.b2nd", ".pkl"):
        (folder(nnunet, name) / f"case_000{end}").unlink()
    (folder(nnunet, name) / "case_001.b2nd").unlink()
    partial = nnunet.preprocessed / name / f".{PLANS}_3d_fullres.partial"
    partial.mkdir()
    (partial / "case_000.b2nd").write_bytes(b"half")
    kept = folder(nnunet, name) / "case_002.b2nd"
    stamp = kept.stat().st_mtime_ns
    assert run(1) == PreprocessSummary(2, 1, ())
    assert kept.stat().st_mtime_ns == stamp
    assert not partial.exists()
    assert set(read_arrays(nnunet, name)) == {"case_000", "case_001", "case_002"}
    assert run(1) == PreprocessSummary(0, 3, ())


def test_arrays_of_cases_that_are_gone_are_told(nnunet, caplog):
    """A patient who must not be seen is taken out of imagesTr: his arrays would still be pretrained on."""
    name = make(nnunet, cases=2)
    run(1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (nnunet.raw / name / "imagesTr" / "case_001_0000.nii.gz").unlink()
    assert run(1) == PreprocessSummary(0, 1, ())
    assert "no longer has images of case_001" in caplog.text and str(folder(nnunet, name)) in caplog.text


def test_images_that_changed_since_are_told(nnunet, caplog):
    """Somebody mended an image: its former array would be kept, and pretrained on."""
    name = make(nnunet, cases=3)
    run(1)
    assert "newer than their arrays" not in caplog.text
    image, other = (nnunet.raw / name / "imagesTr" / f"case_00{i}_0000.nii.gz" for i in (1, 2))
    before = read_arrays(nnunet, name)
    image.write_bytes(other.read_bytes())
    assert run(1) == PreprocessSummary(0, 3, ())
    assert f"images of case_001 in {name} are newer than their arrays" in caplog.text
    for file in folder(nnunet, name).glob("case_001*"):
        file.unlink()
    caplog.clear()
    assert run(1) == PreprocessSummary(1, 2, ())
    assert "newer than their arrays" not in caplog.text
    after = read_arrays(nnunet, name)
    assert not np.array_equal(after["case_001"], before["case_001"])
    assert np.array_equal(after["case_001"], after["case_002"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"spacing": (2, 3, 3)}, r"spacing \[3.0, 3.0, 3.0\], now \[2.0, 3.0, 3.0\]"),
        ({"window_hu": (-1000, 1000)}, "CT window"),
    ],
)
def test_other_settings_never_mix_with_existing_cases(nnunet, settings, told):
    name = make(nnunet)
    run(1)
    before = tree(nnunet.preprocessed)
    with pytest.raises(UserError, match=rf"{folder(nnunet, name)} .*{told}.* -p"):
        run(1, **settings)
    assert tree(nnunet.preprocessed) == before
    # without cases there is nothing to protect
    shutil.rmtree(folder(nnunet, name))
    assert run(1, **settings) == PreprocessSummary(2, 0, ())


def test_other_reader_never_mixes_with_existing_cases(nnunet, tmp_path):
    make(nnunet)
    run(1)
    encoder = save_tiny_encoder(tmp_path / "e.safetensors", image_reader_writer="NibabelIOWithReorient")
    with pytest.raises(UserError, match="reader SimpleITKIO, now NibabelIOWithReorient"):
        run(1, like=encoder, window_hu=(-175, 250))


@pytest.mark.parametrize("foreign", [{}, {"hiendmae": {}}])
def test_plans_of_others_are_left_alone(nnunet, foreign):
    name = make(nnunet)
    run(1)
    plans = nnunet.preprocessed / name / f"{PLANS}.json"
    content = {**json.loads(plans.read_text()), **foreign}
    if not foreign:
        content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "PlainConvUNet"
    plans.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{PLANS}\.json .* -p"):
        run(1)
    assert json.loads(plans.read_text()) == content


def test_full_disk(nnunet):
    name = make(nnunet, cases=1, shape=(48, 48, 48))
    ensure_fingerprint(read_raw_dataset(name), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=rf"case_000 .*{folder(nnunet, name)} .* GB free"):
            run(1, spacing=(1.5, 1.5, 1.5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder(nnunet, name).iterdir())
    assert not list(nnunet.preprocessed.rglob("*.partial"))
    assert run(1, spacing=(1.5, 1.5, 1.5)).done == 1


def test_folder_that_cannot_be_written(nnunet):
    make(nnunet)
    nnunet.preprocessed.rmdir()
    nnunet.preprocessed.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=f"cannot write {nnunet.preprocessed}"):
        run(1)


# ---- broken input

NOISE = np.random.default_rng(0).normal(0, 100, (32, 34, 30)).astype(np.float32)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_value(value):
    array = NOISE.copy()
    array[3:5, 3, 3] = value
    return array


def write_4d(path):
    volumes = [sitk.GetImageFromArray(NOISE)] * 3
    sitk.WriteImage(sitk.JoinSeries(volumes), str(path))


def set_pixdim(path, value):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[88:92] = struct.pack("<f", value)
    path.write_bytes(gzip.compress(bytes(content)))


BROKEN = {
    "truncated": (truncate, "truncated or damaged"),
    "empty": (lambda p: p.write_bytes(b""), "Unable to determine ImageIO reader"),
    "garbage": (lambda p: p.write_bytes(bytes(range(256)) * 40), "Unable to determine ImageIO reader"),
    "4d": (write_4d, r"shape \(3, 32, 34, 30\), needed 1 channel"),
    "nan": (lambda p: write_image(p, with_value(np.nan)), "2 voxels are NaN or infinite"),
    "inf": (lambda p: write_image(p, with_value(-np.inf)), "2 voxels are NaN or infinite"),
    "constant": (lambda p: write_image(p, np.zeros((32, 34, 30))), "every voxel is 0"),
    "no HU": (lambda p: write_image(p, NOISE / 1000), r"use 0\.\d\d% of the window -175 to 250 HU"),
    "outside the window": (
        lambda p: write_image(p, NOISE - 3000),
        r"-3\d+.* to -2\d+.*, use 0.00% of the window -175 to 250",
    ),
    "pixdim": (lambda p: set_pixdim(p, 0), r"case_000_0000.nii.gz has voxels of 1.5 × 1.5 × 0 mm"),
    "thin": (lambda p: write_image(p, NOISE[:1], (0.5, 1.5, 1.5)), r"become \(0, 17, 15\) at the target spacing"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("fingerprint_exists", [False, True])
def test_a_broken_case_is_named_and_the_rest_goes_on(nnunet, caplog, capfd, kind, fingerprint_exists):
    name = make(nnunet, cases=3)
    if fingerprint_exists:
        ensure_fingerprint(read_raw_dataset(name), 1)
    spoil, reason = BROKEN[kind]
    # the first case, the one from which nnU-Net takes the reader
    spoil(image(nnunet, name, 0))
    summary = run(1)
    assert (summary.done, summary.skipped) == (2, 0)
    ((dataset, case, told),) = summary.broken
    assert (dataset, case) == (name, "case_000")
    assert re.search(reason, told), told
    assert "\n" not in told
    assert [r.levelno for r in caplog.records if told in r.getMessage()] == [logging.WARNING]
    assert "Traceback" not in capfd.readouterr().err
    assert set(read_arrays(nnunet, name)) == {"case_001", "case_002"}
    again = run(1)
    assert (again.done, again.skipped, len(again.broken)) == (0, 2, 1)


def test_nan_in_a_format_that_keeps_it(nnunet):
    name = make(nnunet, cases=2)
    for case in range(2):
        array = sitk.ReadImage(str(image(nnunet, name, case)))
        sitk.WriteImage(array, str(image(nnunet, name, case, ending=".nrrd")))
    edit_json(nnunet, name, file_ending=".nrrd")
    write_image(image(nnunet, name, 1, ending=".nrrd"), with_value(np.nan))
    assert run(1) == PreprocessSummary(1, 0, ((name, "case_001", "2 voxels are NaN or infinite"),))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p.with_name("case_000_0000.nii.gz").unlink(), "case_000_0000.nii.gz is missing"),
        (lambda p: p.unlink(), r"array of shape \(1, 32, 34, 30\), needed 2 channel\(s\) \(T1, T2\)"),
        (lambda p: p.rename(p.with_name("case_000_0002.nii.gz")), "case_000_0001.nii.gz is missing"),
        (lambda p: write_image(p, NOISE[:20]), "Not all input images have the same shape"),
    ],
)
def test_broken_channel_files(nnunet, spoil, reason):
    name = make(nnunet, channels=("T1", "T2"))
    spoil(image(nnunet, name, 0, 1))
    summary = run(1)
    assert summary.done == 1
    ((_, case, told),) = summary.broken
    assert case == "case_000"
    assert re.search(reason, told), told


@pytest.mark.parametrize("fingerprint_exists", [False, True])
def test_nothing_but_broken_cases(nnunet, fingerprint_exists):
    name = make(nnunet)
    if fingerprint_exists:
        ensure_fingerprint(read_raw_dataset(name), 1)
    for case in range(2):
        truncate(image(nnunet, name, case))
    with pytest.raises(
        UserError, match=rf"all 2 .*{name} .*case_000 \(case_000_0000\.nii\.gz is truncated.*; case_001 "
    ):
        run(1)


def test_single_slices_are_refused(nnunet):
    name = make(nnunet)
    for case in range(2):
        write_image(image(nnunet, name, case), NOISE[:1])
    with pytest.raises(UserError, match=rf"{name} is 2D .*\[1, 34, 30\]"):
        run(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_ending": ".nrrd"}, r"imagesTr .*'\.nrrd'"),
        ({"file_ending": None}, 'no "file_ending"'),
        ({"channel_names": None}, 'no "channel_names"'),
    ],
)
def test_unusable_dataset_json(nnunet, change, message):
    name = make(nnunet)
    edit_json(nnunet, name, **change)
    with pytest.raises(UserError, match=message):
        run(1)


def test_unreadable_datasets(nnunet):
    name = make(nnunet)
    shutil.rmtree(nnunet.raw / name / "imagesTr")
    with pytest.raises(UserError, match=f"{name} .*imagesTr"):
        run(1)
    (nnunet.raw / name / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json .*json\.tool"):
        run(1)
    (nnunet.raw / name / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        run(1)
    with pytest.raises(UserError, match=f"'7'.*{name}"):
        run(7)
    with pytest.raises(UserError, match=r"0 datasets.*-d"):
        run()


def test_no_reader_for_the_files(nnunet):
    name = make(nnunet)
    for case in range(2):
        image(nnunet, name, case).rename(image(nnunet, name, case, ending=".xyz"))
    edit_json(nnunet, name, file_ending=".xyz")
    with pytest.raises(UserError, match=r"no reader for '\.xyz' files"):
        run(1)


@pytest.mark.parametrize("outlier", [1e9, 1e25])
def test_mr_that_one_voxel_makes_constant(nnunet, outlier):
    name = make(nnunet, channels=("T1",))
    write_image(image(nnunet, name, 0), with_value(outlier))
    ((_, case, told),) = run(1, spacing=(1.5, 1.5, 1.5)).broken
    assert case == "case_000" and "T1 is constant after normalisation" in told


def test_what_a_reader_says_is_told_with_the_case(nnunet, caplog):
    name = make(nnunet, channels=("T1", "T2"))
    path = image(nnunet, name, 1, 1)
    moved = sitk.ReadImage(str(path))
    moved.SetOrigin((7.0, 0.0, 0.0))
    sitk.WriteImage(moved, str(path))
    assert run(1).done == 2
    said = [r.getMessage() for r in caplog.records if "same origin" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{name} case_001: ") and "\n" not in said[0]


def test_what_itk_says_is_told_with_the_case(nnunet, caplog, capfd):
    """In C++, past Python's stderr: a header whose two transforms give different voxel sizes."""
    name = make(nnunet)
    stored = nibabel.load(image(nnunet, name, 1))
    changed = nibabel.Nifti1Image(stored.get_fdata(dtype=np.float32), stored.affine)
    changed.set_sform(stored.affine, 1)
    changed.set_qform(stored.affine @ np.diag([2, 1, 1, 1]), 1)
    nibabel.save(changed, image(nnunet, name, 1))
    assert run(1).done == 2
    said = [r.getMessage() for r in caplog.records if "unexpected scales" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{name} case_001: its reader says: WARNING: ")
    # once, without the place in ITK's source
    assert said[0].count("unexpected scales") == 1 and ".cxx" not in said[0] and "0x" not in said[0]
    assert "unexpected scales" not in capfd.readouterr().err
    sitk.ReadImage(str(image(nnunet, name, 1)))
    assert "unexpected scales" in capfd.readouterr().err


SHEARED = np.array([[1.5, 0.03, 0, 0], [0, 1.5, 0, 0], [0, 0, 1.5, 0], [0, 0, 0, 1]])


def shear(path):
    """As gantry tilt and registration tools leave it; ITK refuses such files."""
    nibabel.save(nibabel.Nifti1Image(nibabel.load(path).get_fdata(dtype=np.float32), SHEARED), path)


def add_axis(path):
    """(X, Y, Z, 1), which nibabel's readers of nnU-Net refuse."""
    stored = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(stored.get_fdata(dtype=np.float32)[..., None], stored.affine), path)


@pytest.mark.parametrize("fingerprint_exists", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_the_encoders_reader_reads_everywhere(nnunet, tmp_path, which, fingerprint_exists):
    name = make(nnunet)
    shear(image(nnunet, name, which))
    encoder = save_tiny_encoder(tmp_path / "e.safetensors", image_reader_writer="NibabelIOWithReorient")
    if fingerprint_exists:
        write_fingerprint(nnunet, name)
    assert run(1, like=encoder) == PreprocessSummary(2, 0, ())
    assert json.loads((nnunet.preprocessed / name / f"{PLANS}.json").read_text())["image_reader_writer"] == (
        "NibabelIOWithReorient"
    )


@pytest.mark.parametrize("fingerprint_exists", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reader", "other"),
    [(shear, "SimpleITKIO", "NibabelIO"), (add_axis, "NibabelIOWithReorient", "SimpleITKIOWithReorient")],
)
def test_a_case_that_another_reader_reads_is_told_which(nnunet, spoil, reader, other, fingerprint_exists):
    name = make(nnunet)
    edit_json(nnunet, name, overwrite_image_reader_writer=reader)
    spoil(image(nnunet, name, 1))
    if fingerprint_exists:
        write_fingerprint(nnunet, name)
    ((_, case, told),) = run(1).broken
    assert case == "case_001"
    assert f'{other} reads it: let "overwrite_image_reader_writer" in dataset.json be "{other}"' in told
    edit_json(nnunet, name, overwrite_image_reader_writer=other)
    assert run(1, plans_name="Mended") == PreprocessSummary(2, 0, ())


def test_the_twin_reads_what_the_encoders_reader_cannot(nnunet, tmp_path):
    name = make(nnunet)
    for case in range(2):
        add_axis(image(nnunet, name, case))
    encoder = save_tiny_encoder(tmp_path / "e.safetensors", image_reader_writer="NibabelIOWithReorient")
    assert run(1, like=encoder).done == 2
    assert json.loads((nnunet.preprocessed / name / f"{PLANS}.json").read_text())["image_reader_writer"] == (
        "SimpleITKIOWithReorient"
    )


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "case_000_0000.nii.gz").rename(f / "scan.nii.gz"), r"scan.nii.gz should be scan_0000.nii.gz"),
        (lambda f: (f / "case_000_0000.nii.gz").rename(f / "scan_seg_0000.nii.gz"), r"_seg.*: scan_seg;"),
        (lambda f: (f / "gone_0000.nii.gz").symlink_to("nowhere"), r"dead links.*: gone_0000.nii.gz"),
        (lambda f: os.mkfifo(f / "pipe_0000.nii.gz"), r"pipes.*: pipe_0000.nii.gz"),
    ],
)
def test_names_that_nnunet_misreads_are_refused_before_work(nnunet, spoil, told):
    name = make(nnunet)
    spoil(nnunet.raw / name / "imagesTr")
    with pytest.raises(UserError, match=told):
        run(1)
    assert not list(nnunet.preprocessed.rglob("*"))


def test_a_pipe_that_dataset_json_lists_is_never_opened(nnunet):
    name = make(nnunet)
    elsewhere = nnunet.root / "pipe.nii.gz"
    os.mkfifo(elsewhere)
    listed = {
        "a": {"images": [str(elsewhere)], "label": ""},
        "b": {"images": ["imagesTr/case_001_0000.nii.gz"], "label": ""},
    }
    edit_json(nnunet, name, dataset=listed)
    summary = run(1)
    assert summary.done == 1
    assert summary.broken == ((name, "a", "pipe.nii.gz is a pipe or folder, no file"),)


@pytest.mark.parametrize("mm", [0.02, 0.0015])
def test_volumes_smaller_than_half_a_target_voxel(nnunet, mm):
    name = make(nnunet, spacing=(mm, mm, mm))
    with pytest.raises(UserError, match=rf"{name} have \[32, 34, 30\] voxels .* --spacing {mm:g} {mm:g} {mm:g}") as e:
        run(1)
    assert ("µm" in str(e.value)) == (mm < 0.01)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ["spacing 1.5 1.5 1.5 mm (D H W) (hiendmae's recipe)", "window -175 to 250 HU (hiendmae's recipe)"]),
        ({"spacing_mm": (3, 3, 3), "window_hu": (0, 9)}, ["3 3 3 mm (D H W) (given)", "window 0 to 9 HU (given)"]),
        ({"like": "mim"}, ["the median spacing (nnU-Net's rule)", "-1000 to 1000 HU (mim's recipe)"]),
    ],
)
def test_settings_are_told_before_work(nnunet, caplog, monkeypatch, settings, told):
    make(nnunet)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(preprocess, "ensure_fingerprint", lambda *_: pytest.fail(caplog.messages[-1]))
    with pytest.raises(pytest.fail.Exception) as e:
        preprocess_datasets([1], num_processes=1, **settings)
    line = str(e.value)
    assert all(part in line for part in (*told, "interpolation", "reader SimpleITKIO (nnU-Net's rule)")), line


@pytest.mark.parametrize(
    ("spacing", "channels", "warned"),
    [((1.5, 1.5, 1.5), ("CT",), False), ((0.45, 0.45, 0.45), ("CT",), True), ((1.0, 1.0, 1.0), ("T1",), True)],
)
def test_data_far_from_the_recipe_get_a_warning_with_the_mend(nnunet, caplog, spacing, channels, warned):
    make(nnunet, spacing=spacing, channels=channels)
    preprocess_datasets([1], num_processes=1)
    mend = f"--spacing {' '.join(f'{s:g}' for s in spacing)}"
    assert any(mend in r.getMessage() for r in caplog.records if r.levelname == "WARNING") == warned


@pytest.mark.parametrize("description", ["dataset.json", "splits_final.json"])
def test_a_full_disk_leaves_no_half_of_a_copied_file(nnunet, description):
    name = make(nnunet)
    edit_json(nnunet, name, note="x" * 50_000)
    (nnunet.raw / name / "splits_final.json").write_text(json.dumps([{"train": ["a" * 50_000], "val": []}]))
    write_fingerprint(nnunet, name)
    copy = nnunet.preprocessed / name / description
    if description == "splits_final.json":
        edit_json(nnunet, name, note=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=rf"no space left on the disk for {copy}"):
            run(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not copy.exists()


def test_workers_end_with_their_parent(tmp_path):
    """Killed with -9, a parent can tell them nothing."""
    code = (
        "import os, sys, time\n"
        "from functools import partial\n"
        "from nnunetv2_hiendmae.preprocessing.cases import map_cases\n"
        "if __name__ == '__main__':\n"
        f"    job = partial(os.mkfifo, {str(tmp_path / 'started')!r})\n"
        "    jobs = {('d', 'a'): job, ('d', 'b'): partial(time.sleep, 600)}\n"
        "    print(os.getpid(), flush=True)\n"
        "    map_cases(jobs, 2, 'test')\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], start_new_session=True, env=dict(os.environ))
    try:
        wait_until(lambda: (tmp_path / "started").exists() and len(group_of(parent.pid)) >= 4, 120)
        parent.kill()
        parent.wait()
        wait_until(lambda: not group_of(parent.pid), 10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def group_of(leader):
    """Processes of a group that still live."""
    fields = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields.append((int(stat.parent.name), stat.read_text().rpartition(")")[2].split()))
    return [pid for pid, (state, _, group, *_) in fields if int(group) == leader and state not in "ZX"]


def wait_until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_next_command_is_quoted(nnunet, capsys):
    name = make(nnunet, name="With space")
    assert cli.main(["preprocess", "-d", name, "--spacing", "3", "3", "3", "-np", "1"]) == 0
    assert f"next: hiendmae pretrain -d '{name}' -p {PLANS}" in capsys.readouterr().out


def test_bugs_are_not_called_broken_cases(nnunet, monkeypatch):
    make(nnunet)

    def bug(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(cases._CheckedPreprocessor, "run_case_save", bug)
    with pytest.raises(KeyError, match="a bug"):
        run(1)
