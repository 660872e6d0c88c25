"""What happened to every tensor when weights were read."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nnunetv2_hiendmae.errors import printable

STATUSES = ("loaded", "adapted", "dropped", "fresh")
# more records than this with one reason become one line of `LoadReport.text`
_MAX_LINES = 3


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its name in the source (None when fresh), where it went (None when dropped), and why it changed,
    was dropped, or was not in the source and keeps its start value."""

    source: str | None
    target: str | None
    status: str = "loaded"
    detail: str = ""

    @property
    def name(self) -> str:
        """In the source, or in the target where it is fresh."""
        return self.source or self.target or ""

    @property
    def label(self) -> str:
        """`source → target`, or the one name that there is; safe to print."""
        if self.source and self.target and self.source != self.target:
            return f"{printable(self.source)} → {printable(self.target)}"
        return printable(self.name)

    def changed(self, detail: str) -> "TensorRecord":
        """After something more was done to the tensor; "" for nothing."""
        if not detail:
            return self
        status = "adapted" if self.status == "loaded" else self.status
        return replace(self, status=status, detail=f"{self.detail}; {detail}" if self.detail else detail)


@dataclass(frozen=True)
class LoadReport:
    """Account of every tensor of the source and of the target. A tensor that the target needs and does not get is an
    error, never a line in here. `entries`: what else the file held, which is no tensor: (name, what it is).
    """

    records: tuple[TensorRecord, ...]
    entries: tuple[tuple[str, str], ...] = ()

    def with_status(self, status: str) -> list[TensorRecord]:
        """Records of one status: "loaded", "adapted", "dropped" or "fresh"."""
        return [r for r in self.records if r.status == status]

    def summary(self) -> str:
        """One line of counts; "fresh" only where there is any."""
        counts = Counter(r.status for r in self.records)
        return ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s] or s != "fresh")

    def text(self) -> str:
        """The summary, then what was adapted, dropped or kept fresh; many tensors with one reason share a line."""
        groups: dict[tuple[str, str], list[TensorRecord]] = {}
        for record in self.records:
            if record.status != "loaded":
                groups.setdefault((record.status, record.detail), []).append(record)
        lines = [self.summary()]
        for (status, detail), records in groups.items():
            lines += [f"  {status}: {label} ({printable(detail)})" for label in _labels(records)]
        return "\n".join([*lines, *(f"  not read: {printable(k)} ({printable(what)})" for k, what in self.entries)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with every tensor."""
        listed = {s: [vars(r) for r in self.with_status(s)] for s in STATUSES}
        return {**listed, "not_read": dict(self.entries)}


def _labels(records: list[TensorRecord]) -> list[str]:
    """What records of one reason are called: each, or those of one part by what their names share."""
    if len(records) <= _MAX_LINES:
        return [r.label for r in records]
    by_root: dict[str, list[str]] = {}
    for record in records:
        parts = record.name.split(".")
        # sorted under the first part that says something
        root = next((p for p in parts if p not in ("module", "backbone", "_orig_mod")), parts[0])
        by_root.setdefault(root, []).append(record.name)
    if len(by_root) > _MAX_LINES:
        return [f"{len(records)} tensors, {records[0].label} … {records[-1].label}"]
    labels = []
    for names in by_root.values():
        columns = zip(*(name.split(".") for name in names), strict=False)
        shared = (same[0] for same in takewhile(lambda parts: len(set(parts)) == 1, columns))
        labels.append(names[0] if len(names) == 1 else f"{len(names)} tensors {'.'.join([*shared, '*'])}")
    return [printable(label) for label in labels]
