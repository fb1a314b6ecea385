"""What a process and its children take, read from /proc (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all its descendants, itself first."""
    members = [pid]
    try:
        tasks = [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return members
    for task in tasks:
        try:
            text = Path(f"/proc/{pid}/task/{task}/children").read_text("ascii")
        except OSError:
            continue
        for child in text.split():
            members += family(int(child))
    return members


def resident_mb(pid: int) -> float:
    """Resident memory in MiB; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def open_files(pid: int) -> int:
    """How many file descriptors are open; 0 if the process is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def waited_s(pid: int) -> float | None:
    """Seconds that the main thread was ready to run but had no core; None where the kernel does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
