"""How long tests wait for other processes to get somewhere; it is no result, since a machine may be busy."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE_S = 240.0


def wait_until(happened: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait for something; fail if ``process``, which shall do it, ends before, or nothing happens."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert process is None or process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.02)
