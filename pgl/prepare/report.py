"""What a run of ``pgl prepare`` accepted, rejected and ignored, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pgl.files.atomic import write_json
from pgl.printing import printable

REPORT = "prepare_report.json"
REPORT_FORMAT = "pgl-prepare-report"


@dataclass(frozen=True)
class ReportEntry:
    """A file or DICOM series, and what became of it; ``case_id`` is its name in the cache, if it is there."""

    path: str
    reason: str
    case_id: str = ""

    def plain(self) -> dict[str, str]:
        return {key: value for key, value in vars(self).items() if value or key != "case_id"}


@dataclass
class PrepareReport:
    """What a run of :func:`prepare` did; the same as ``CACHE/prepare_report.json``.

    Attributes:
        output: the cache folder.
        accepted: volumes that are in the cache, written now or unchanged since an earlier run.
        rejected: files that should be CT and cannot be used.
        ignored: files that are no images, or that include and exclude leave out.
        labels: label maps that are in the cache.
        removed: number of cases taken out of the cache, because their source is gone or now left out.
        cases: number of cases in the cache, those of other sources in earlier runs included.
        seconds: time taken.
    """

    output: str
    accepted: list[ReportEntry] = field(default_factory=list)
    rejected: list[ReportEntry] = field(default_factory=list)
    ignored: list[ReportEntry] = field(default_factory=list)
    labels: list[ReportEntry] = field(default_factory=list)
    removed: int = 0
    cases: int = 0
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if anything was rejected, else 0."""
        return 1 if self.rejected else 0

    def reject(self, path: str, reason: str, console: Console) -> None:
        """Enter a rejected file or series, and name it on the terminal."""
        self.rejected.append(ReportEntry(path, reason))
        line = Text.assemble(("rejected ", "bold red"), printable(path), ": ", printable(reason))
        console.print(line, soft_wrap=True)

    def write(self) -> Path:
        """Write it to the cache folder."""
        path = Path(self.output) / REPORT
        names = ("accepted", "rejected", "ignored", "labels")
        lists = {name: [e.plain() for e in getattr(self, name)] for name in names}
        counts = {"cases": self.cases, "removed": self.removed, "seconds": round(self.seconds, 3)}
        write_json(path, {"format": REPORT_FORMAT, "version": 1, "output": self.output, **counts, **lists})
        return path
