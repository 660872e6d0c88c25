"""Labels of a dataset that is to be fine-tuned on, and the fingerprint that nnU-Net makes of images and labels."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnunetv2_hiendmae.environment import dataset_id, nnunet_folder
from nnunetv2_hiendmae.errors import UserError, some
from nnunetv2_hiendmae.files import is_disk_full, scratch_folder, telling_disk_errors, write_text, write_with
from nnunetv2_hiendmae.planning.dataset import FINGERPRINT, RawDataset, prints_to_log
from nnunetv2_hiendmae.planning.readers import READER_KEY, BrokenCaseError, Reader, naming_reason
from nnunetv2_hiendmae.processes import in_processes

# in the preprocessed folder: a digest of the label files that were found good
CHECKED = "hiendmae_labels.sha256"
# label files that one process reads before a second one pays
_FILES_PER_PROCESS = 16


def check_labels(raw: RawDataset) -> None:
    """Checks what fine-tuning needs, without reading a file's voxels.

    Raises:
        UserError: the dataset names no foreground label, labels with gaps or regions that nnU-Net would predict
            wrongly, or training cases lack an image or their label file.
    """
    file = raw.folder / "dataset.json"
    if not set(raw.dataset_json["labels"]) - {"background", "ignore"}:
        raise UserError(f"{file} names no label besides background, needed labels to fine-tune")
    values = label_values(raw)
    if values != list(range(len(values))):
        told = f"{file} has the labels {some(values, 10)}, which nnU-Net needs without gaps: 0 to {len(values) - 1}"
        raise UserError(f"{told}; renumber them there and in the files of labelsTr")
    if faults := [*_label_rules(raw.dataset_json)]:
        raise UserError(f"{file}: {'; '.join(faults)}; mend it")
    if raw.missing_labels:
        raise UserError(
            f"{raw.name} has {len(raw.missing_labels)} of {len(raw.cases)} training cases without a label file, first "
            f"{raw.missing_labels[0]}; fine-tuning needs a label for every image, add them or move the images out of "
            f"{raw.folder / 'imagesTr'}"
        )
    if missing := [image for images in raw.cases.values() for image in images if not Path(image).is_file()]:
        raise UserError(f"{some(missing)}: missing or no file, needed the images of {raw.name}; put them there")
    needed = len(raw.channels)
    if other := [f"{case} ({len(images)})" for case, images in raw.cases.items() if len(images) != needed]:
        ending = raw.dataset_json["file_ending"]
        files = " and ".join(f"CASE_{i:04d}{ending}" for i in sorted({0, needed - 1}))
        told = f"{raw.name} has cases with other numbers of images than its {needed} channels: {some(other)}"
        raise UserError(f"{told}; add what is missing of {files}, or move the case out of {raw.folder / 'imagesTr'}")


def _label_rules(dataset_json: dict[str, Any]) -> Iterator[str]:
    """What nnU-Net asserts when training begins, and an order of regions with which it writes one over another."""
    labels, order = dataset_json["labels"], dataset_json.get("regions_class_order")
    values = {name: {*map(int, v if isinstance(v, list) else [v])} for name, v in labels.items()}
    if values.get("background") != {0}:
        yield '"background" must be among the labels, and 0'
    ignored = values.pop("ignore", None)
    highest = 1 + max(v for of_label in values.values() for v in of_label)
    if ignored is not None and labels["ignore"] != highest:
        yield f'"ignore" is {json.dumps(labels["ignore"])}, and must be the highest label, the number {highest}'
    if not any(isinstance(v, list) and len(v) > 1 for name, v in labels.items()):
        return
    regions = {name: of_region for name, of_region in values.items() if of_region != {0}}
    if order is None or len(order) != len(regions):
        had = "none" if order is None else json.dumps(order)
        yield f'the regions {", ".join(regions)} need as many numbers in "regions_class_order", got {had}'
        return
    for (name, of_region), value in zip(regions.items(), order, strict=True):
        if value not in of_region:
            told = f'"regions_class_order" gives {value} to the region {name}, which is {sorted(of_region)}'
            yield f"{told}: its numbers go with the regions in the order in which they stand"
    for (name, inner), (later, outer) in combinations(regions.items(), 2):
        if inner < outer:
            yield f"the region {later} stands behind {name}, which it holds, and would be written over it"


def label_values(raw: RawDataset) -> list[int]:
    """All values that dataset.json knows, in order; those of "ignore" and of regions too. Digits are numbers, as for
    nnU-Net."""
    values = raw.dataset_json["labels"].values()
    return sorted({int(v) for value in values for v in (value if isinstance(value, list) else [value])})


def check_label_files(raw: RawDataset, reader: Reader, num_processes: int) -> None:
    """Reads every label file, unless the same files were found good before: nnU-Net's training would end at the first
    unknown value.

    Raises:
        UserError: files cannot be read by `reader` or have values that dataset.json lacks; all of them are told.
    """
    known = frozenset(label_values(raw))
    files = [(file, info.st_size, info.st_mtime_ns) for file in raw.labels.values() for info in [Path(file).stat()]]
    checked = hashlib.sha256(json.dumps([reader.__name__, sorted(known), files]).encode()).hexdigest()
    record = nnunet_folder("nnUNet_preprocessed") / raw.name / CHECKED
    with suppress(OSError, ValueError):
        if record.read_text(encoding="utf-8").strip() == checked:
            return
    jobs = [partial(_label_fault, reader, known, file) for file in raw.labels.values()]
    processes = min(num_processes, len(jobs) // _FILES_PER_PROCESS)
    by_fault: dict[str, list[str]] = {}
    for file, fault in zip(raw.labels.values(), in_processes(jobs, processes, f"{raw.name} labels"), strict=True):
        if fault:
            by_fault.setdefault(fault, []).append(Path(file).name)
    if by_fault:
        # all of them: whoever mends files wants no second round
        told = "; ".join(f"{', '.join(names)}: {fault}" for fault, names in by_fault.items())
        told = f"labels of {raw.name} do not fit its dataset.json: {told}"
        raise UserError(f"{told}; relabel or mend them, or name the values there, then run: {_verify(raw)}")
    write_text(record, f"{checked}\n")


def extract_fingerprint(raw: RawDataset, reader: Reader, num_processes: int) -> None:
    """Writes nnU-Net's own fingerprint, of images and labels, over what is there.

    Raises:
        UserError: see `check_label_files`, an image or label cannot be read by `reader`, or the disk is full.
    """
    check_label_files(raw, reader, num_processes)
    folder = nnunet_folder("nnUNet_preprocessed") / raw.name
    with scratch_folder(folder) as scratch:
        try:
            with prints_to_log():
                extractor = DatasetFingerprintExtractor(raw.name, num_processes)
                extractor.dataset_json[READER_KEY] = reader.__name__
                extractor.show_progress_bar = sys.stderr.isatty()
                # nnU-Net writes in place, into the folder of this name
                extractor.dataset_name = f"{raw.name}/{scratch.name}"
                extractor.run(overwrite_existing=True)
        # whatever a reader raises about an image or a label
        except Exception as e:
            if is_disk_full(e):
                with telling_disk_errors(folder):
                    raise
            reason = (str(e).splitlines() or [type(e).__name__])[-1]
            faults = [fault for case in raw.cases if (fault := _case_fault(raw, reader, case))]
            told = f"nnU-Net cannot read {raw.name} with {reader.__name__}: {some(faults, separator='; ') or reason}"
            raise UserError(f"{told}; mend them, or run: {_verify(raw)}") from e
        write_with(folder / FINGERPRINT, partial(shutil.copyfile, scratch / FINGERPRINT))


def _verify(raw: RawDataset) -> str:
    return f"nnUNetv2_extract_fingerprint -d {dataset_id(raw.name)} --verify_dataset_integrity"


def _label_fault(reader: Reader, known: frozenset[int], file: str) -> str:
    """What is wrong with a label file; '' if nothing is."""
    try:
        with naming_reason(reader, [file]):
            seg, _ = reader().read_seg(file)
    except BrokenCaseError as e:
        return f"unreadable ({e})"
    unknown = sorted(set(pd.unique(seg.ravel()).tolist()) - known)
    return f"unknown {some(f'{v:g}' for v in unknown)}" if unknown else ""


def _case_fault(raw: RawDataset, reader: Reader, case: str) -> str:
    """Why image and label of a case cannot be used together; '' if they can."""
    images = raw.cases[case]
    try:
        with naming_reason(reader, images):
            shape = reader().read_images(list(images))[0].shape[1:]
        seg, _ = reader().read_seg(raw.labels[case])
    except BrokenCaseError as e:
        return f"{case} ({e})"
    return "" if seg.shape[1:] == shape else f"{case} (image of {shape} voxels, label of {seg.shape[1:]})"
