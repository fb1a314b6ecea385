"""``make demo``: the script behind it runs to its end, smaller, and leaves what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_the_demo_runs_all_stages(tmp_path):
    pytest.importorskip("SimpleITK")
    settings = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text("utf-8"))
    settings["train"] |= {"steps": 2}
    settings["validation"] |= {"pairs": 2}
    settings["optimizer"] |= {"warmup_steps": 1}
    (tmp_path / "smaller.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = ["--output", "demo", "--cases", "2", "--config", "smaller.yaml"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo" / "encoder.pt").is_file()
    pictures = {path.name for path in (tmp_path / "demo" / "run1" / "pictures").iterdir()}
    assert pictures == {"curves.png", "views.png", "features.png"}
    for stage in ("phantom", "prepare", "pretrain", "show", "export"):
        assert f"$ pgl {stage} " in done.stdout
