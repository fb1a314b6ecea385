"""What ``benchmarks.ops`` shows of its record: a line a row, a table, a bar chart."""

from __future__ import annotations

import sys
from pathlib import Path


def summary(row: dict) -> str:
    """A row in one line."""
    ratios = ", ".join(f"{ratio:.1f}x {peer}" for peer, ratio in row["ratio"].items())
    return f"{row['workload']} {row['direction']} {row['dtype']} {row['layout']}: {ratios}"


def print_table(record: dict) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    head = record["header"]
    torchvision = "" if head["torchvision_ops"] else "; torchvision's compiled ops are not available here"
    title = (
        f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['commit']}{torchvision}"
    )
    table = Table(title=title)
    for name in ("workload", "direction", "dtype", "layout", "ms", "faster than", "bandwidth", "extra MiB"):
        table.add_column(name, justify="right" if name in ("ms", "bandwidth", "extra MiB") else "left")
    for row in record["rows"]:
        extra = row["extra_bytes"]["ours"]
        table.add_row(
            row["workload"],
            row["direction"],
            row["dtype"],
            row["layout"],
            f"{row['milliseconds']:.3f}",
            ", ".join(f"{peer} {ratio:.1f}x" for peer, ratio in row["ratio"].items()),
            f"{row['share_of_copy_bandwidth']:.0%}",
            f"{extra / 2**20:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def draw(record: dict, path: Path) -> None:
    """The ratios as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{row['workload']} {row['direction']} {row['dtype']} {row['layout']}", peer, ratio)
        for row in record["rows"]
        for peer, ratio in row["ratio"].items()
    ]
    peers = sorted({peer for _, peer, _ in bars})
    colours = dict(
        zip(peers, ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"], strict=False)
    )
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(bars) + 1.5), layout="constrained")
    axes.barh(
        [f"{name} vs {peer}" for name, peer, _ in bars],
        [r for *_, r in bars],
        color=[colours[p] for _, p, _ in bars],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer (paired medians)")
    axes.tick_params(labelsize=7)
    head = record["header"]
    axes.set_title(f"{head['device']}, {head['threads']} threads, torch {head['torch']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
