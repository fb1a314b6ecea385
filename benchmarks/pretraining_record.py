"""``python -m benchmarks.pretraining_record RUN --output DIR``: a run's curve and table, to be committed.

Draws the pictures of the run and writes ``README.md`` with the measured values, and ``metrics.jsonl`` and
``config.yaml`` as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Write the record; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining_record", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of `pgl pretrain`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the record")
    parser.add_argument("--title", default="Pretraining", help="first line of the page")
    parser.add_argument(
        "--command", nargs="+", default=[], help="commands that made the run, shown on the page"
    )
    parser.add_argument("--note", default="", help="a paragraph at the end of the page")
    options = parser.parse_args(argv)
    from pgl.pictures.show import show

    pictures = {path.name: path for path in show(options.run)}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("curves.png", "features.png", "views.png"):
        shutil.copyfile(pictures[name], options.output / name)
    shutil.copyfile(options.run / "metrics.jsonl", options.output / "metrics.jsonl")
    settings = (options.run / "config.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    places = ("data:", "output:")  # folders of one machine
    kept = [line for line in settings if not line.startswith(places)]
    (options.output / "config.yaml").write_text("".join(kept), encoding="utf-8")
    text = page(options.run, options.title, options.command)
    (options.output / "README.md").write_text(
        text + (f"\n{options.note}\n" if options.note else ""), encoding="utf-8"
    )
    print(options.output / "README.md")
    return 0


def page(run: Path, title: str, commands: list[str]) -> str:
    """The record as Markdown."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    measured = [line for line in lines if line["kind"] == "validation"]
    first, last = measured[0], measured[-1]
    start = environment["starts"][-1]
    cases = environment["cases"]
    untrained, trained = first["matching_accuracy"], last["matching_accuracy"]
    rows = [
        f"| {m['step']} | {m['matching_accuracy']:.4f} | {m['matching_accuracy'] / untrained:.2f} "
        f"| {m['projected_matching_accuracy']:.4f} | {m['feature_spread']:.3f} | {m['loss']:.3f} |"
        for m in measured
    ]
    shown = "\n".join(commands)
    return f"""# {title}

```
{shown}
```

{start["time"][:10]}, pgl-ops {start["pgl_ops"]}, torch {start["torch"]}, {start["device"]}, \
{start["cpu_threads"]} CPU threads; {len(cases["training"])} training and {len(cases["validation"])} \
validation cases. Settings: `config.yaml`, every value: `metrics.jsonl`.

Voxel matching accuracy on the validation pairs rises from {untrained:.4f} (untrained, same seed) to \
{trained:.4f}: **{trained / untrained:.2f} times**. Guessing gives {first["chance"]:.4f}. The spread of the
normalised features goes from {first["feature_spread"]:.3f} to {last["feature_spread"]:.3f} (1 is isotropic,
0 collapsed).

![curves](curves.png)

| step | matching accuracy | times untrained | of the projections | feature spread | validation loss |
|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
