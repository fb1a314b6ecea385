"""What the manifest says about the label of a case, and the checks on what is read from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pgl.cache.manifest import REBUILD, CaseRecord, triple

LABELS_FOLDER = "labels"


@dataclass(frozen=True)
class LabelRecord:
    """The label map of one case, on the case's grid.

    Attributes:
        case_id: the case that it belongs to.
        subject: the case's name in its data set, such as ``liver_0``; splits and predictions go by it.
        file: its volume, relative to the cache folder: uint8 [D, H, W].
        shape: voxels (D, H, W), the same as the case's.
        sha256: checksum of the file.
        case_sha256: checksum of the image that it was made for.
        classes: number → name of the declared classes; empty if none were declared.
        voxels: number → voxels of each class on the common grid.
        source: the label file it was made from.
        key: fingerprint of source and settings, by which a later run knows whether it is still current.
    """

    case_id: str
    subject: str
    file: str
    shape: tuple[int, int, int]
    sha256: str
    case_sha256: str
    classes: dict[int, str] = field(default_factory=dict)
    voxels: dict[int, int] = field(default_factory=dict)
    source: str = ""
    key: str = ""


def plain_label(record: LabelRecord) -> dict[str, Any]:
    """The record as JSON holds it: numbers of classes are text there."""
    plain = asdict(record)
    for name in ("classes", "voxels"):
        plain[name] = {str(number): value for number, value in plain[name].items()}
    return plain


def parse_label(entry: Any, where: Path) -> LabelRecord:
    """The record of an entry.

    Raises:
        ValueError: it is damaged, or points outside the cache.
    """
    try:
        record = LabelRecord(
            case_id=str(entry["case_id"]),
            subject=str(entry["subject"]),
            file=str(entry["file"]),
            shape=triple(entry["shape"], int),
            sha256=str(entry["sha256"]),
            case_sha256=str(entry["case_sha256"]),
            classes={int(number): str(name) for number, name in entry["classes"].items()},
            voxels={int(number): int(count) for number, count in entry["voxels"].items()},
            source=str(entry.get("source", "")),
            key=str(entry.get("key", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} has a damaged label entry ({error!r}); {REBUILD}") from error
    if record.file != label_file(record.case_id) or "/" in record.case_id or "\\" in record.case_id:
        raise ValueError(
            f"{where}: the label of case {record.case_id!r} is not {label_file(record.case_id)!r} but "
            f"{record.file!r}; refused"
        )
    return record


def label_file(case_id: str) -> str:
    """Where a case's label lies in the cache."""
    return f"{LABELS_FOLDER}/{case_id}.b2nd"


def finished_labels(folder: Path, cases: Sequence[CaseRecord]) -> list[LabelRecord]:
    """The labels in a cache's folder that are whole and belong to the cases as they are now, in their
    order."""
    found = []
    for case in cases:
        sidecar = folder / LABELS_FOLDER / f"{case.case_id}.json"
        try:
            record = parse_label(json.loads(sidecar.read_text("utf-8")), sidecar)
        except (OSError, ValueError):
            continue
        current = (record.case_id, record.case_sha256, record.shape) == (
            case.case_id,
            case.sha256,
            case.shape,
        )
        if current and (folder / record.file).is_file():
            found.append(record)
    return found


def labels_section(folder: Path, cases: Sequence[CaseRecord]) -> list[dict[str, Any]]:
    """The manifest's list ``labels``."""
    return [plain_label(record) for record in finished_labels(folder, cases)]


def remove_label(folder: Path, case_id: str) -> None:
    """Delete a case's label, if it is there."""
    for name in (f"{case_id}.json", f"{case_id}.b2nd"):
        (folder / LABELS_FOLDER / name).unlink(missing_ok=True)
