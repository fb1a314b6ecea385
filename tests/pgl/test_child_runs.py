"""Runs in processes of their own: a signal reaches them whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pgl import child_runs


@pytest.mark.parametrize("when", ["before the start", "after the start"])
def test_a_signal_around_the_start_is_handed_on_and_does_not_end_this_process(monkeypatch, when):
    started = []

    def popen(words, **keywords):
        if when == "before the start":
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **keywords))
        if when == "after the start":
            os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    class Subprocess:
        Popen = staticmethod(popen)

    monkeypatch.setattr(child_runs, "subprocess", Subprocess)
    assert child_runs.run_pgl(["status", "nothing"]) == -signal.SIGTERM
    assert started[0].poll() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
