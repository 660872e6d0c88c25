"""How images, labels and probabilities are resampled: by our command, by stock nnU-Net with our plans, and back."""

import itertools
import json
import logging

import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_data import make_dataset, read_arrays, save_tiny_encoder, write_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae import cli
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.planning.finetune import plan_finetuning
from nnunetv2_hiendmae.preprocessing.preprocess import preprocess_datasets
from nnunetv2_hiendmae.volume_format import INTERPOLATIONS, VolumeFormat, interpolation_of, resampling
from nnunetv2_hiendmae.weights import read_metadata

TARGET_MM = 1.5
AIR, BODY = -1000.0, 0.0
# of the phantom: organ, lesion inside it, small lesion
LABELS = {"background": 0, "organ": 1, "lesion": 2, "small": 3}


def images_only(nnunet, volumes, number=1):
    """A dataset of given (array, spacing) without labels."""
    name = f"Dataset{number:03d}_Given"
    folder = nnunet.raw / name / "imagesTr"
    folder.mkdir(parents=True)
    for case, (array, spacing) in enumerate(volumes):
        write_image(folder / f"case_{case:03d}_0000.nii.gz", array.astype(np.float32), spacing)
    described = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (folder.parent / "dataset.json").write_text(json.dumps(described))
    return name


def centres(made, stored):
    """Where the voxels of an axis of `made` voxels lie on one of `stored`, in voxels of the latter."""
    return (np.arange(made) + 0.5) * stored / made - 0.5


def between_centres(made, stored):
    """Which of them lie between the centres of the outermost slices: beyond, the edge goes on."""
    at = centres(made, stored)
    return (at >= 0) & (at <= stored - 1)


SPACINGS = (0.5, 0.8, 1.0, 1.5, 2.5, 3.3, 5.0, 7.5, 10.0)
ANISOTROPIC = [
    tuple(mm if a == axis else other for a in range(3))
    for axis, mm, other in itertools.product(range(3), SPACINGS, (0.8, 1.5))
]


@pytest.fixture(scope="module", params=["linear", "cubic"])
def noise(request, tmp_path_factory):
    """(images, arrays) of noise at spacings of 0.5 to 10 mm along each axis, in the window."""
    from nnunet_data import make_folders

    folders = make_folders(tmp_path_factory.mktemp("noise"))
    rng = np.random.default_rng(0)
    volumes = []
    for spacing in ANISOTROPIC:
        shape = [max(6, round(24 / mm)) for mm in spacing]
        volumes.append((rng.uniform(-170, 240, shape).astype(np.float32), spacing))
    with pytest.MonkeyPatch.context() as patch:
        for variable, path in folders.environment.items():
            patch.setenv(variable, path)
            patch.setattr(f"nnunetv2.paths.{variable}", path, raising=False)
        name = images_only(folders, volumes)
        preprocess_datasets([1], spacing_mm=(TARGET_MM,) * 3, interpolation=request.param, num_processes=1)
        return request.param, volumes, list(read_arrays(folders, name).values())


def test_no_slice_is_its_neighbours_twin(noise):
    """As every slice of an image of noise is new, so is every slice of the array between the outermost centres."""
    _, volumes, made = noise
    assert len(made) == len(ANISOTROPIC)
    for (image, spacing), array in zip(volumes, made, strict=True):
        for axis in range(3):
            inside = between_centres(array.shape[axis + 1], image.shape[axis])
            slices = np.moveaxis(array[0], axis, 0)[inside]
            twins = [np.array_equal(a, b) for a, b in itertools.pairwise(slices)]
            assert not any(twins), (spacing, axis, sum(twins), len(twins))


def test_linear_is_the_linear_interpolation_of_simpleitk(noise):
    """Inside the volume, to 1e-4: both weigh the same eight voxels, in float32 here and float64 there."""
    interpolation, volumes, made = noise
    largest = 0.0
    for (image, _), array in zip(volumes, made, strict=True):
        source = sitk.GetImageFromArray((image.astype(np.float64) + 175) / 425)
        grid = sitk.ResampleImageFilter()
        grid.SetInterpolator(sitk.sitkLinear)
        grid.SetSize(array.shape[:0:-1])
        steps = [stored / n for stored, n in zip(image.shape, array.shape[1:], strict=True)]
        grid.SetOutputSpacing(steps[::-1])
        grid.SetOutputOrigin([0.5 * step - 0.5 for step in steps[::-1]])
        expected = sitk.GetArrayFromImage(grid.Execute(source))
        inside = np.ix_(*(between_centres(n, s) for n, s in zip(array.shape[1:], image.shape, strict=True)))
        largest = max(largest, np.abs(array[0][inside] - expected[inside]).max())
    assert largest < 1e-4 if interpolation == "linear" else largest > 0.1


def test_nnunets_own_repeats_thick_slices(nnunet):
    """What the setting `nnunet` means, and why it is not the default."""
    image = np.random.default_rng(0).uniform(-170, 240, (8, 30, 30))
    name = images_only(nnunet, [(image, (5.0, 1.5, 1.5))])
    preprocess_datasets([1], spacing_mm=(TARGET_MM,) * 3, interpolation="nnunet", num_processes=1)
    (array,) = read_arrays(nnunet, name).values()
    twins = [np.array_equal(a, b) for a, b in itertools.pairwise(array[0])]
    assert np.mean(twins) > 0.5


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_stock_nnunet_makes_the_same_arrays_from_our_plans(nnunet, interpolation):
    rng = np.random.default_rng(1)
    image = rng.uniform(-170, 240, (9, 30, 28)).astype(np.float32)
    # empty corners: then the mask of the image is no constant, and has an oblique edge
    image[np.indices(image.shape).sum(axis=0) % 50 < 14] = 0
    name = images_only(nnunet, [(image, (4.0, 1.0, 1.2))])
    preprocess_datasets([1], spacing_mm=(TARGET_MM,) * 3, interpolation=interpolation, num_processes=1)
    plans = PlansManager(str(nnunet.preprocessed / name / "HiEndMAEPretrain.json"))
    configuration = plans.get_configuration("3d_fullres")
    assert interpolation_of(configuration.configuration) == interpolation
    file = nnunet.raw / name / "imagesTr" / "case_000_0000.nii.gz"
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case([str(file)], None, plans, configuration, {})
    folder = str(nnunet.preprocessed / name / "HiEndMAEPretrain_3d_fullres")
    ours, our_seg, _, properties = infer_dataset_class(folder)(folder).load_case("case_000")
    np.testing.assert_array_equal(ours[:], data)
    np.testing.assert_array_equal(our_seg[:], seg)
    assert set(np.unique(seg)) == {-1, 0} and properties["spacing"] == pytest.approx([4.0, 1.0, 1.2])


# ---- labels and predictions


def phantom(spacing, offset_mm, size_mm=(110.0, 80.0, 80.0)):
    """Labels (D, H, W) of three ellipsoids, sampled at voxel centres."""
    shape = [round(size / mm) for size, mm in zip(size_mm, spacing, strict=True)]
    at = np.meshgrid(*[(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True)], indexing="ij")
    middle = np.array(size_mm) / 2 + offset_mm
    seg = np.zeros(shape, np.uint8)
    for label, move, radii in ((1, 0, (36, 27, 26)), (2, (8, 5, 0), (15, 12, 12)), (3, (-20, -8, 4), (7, 7, 6))):
        centre = middle + move
        seg[sum(((x - c) / r) ** 2 for x, c, r in zip(at, centre, radii, strict=True)) < 1] = label
    return seg


def labelled(nnunet, segs, spacing, number=1):
    name = make_dataset(nnunet, number, cases=len(segs), labels=LABELS)
    for case, seg in enumerate(segs):
        write_image(nnunet.raw / name / "labelsTr" / f"case_{case:03d}.nii.gz", seg, spacing)
        image = np.where(seg > 0, BODY, AIR).astype(np.float32)
        write_image(nnunet.raw / name / "imagesTr" / f"case_{case:03d}_0000.nii.gz", image, spacing)
    return name


def planned(tmp_path, name, interpolation, **metadata):
    encoder = save_tiny_encoder(tmp_path / f"{interpolation}.safetensors", **metadata)
    settings = {"plans_name": f"P_{interpolation}", "spacing_mm": (TARGET_MM,) * 3, "window_hu": (AIR, BODY)}
    made = plan_finetuning(name, encoder, interpolation=interpolation, num_processes=1, **settings)
    plans = PlansManager(str(made.path))
    return plans, plans.get_configuration("3d_fullres")


def preprocessed(nnunet, name, case, plans, configuration):
    """What stock nnU-Net makes of a case: data, segmentation, properties."""
    raw = nnunet.raw / name
    image, seg = (raw / "imagesTr" / f"case_{case:03d}_0000.nii.gz"), (raw / "labelsTr" / f"case_{case:03d}.nii.gz")
    files = [str(image)], str(seg), plans, configuration, str(raw / "dataset.json")
    return DefaultPreprocessor(verbose=False).run_case(*files)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("slice_mm", [2.5, 5.0])
def test_the_edge_of_a_label_is_the_edge_of_its_image(nnunet, tmp_path, slice_mm, interpolation):
    """Where an image crosses half of its contrast, its label begins: at every offset of thick slices."""
    spacing, offsets = (slice_mm, 1.5, 1.5), (0.0, 0.7, 1.3, 2.1, 3.4)
    segs = [(phantom(spacing, (offset, 0, 0)) == 1).astype(np.uint8) for offset in offsets]
    name = labelled(nnunet, segs, spacing)
    plans, configuration = planned(tmp_path, name, interpolation)
    for case in range(len(offsets)):
        data, seg, _ = preprocessed(nnunet, name, case, plans, configuration)
        clear = np.abs(data[0] - 0.5) > 1e-3
        inside = np.zeros_like(clear)
        # beyond the outermost slices the spline of an edge rings
        inside[4:-4, 1:-1, 1:-1] = True
        wrong = clear & inside & ((data[0] > 0.5) != (seg[0] == 1))
        # labels are always linear: a voxel of a curved edge may fall on either side of the splines of an image
        assert wrong.sum() <= (0 if interpolation == "linear" else 0.01 * (seg == 1).sum()), (case, wrong.sum())


def dice(prediction, seg):
    return np.mean([2 * ((prediction == k) & (seg == k)).sum() / ((prediction == k).sum() + (seg == k).sum())
                    for k in (1, 2, 3)])  # fmt: skip


@pytest.mark.parametrize("slice_mm", [1.0, 2.5, 5.0, 10.0])
def test_a_perfect_network_loses_no_more_than_with_nnunets_rule(nnunet, tmp_path, slice_mm):
    """Labels go to 1.5 mm and come back, as predictions do, on the image's own grid."""
    spacing = (slice_mm, 0.8, 0.8)
    segs = [phantom(spacing, (offset, 0, 0)) for offset in (0.0, 0.7, 1.6)]
    name = labelled(nnunet, segs, spacing)
    scores = {}
    for interpolation in INTERPOLATIONS:
        plans, configuration = planned(tmp_path, name, interpolation)
        labels = plans.get_label_manager(json.loads((nnunet.raw / name / "dataset.json").read_text()))
        found = []
        for case, seg in enumerate(segs):
            _, made, properties = preprocessed(nnunet, name, case, plans, configuration)
            logits = np.stack([(made[0] == label).astype(np.float32) * 20 for label in range(4)])
            back = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, plans, configuration, labels, properties, num_threads_torch=1
            )
            assert back.shape == seg.shape
            found.append(dice(back, seg))
        scores[interpolation] = np.mean(found)
    assert scores["linear"] >= scores["nnunet"] and scores["cubic"] >= scores["nnunet"], scores
    assert scores["linear"] > 0.93


def test_many_labels_are_resampled_one_by_one():
    """nnU-Net's fast function holds all labels of a volume at once."""
    few, many = (resampling("linear", labels) for labels in (15, 118))
    assert few["resampling_fn_seg"] == "resample_torch_fornnunet"
    assert many["resampling_fn_seg"] == "resample_data_or_seg_to_shape"
    assert many["resampling_fn_seg_kwargs"]["force_separate_z"] is False
    assert {k: v for k, v in few.items() if "seg" not in k} == {k: v for k, v in many.items() if "seg" not in k}


# ---- where the setting goes


def test_each_interpolation_is_recognised_and_others_are_not():
    assert [interpolation_of(resampling(i)) for i in INTERPOLATIONS] == list(INTERPOLATIONS)
    # plans of old nnU-Net do not say
    assert interpolation_of({}) == "nnunet"
    # nnU-Net's planners with "torchres" in their names
    torchres = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
    named = {"resampling_fn_data": "resample_torch_fornnunet"}
    assert interpolation_of({**named, "resampling_fn_data_kwargs": torchres}) == "linear"
    separate = {**torchres, "force_separate_z": None}
    assert interpolation_of({**named, "resampling_fn_data_kwargs": separate}) is None


def test_plan_follows_the_encoder_file_and_an_option_wins(nnunet, tmp_path):
    name = labelled(nnunet, [phantom((3.0, 2.0, 2.0), (0, 0, 0))] * 5, (3.0, 2.0, 2.0))
    for stored, given, expected, told in (
        ("linear", None, "linear", "from the encoder file"),
        ("cubic", None, "cubic", "from the encoder file"),
        ("cubic", "nnunet", "nnunet", "given"),
        (None, None, "linear", "from the recipe of hiendmae"),
    ):
        encoder = save_tiny_encoder(tmp_path / "encoder.safetensors", interpolation=stored)
        made = plan_finetuning(name, encoder, interpolation=given, num_processes=1)
        plans = json.loads(made.path.read_text())
        assert interpolation_of(plans["configurations"]["3d_fullres"]) == expected
        (line,) = [m for m in made.messages if "interpolation" in m]
        assert line.startswith(f"{told}: ") and f"{expected} interpolation" in line


def test_files_of_0_1_mean_nnunets_rule_and_plan_says_so(nnunet, tmp_path):
    name = labelled(nnunet, [phantom((3.0, 2.0, 2.0), (0, 0, 0))] * 5, (3.0, 2.0, 2.0))
    encoder = save_tiny_encoder(tmp_path / "encoder.safetensors")
    text = read_metadata(encoder).to_json()
    old = json.loads(text)
    assert old.pop("interpolation") == "nnunet"
    assert type(read_metadata(encoder)).from_json(json.dumps(old)).volume.interpolation == "nnunet"
    made = plan_finetuning(name, encoder, num_processes=1)
    assert any("nnunet interpolation (nnU-Net's own, which files of 0.1 mean too" in m for m in made.messages)


def test_a_rerun_with_another_interpolation_is_refused(nnunet):
    name = images_only(nnunet, [(np.random.default_rng(0).uniform(-170, 240, (8, 20, 20)), (5.0, 1.5, 1.5))])
    preprocess_datasets([1], interpolation="nnunet", num_processes=1)
    with pytest.raises(UserError, match=r"interpolation nnunet, now linear; .* -p"):
        preprocess_datasets([1], num_processes=1)
    assert preprocess_datasets([1], interpolation="nnunet", num_processes=1).skipped == 1
    # as a plans file of 0.1 says it
    path = nnunet.preprocessed / name / "HiEndMAEPretrain.json"
    content = json.loads(path.read_text())
    content["configurations"]["3d_fullres"]["resampling_fn_data"] = "resample_data_or_seg_to_shape"
    assert interpolation_of(content["configurations"]["3d_fullres"]) == "nnunet"


def test_it_is_told_before_work_and_by_inspect(nnunet, tmp_path, caplog, capsys):
    images_only(nnunet, [(np.random.default_rng(0).uniform(-170, 240, (8, 20, 20)), (5.0, 1.5, 1.5))])
    with caplog.at_level(logging.INFO):
        preprocess_datasets([1], num_processes=1)
    assert "linear interpolation (hiendmae's recipe)" in caplog.text
    encoder = save_tiny_encoder(tmp_path / "encoder.safetensors", interpolation="cubic")
    assert cli.main(["inspect", str(encoder)]) == 0
    assert "interpolation: cubic" in capsys.readouterr().out


def test_digests_of_runs_of_0_1_stay():
    old = VolumeFormat((1.5,) * 3, (-175.0, 250.0))
    assert "interpolation" not in old.to_dict()
    new = VolumeFormat((1.5,) * 3, (-175.0, 250.0), interpolation="linear")
    assert new.to_dict()["interpolation"] == "linear"
    assert VolumeFormat.from_dict(json.loads(json.dumps(new.to_dict()))) == new
