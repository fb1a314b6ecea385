"""What ``benchmarks.pretrain`` shows of its record."""

from __future__ import annotations

from typing import Any


def missed(record: dict[str, Any]) -> list[str]:
    """The bars that are missed, in words."""
    missed = []
    over, bar = record["input_over_step"], record["input_bar"]
    if record["ratio"] > record["ratio_bar"]:
        missed.append(f"whole / bare is {record['ratio']:.3f}, the bar is {record['ratio_bar']}")
    if over < bar:
        missed.append(f"the input path is {over:.2f} × the step, the bar is {bar}")
    return missed


def print_tables(record: dict[str, Any]) -> None:
    """Print the record for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    whole, bare = record["whole_step_ms"], record["bare_network_step_ms"]
    low, high = record["ratio_quartiles_of_pairs"]
    console.print(
        f"{record['config']}, batch {record['batch_size']} × 2 views of {record['patch_size']}, "
        f"{record['precision']}, {record['workers']} reading processes, {record['machine']['device']}",
        highlight=False,
    )
    on_gpu = record["parts_host_ms"] != record["parts_ms"]
    table = Table(
        title="Where a step's time goes",
        caption="Each part by itself; reading is by one process or thread, beside the rest in a run. Bare "
        "network step: online encoder, projector, predictor forward and backward, target encoder and "
        "projector forward, of views on the device."
        + (" On the CPU: what launching a part takes." if on_gpu else ""),
    )
    for name in ("part", "ms", "of the bare network step", *(["on the CPU"] if on_gpu else [])):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, ms in record["parts_ms"].items():
        launching = [f"{record['parts_host_ms'][name]:.2f}"] if on_gpu else []
        table.add_row(name, f"{ms:.2f}", f"{ms / bare:.1%}", *launching)
    table.add_section()
    beside = ["read"] if record["workers"] else []
    total = sum(ms for name, ms in record["parts_ms"].items() if name not in beside)
    table.add_row("sum of the parts" + (" but reading" if beside else ""), f"{total:.2f}", "")
    table.add_row("whole step", f"{whole:.2f}", f"{record['ratio']:.3f} ×  ({low:.3f} to {high:.3f})")
    table.add_row("bare network step", f"{bare:.2f}", f"bar {record['ratio_bar']} ×")
    console.print(table)
    console.print(
        f"the step takes {record['samples_per_second']:.1f} samples/s, the input path alone gives "
        f"{record['input_samples_per_second']:.1f}: {record['input_over_step']:.1f} × "
        f"(bar {record['input_bar']})",
        highlight=False,
    )
    if record["peak_memory_gib"]:
        memory = Table(title="Peak GPU memory")
        memory.add_column("batch", justify="right")
        memory.add_column("GiB in use", justify="right")
        memory.add_column("GiB taken from the device", justify="right")
        for size, gib in record["peak_memory_gib"].items():
            if "why" in gib:
                memory.add_row(size, "does not fit", gib["why"])
            else:
                memory.add_row(size, f"{gib['allocated']:.1f}", f"{gib['reserved']:.1f}")
        console.print(memory)
