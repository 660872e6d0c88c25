"""Finding preprocessed cases, reading them in parts, and samples that depend on (seed, step, index) alone."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from run_data import PLANS, write_case, write_preprocessed

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.pretraining.crops import GlobalLocalCrops, ResizedCrop
from nnunetv2_hiendmae.pretraining.steps import Learner
from nnunetv2_hiendmae.training.batches import Boxes, SampleDataset, load_batches
from nnunetv2_hiendmae.training.views import MaskedCrop, resize_box, step_keys, unresized
from nnunetv2_hiendmae.training.volumes import CaseVolume, check_crop_size, find_cases, warn_if_padded

SHAPES = {"a": (20, 24, 28), "b": (18, 20, 22), "c": (30, 16, 17)}
VIEWS = MaskedCrop((16, 16, 16), 8)


@pytest.fixture
def preprocessed(nnunet):
    return write_preprocessed(nnunet.preprocessed, SHAPES)


def find(*datasets: str):
    return find_cases(datasets or ("1",), PLANS, "3d_fullres")


def test_finds_cases_and_format(preprocessed):
    data = find()
    assert [c.name for c in data.cases] == ["Dataset001_Tiny/a", "Dataset001_Tiny/b", "Dataset001_Tiny/c"]
    assert [c.shape for c in data.cases] == list(SHAPES.values())
    assert data.format.window_hu == (-175.0, 250.0) and data.format.foreground_above == 0.0


def test_stock_ct_plans_have_their_own_foreground_threshold(nnunet, preprocessed):
    file = preprocessed.parent / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["foreground_intensity_properties_per_channel"]["0"] = {
        "mean": 50.0, "std": 100.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0,
    }  # fmt: skip
    file.write_text(json.dumps(plans))
    data = find()
    assert data.format.foreground_above == -2.0
    assert data.format.window_hu == (-150.0, 250.0)


def edit_plans(preprocessed: Path, **changes):
    file = preprocessed.parent / f"{PLANS}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_plans_that_transpose_are_refused(preprocessed):
    """Stock nnU-Net puts the thickest axis first; the encoder's axes would then be others than in fine-tuning."""
    edit_plans(preprocessed, transpose_forward=[2, 0, 1])
    with pytest.raises(UserError, match=r"transposes the axes to \[2, 0, 1\].*hiendmae preprocess"):
        find()


def statistics(low: float) -> dict[str, float]:
    return {"mean": low, "std": 425.0, "percentile_00_5": low, "percentile_99_5": low + 425.0}


def test_window_of_the_first_ct_channel_wherever_it_is(nnunet):
    folder = write_preprocessed(nnunet.preprocessed, SHAPES, channels=2)
    plans = json.loads((folder.parent / f"{PLANS}.json").read_text())
    configurations = plans["configurations"]
    configurations["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization", "CTNormalization"]
    edit_plans(folder, configurations=configurations)
    found = find().format
    assert found.foreground_channel == 1 and found.window_hu == (-175.0, 250.0)
    image = np.zeros((2, 16, 16, 16), np.float32)
    image[1, 8:] = 1
    write_case(folder / "a", image)
    volume = CaseVolume(find().cases[0], found)
    assert volume.is_foreground((9, 0, 0)) and not volume.is_foreground((0, 0, 0))


def test_ct_channels_that_were_normalised_differently(nnunet):
    folder = write_preprocessed(nnunet.preprocessed, SHAPES, channels=2)
    properties = {"0": statistics(-175.0), "1": statistics(-1000.0)}
    edit_plans(folder, foreground_intensity_properties_per_channel=properties)
    with pytest.raises(
        UserError, match=r"CT channels .*Dataset001_Tiny .*TinyPlans; run: hiendmae preprocess -d Dataset001_Tiny"
    ):
        find()


def test_stock_plans_are_mended_by_stock_commands(preprocessed):
    plans = json.loads((preprocessed.parent / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "some.UNet"
    edit_plans(preprocessed, **plans)
    remove_folder(preprocessed)
    with pytest.raises(UserError, match="run: nnUNetv2_preprocess -d 1 -plans_name TinyPlans"):
        find()


def test_reads_parts_like_numpy_and_pads_with_the_smallest_values(nnunet, preprocessed):
    image = np.random.default_rng(0).random((2, 20, 24, 28), dtype=np.float32)
    # z-scored MR: air is far below the mean, and 0 would be grey
    image[1] -= 1
    write_case(nnunet.preprocessed / "two", image)
    case = find().cases[0]
    volume = CaseVolume(
        type(case)("x/two", nnunet.preprocessed / "two.b2nd", image.shape[1:]),
        # of CT with this offset the window's lower bound, -175 HU, is 0.5
        replace(find().format, intensity_offset=-387.5),
    )
    assert np.array_equal(volume.read((3, 4, 5), (8, 9, 10)), image[:, 3:11, 4:13, 5:15])
    padded = [np.pad(c, ((2, 3), (0, 0), (0, 4)), constant_values=c.min()) for c in image]
    assert np.array_equal(volume.read((-2, 0, 0), (25, 24, 32)), padded)
    # of the whole case, whatever part is read
    assert np.array_equal(volume.read((19, 0, 0), (3, 24, 28))[:, 1, 0, 0], image.min(axis=(1, 2, 3)))
    assert volume.is_foreground((1, 2, 3)) == (image[0, 1, 2, 3] > 0.5)


def test_crops_are_centred_on_bright_voxels(preprocessed):
    """The tiny cases are a ball on zeros: with share 1 a crop's middle voxel is background only where it was moved
    inside, which a ball that ends before the border never needs."""
    dataset = SampleDataset(find(), MaskedCrop((4, 4, 4), 1, foreground_share=1.0, augmentation=None).draw, 0)
    assert all(dataset[(0, i)]["image"][0, 2, 2, 2] > 0 for i in range(100))


def batches(data, workers, world_size=1, accumulate=1, batch_size=8, steps=3):
    per_rank = []
    for rank in range(world_size):
        keys = step_keys(range(steps), batch_size, accumulate, rank, world_size)
        loaded = load_batches(Fabric(accelerator="cpu"), SampleDataset(data, VIEWS.draw, seed=5), keys, workers)
        per_rank.append(list(loaded))
    return per_rank


def test_samples_do_not_depend_on_workers(preprocessed):
    data = find()
    expected = batches(data, 0)[0]
    for workers in (1, 2):
        got = batches(data, workers)[0]
        assert len(got) == len(expected) == 3
        for a, b in zip(expected, got, strict=True):
            assert a["case"] == b["case"]
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["ids_shuffle"], b["ids_shuffle"])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_global_batch_does_not_depend_on_processes_or_accumulation(preprocessed, world_size, accumulate):
    data = find()
    whole = batches(data, 0)[0]
    parts = batches(data, 0, world_size, accumulate)
    for step, batch in enumerate(whole):
        pieces = [p[step * accumulate + part]["image"] for part in range(accumulate) for p in parts]
        assert torch.equal(torch.cat(pieces), batch["image"])


def test_seed_and_step_change_the_samples(preprocessed):
    data = find()
    one = SampleDataset(data, VIEWS.draw, 5)
    assert not torch.equal(one[(0, 0)]["image"], one[(1, 0)]["image"])
    assert not torch.equal(one[(0, 0)]["image"], SampleDataset(data, VIEWS.draw, 6)[(0, 0)]["image"])
    assert {one[(0, i)]["case"] for i in range(60)} == {c.name for c in data.cases}


def test_several_datasets(nnunet, preprocessed):
    write_preprocessed(nnunet.preprocessed, {"z": (16, 16, 16)}, dataset="Dataset002_Other")
    assert [c.name for c in find("1", "2").cases][-1] == "Dataset002_Other/z"


def test_datasets_that_were_preprocessed_differently(nnunet, preprocessed):
    name = "Dataset002_My Other"
    write_preprocessed(nnunet.preprocessed, {"z": (16, 16, 16)}, dataset=name, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=rf"differ in spacing_mm.*hiendmae preprocess -d Dataset001_Tiny '{name}' -p"):
        find("1", "2")


def test_readers_whose_arrays_are_the_same_share_a_run(nnunet, preprocessed):
    """NIfTI and NRRD, turned to one orientation, have readers of two names."""
    folders = preprocessed, write_preprocessed(nnunet.preprocessed, {"z": (16, 16, 16)}, dataset="Dataset002_Other")
    readers = ["NibabelIOWithReorient", "SimpleITKIOWithReorient"]
    for folder, reader in zip(folders, readers, strict=True):
        edit_plans(folder, image_reader_writer=reader)
    assert len(find("1", "2").cases) == 4
    edit_plans(folders[1], image_reader_writer="SimpleITKIO")
    with pytest.raises(UserError, match="differ in image_reader_writer"):
        find("1", "2")


def test_other_channels_are_told_as_what_no_preprocessing_mends(nnunet, preprocessed):
    write_preprocessed(nnunet.preprocessed, {"z": (16, 16, 16)}, dataset="Dataset002_Other", channels=2)
    with pytest.raises(UserError, match=r"differ in channel_names .*dataset\.json") as told:
        find("1", "2")
    assert "hiendmae preprocess" not in str(told.value)


def test_other_masks_of_z_scores_are_warned_about(nnunet, preprocessed, caplog):
    folders = preprocessed, write_preprocessed(nnunet.preprocessed, {"z": (16, 16, 16)}, dataset="Dataset002_Other")

    def z_score(number, **mask):
        configurations = json.loads((preprocessed.parent / f"{PLANS}.json").read_text())["configurations"]
        configurations["3d_fullres"] |= {"normalization_schemes": ["ZScoreNormalization"], **mask}
        edit_plans(folders[number], configurations=configurations)

    z_score(0)
    before = find("1").digest()
    z_score(0, use_mask_for_norm=[False])
    # runs that were made before masks were known go on
    assert find("1").digest() == before
    z_score(1, use_mask_for_norm=[True])
    assert not caplog.records
    find("1", "2")
    assert "--like mri" in caplog.text


def test_warns_when_crops_are_larger_than_volumes(preprocessed, caplog):
    cases = find().cases
    warn_if_padded(cases, (16, 16, 16))
    assert not caplog.records
    warn_if_padded(cases, (16, 16, 18))
    assert "1 of 3 volumes" in caplog.text and "along W than" in caplog.text
    warn_if_padded(cases, (64, 64, 64))
    assert "along D and H and W than every volume" in caplog.text


@pytest.mark.parametrize(("edge", "fits"), [(80, True), (96, False), (1600, False)])
def test_crops_beyond_64_times_the_largest_volume_are_refused(preprocessed, edge, fits):
    # 20 × 24 × 28 voxels
    with nullcontext() if fits else pytest.raises(UserError, match=r"\(20, 24, 28\).*64 times.*--crop-size"):
        check_crop_size(find().cases, (edge,) * 3)


def remove_folder(folder: Path):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: remove_folder(f), r"not preprocessed.*hiendmae preprocess"),
        (lambda f: [p.unlink() for p in f.glob("*.b2nd")], r"no preprocessed images.*hiendmae preprocess"),
        (lambda f: (f / "a.b2nd").write_bytes(b"garbage"), r"cannot read .*a\.b2nd.*hiendmae preprocess"),
        (lambda f: (f / "a.b2nd").write_bytes((f / "a.b2nd").read_bytes()[:100]), r"cannot read .*a\.b2nd"),
        (lambda f: (f.parent / f"{PLANS}.json").unlink(), r"no plans 'TinyPlans'.*hiendmae preprocess"),
    ],
)
def test_bad_data_on_disk(preprocessed, break_it, message):
    break_it(preprocessed)
    with pytest.raises(UserError, match=message):
        find()


def test_wrong_channel_count_on_disk(preprocessed):
    write_case(preprocessed / "a", np.zeros((3, 16, 16, 16), np.float32))
    with pytest.raises(UserError, match=r"shape \(3, 16, 16, 16\), needed \(1, D, H, W\)"):
        find()


def test_2d_configuration(nnunet):
    write_preprocessed(nnunet.preprocessed, SHAPES, patch_size=(16, 16))
    with pytest.raises(UserError, match=r"'3d_fullres' of TinyPlans is 2D.*-c 3d_fullres"):
        find()


def test_unknown_dataset_configuration_and_variables(preprocessed, monkeypatch):
    with pytest.raises(UserError, match="no dataset '7'"):
        find("7")
    with pytest.raises(UserError, match="no configuration '2d'"):
        find_cases(("1",), PLANS, "2d")
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UserError, match="nnUNet_preprocessed is not set"):
        find()


def test_a_case_that_breaks_in_the_middle_is_named(preprocessed):
    data = find()
    whole = (preprocessed / "a.b2nd").read_bytes()
    (preprocessed / "a.b2nd").write_bytes(whole[:200] + bytes(len(whole) - 260) + whole[-60:])
    dataset = SampleDataset(data, VIEWS.draw, 0)
    with pytest.raises(UserError, match="cannot read case Dataset001_Tiny/a"):
        for i in range(20):
            dataset[(0, i)]


READER = """
import sys, resource
from nnunetv2_hiendmae.training.views import MaskedCrop
from nnunetv2_hiendmae.training.batches import SampleDataset
from nnunetv2_hiendmae.training.volumes import Case, CaseSet
from nnunetv2_hiendmae.volume_format import VolumeFormat
from pathlib import Path
case = Case("x/big", Path(sys.argv[1]), tuple(int(s) for s in sys.argv[2].split(",")))
data = CaseSet((case,), VolumeFormat((1, 1, 1), None, "SimpleITKIO", None, None, ("CTNormalization",), ("CT",)))
dataset = SampleDataset(data, MaskedCrop((16, 16, 16), 8).draw, 0)
dataset[(0, 0)]
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
before = anonymous()
for i in range(200):
    dataset[(0, i)]
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_that_of_a_crop_not_of_the_volume(nnunet):
    """A 64 MB volume is read in 16 kB crops: 200 of them leave the process less than 16 MB larger (blosc2's own
    buffers are a few compressed chunks)."""
    shape = (256, 256, 256)
    image = np.random.default_rng(0).integers(0, 50, shape, dtype=np.uint8).astype(np.float32)[None]
    write_case(nnunet.preprocessed / "big", image)
    path = str(nnunet.preprocessed / "big.b2nd")
    out = subprocess.run(
        [sys.executable, "-c", READER, path, ",".join(map(str, shape))],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert int(out.stdout.split()[-1]) < 16e6


BOXES = GlobalLocalCrops(ResizedCrop((16, 16, 16), 8, (0.5, 1.0)), ResizedCrop((8, 8, 8), 1, (0.25, 0.5)), 2, 3)


def test_boxes_come_from_workers_and_become_their_views(preprocessed):
    """What a GPU gets, on the CPU: batches of boxes, drawn in a process of their own and here, against views."""
    keys, fabric = [[(0, i) for i in range(4)], [(1, i) for i in range(4)]], Fabric(accelerator="cpu", devices=1)
    made = {}
    for name, views, workers in (("views", BOXES, 0), ("here", unresized(BOXES), 0), ("worker", unresized(BOXES), 1)):
        made[name] = list(load_batches(fabric, SampleDataset(find(), views.draw, 0), keys, workers))
    for plain, here, sent in zip(made["views"], made["here"], made["worker"], strict=True):
        assert plain["case"] == here["case"] == sent["case"]
        assert isinstance(sent["boxes"], Boxes)
        for number, view in enumerate([*plain["global"].unbind(1), *plain["local"].unbind(1)]):
            boxes = sent["boxes"].column(number)
            assert all(map(torch.equal, boxes, here["boxes"].column(number)))
            assert all(box.is_shared() for box in boxes)
            resized = torch.stack([resize_box(box, view.shape[2:]) for box in boxes])
            assert (resized - view).abs().max() < 1e-5
        # of a sample's boxes most lie in one memory, sent once
        memories = [{box.untyped_storage().data_ptr() for box in boxes} for boxes in sent["boxes"].arrays]
        assert any(len(of_sample) == 1 for of_sample in memories)


@pytest.mark.parametrize(("device", "resized"), [("cpu", True), ("cuda", False), ("mps", False)])
def test_workers_send_boxes_where_the_device_is_not_the_cpu(device, resized):
    fabric = SimpleNamespace(device=SimpleNamespace(type=device))
    learner = Learner(fabric, None, SimpleNamespace(views=lambda: BOXES), None, None)
    assert learner.views.global_crop.resized is learner.views.local_crop.resized is resized
