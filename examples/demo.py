"""``make demo``: the whole path on synthetic CT, through the same commands that a user types."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from pgl.cli import main as run_pgl

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def main(argv: list[str] | None = None) -> int:
    """Make, prepare, pretrain, draw and export; says at the end where everything lies."""
    parser = argparse.ArgumentParser(prog="python examples/demo.py", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything it makes")
    parser.add_argument("--cases", type=int, default=10, help="synthetic CTs to make")
    parser.add_argument("--config", type=Path, default=CONFIG, help="settings of the pretraining")
    options = parser.parse_args(argv)
    root = options.output
    images, cache, encoder = root / "ct" / "images", root / "cache", root / "encoder.pt"
    run = _new_run(root)
    steps = [
        ["phantom", "--output", str(root / "ct"), "--cases", str(options.cases)],
        ["prepare", str(images), "--output", str(cache)],
        ["pretrain", "--config", str(options.config), "--data", str(cache), "--output", str(run)],
        ["show", str(run)],
        ["export", str(run), "--output", str(encoder)],
    ]
    for words in steps:
        print(f"\n$ pgl {' '.join(words)}", flush=True)
        began = time.monotonic()
        code = run_pgl(words)
        if code != 0:
            print(f"demo: `pgl {words[0]}` failed with exit code {code}", file=sys.stderr)
            return code
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    print(_summary(root, images, run, encoder))
    return 0


def _new_run(root: Path) -> Path:
    number = 1
    while (root / f"run{number}").exists():
        number += 1
    return root / f"run{number}"


def _summary(root: Path, images: Path, run: Path, encoder: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    accuracy = [line["matching_accuracy"] for line in lines if line["kind"] == "validation"]
    chance = next(line["chance"] for line in lines if line["kind"] == "validation")
    pictures = run / "pictures"
    return f"""
Done. What to look at, in {root}:
  {images}
      synthetic CT (open it in any NIfTI viewer); its organs' labels are in ../labels
  {pictures / "views.png"}
      two views of one place, their shared region, and that region aligned out of both
  {pictures / "features.png"}
      the network's features there as colours, untrained and trained: one organ, one colour, in both views
  {pictures / "curves.png"}
      the loss falls ({losses[0]:.2f} -> {losses[-1]:.2f}); voxel matching accuracy rises
      ({accuracy[0]:.3f} untrained -> {accuracy[-1]:.3f}; guessing gives {chance:.4f})
  {encoder}
      the pretrained encoder: pgl.load_encoder({str(encoder)!r}) gives it back as a torch module"""


if __name__ == "__main__":
    sys.exit(main())
