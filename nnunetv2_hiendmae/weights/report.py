"""What happened to every tensor when weights were read."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

STATUSES = ("loaded", "adapted", "dropped")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its name in the source, where it went (None when dropped), and why it changed or was dropped."""

    source: str
    target: str | None
    status: str
    detail: str = ""


@dataclass(frozen=True)
class LoadReport:
    """Account of every tensor of the source. A tensor that the target needs and does not get is an error,
    never a line in here."""

    records: tuple[TensorRecord, ...]

    def with_status(self, status: str) -> list[TensorRecord]:
        """Records of one status: "loaded", "adapted" or "dropped"."""
        return [r for r in self.records if r.status == status]

    def summary(self) -> str:
        """One line of counts."""
        counts = Counter(r.status for r in self.records)
        return ", ".join(f"{counts[s]} {s}" for s in STATUSES)

    def text(self) -> str:
        """The summary, then a line for every tensor that was adapted or dropped."""
        changed = [r for r in self.records if r.status != "loaded"]
        return "\n".join([self.summary(), *(f"  {r.status}: {r.source} ({r.detail})" for r in changed)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {s: [vars(r) for r in self.with_status(s)] for s in STATUSES}
