"""nnU-Net datasets of a task, made of links to the files of others."""

import json
from collections.abc import Iterable
from pathlib import Path

from protocol import Pool, Task


def make_task(task: Task, data: Path, raw: Path, preprocessed: Path) -> None:
    """Its labelled dataset with all cases in imagesTr and labelsTr and folds that name each one's part, and its pools.

    Args:
        data: folder of the datasets that the images are taken from.
        raw, preprocessed: nnU-Net's folders, to be written to.
    """
    source = _dataset(data, task.number)
    tests = [case for cases in task.test.values() for case in cases]
    target = raw / source.name
    _link(source, target, (*task.train, *tests), task.channel, labelled=True)
    folds = [
        {"train": [task.tuning[0]], "val": [task.tuning[1]]},
        {"train": [task.train[0]], "val": tests},
        {"train": list(task.train), "val": tests},
    ]
    folder = preprocessed / source.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "splits_final.json").write_text(json.dumps(folds, indent=2) + "\n")
    for pool in (task.pool, *task.pools.values()):
        _link(_dataset(data, pool.source), raw / pool_name(pool), pool.cases, task.channel, labelled=False)


def pool_name(pool: Pool) -> str:
    """Of its dataset."""
    return f"Dataset{pool.number:03d}_EvidencePool"


def _dataset(folder: Path, number: int) -> Path:
    found = sorted(folder.glob(f"Dataset{number:03d}_*"))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} datasets with number {number}, needed one")
    return found[0]


def _link(source: Path, target: Path, cases: Iterable[str], channel: str, labelled: bool) -> None:
    description = json.loads((source / "dataset.json").read_text())
    ending = description["file_ending"]
    for case in cases:
        parts = [("images", f"{case}_0000{ending}"), *([("labels", f"{case}{ending}")] if labelled else ())]
        for kind, name in parts:
            found = [file for part in ("Tr", "Ts") if (file := source / f"{kind}{part}" / name).is_file()]
            if len(found) != 1:
                raise SystemExit(f"{source} holds {len(found)} files {kind}Tr/{name} and {kind}Ts/{name}, needed one")
            link = target / f"{kind}Tr" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(found[0].resolve())
    labels = description["labels"] if labelled else {"background": 0}
    known = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": len(list((target / "imagesTr").iterdir())),
    }
    (target / "dataset.json").write_text(json.dumps({**known, "file_ending": ending}, indent=2) + "\n")
