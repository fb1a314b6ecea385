"""Writes the results of a comparison: CSV, JSON, Markdown, plot, and one page that needs no network."""

from __future__ import annotations

import base64
import time
from importlib import resources
from typing import Any

import jinja2

import pgl
from pgl.comparison.classes import (
    CLASSES,
    COLUMNS,
    NOTE,
    TITLE,
    class_headings,
    class_rows,
    class_table,
)
from pgl.comparison.config import Comparison
from pgl.comparison.plot import draw
from pgl.comparison.tables import HEADINGS, Done, notes, rows_of, summarise, table_rows
from pgl.files.atomic import write_json, write_text
from pgl.runs.words import shown_value
from pgl.settings import flat, to_plain
from pgl.table_text import csv_text, markdown_table

TABLE, REPORT = "compare", "report.html"
_SET_BY_COMPARE = {"data", "output", "resume", "seed", "weights", "fraction"}


def write_results(comparison: Comparison, done: Done) -> dict[str, Any]:
    """Write compare.csv, .json, .md and .png, classes.csv and report.html of the fine-tunings that are done.

    Returns:
        The content of compare.json.
    """
    folder = comparison.folder
    rows, entries = rows_of(done), summarise(comparison, done)
    write_text(folder / f"{TABLE}.csv", csv_text(list(rows[0]), rows))
    classes = class_rows(done)
    write_text(folder / CLASSES, csv_text(COLUMNS, classes))
    content = {
        "format": "pgl-comparison",
        "version": 1,
        "pgl_ops_version": pgl.__version__,
        "complete": len(done) == len(comparison.tunings),
        "planned": len(comparison.tunings),
        "test_cases": done[0][1]["test"],
        "runs": rows,
        "table": entries,
        "classes": classes,
    }
    write_json(folder / f"{TABLE}.json", content)
    by_class = class_table(comparison, classes)
    write_text(folder / f"{TABLE}.md", _markdown(comparison, done, entries, by_class))
    draw(entries, comparison.settings.initialisations, folder / f"{TABLE}.png")
    write_text(folder / REPORT, _page(comparison, done, entries, by_class))
    return content


def _markdown(
    comparison: Comparison, done: Done, entries: list[dict[str, Any]], by_class: list[list[str]]
) -> str:
    told = "".join(f"- {note}\n" for note in notes(comparison, done))
    table = markdown_table(HEADINGS, table_rows(entries))
    second = markdown_table(class_headings(comparison), by_class)
    return f"{table}\n{told}\n## {TITLE}\n\n{second}\n- {NOTE}\n"


def _of_pretrainings(comparison: Comparison) -> dict[str, Any]:
    """The settings that all pretrainings share; those that PGL alone has say so."""
    by_method = {method: flat(to_plain(run)) for (method, _), run in comparison.pretrainings.items()}
    shown = by_method.get("pgl", next(iter(by_method.values())))
    return {
        key if all(named[key] == value for named in by_method.values()) else f"{key} (pgl alone)": value
        for key, value in shown.items()
        # What makes the method, and the intensities that belong to it.
        if key != "method.name" and not key.startswith("intensity.")
    }


def _page(
    comparison: Comparison, done: Done, entries: list[dict[str, Any]], by_class: list[list[str]]
) -> str:
    settings, runs = comparison.settings, rows_of(done)
    plot = base64.b64encode((comparison.folder / f"{TABLE}.png").read_bytes()).decode("ascii")
    tuning = flat(to_plain(comparison.tunings[0].config))
    shown = {"Fine-tuning": {**tuning, "fresh_stages": comparison.fresh_stages}}
    if comparison.pretrainings:
        shown = {"Pretraining": _of_pretrainings(comparison), **shown}
    template = (resources.files("pgl.comparison") / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        folder=comparison.folder.resolve().name,
        carries_decoder=comparison.carries_decoder,
        complete=len(done) == len(comparison.tunings),
        done=len(done),
        planned=len(comparison.tunings),
        starts=", ".join(settings.initialisations),
        fractions=", ".join(f"{fraction:g}" for fraction in settings.starts()),
        seeds=", ".join(map(str, settings.seeds)),
        test=done[0][1]["test"],
        headings=HEADINGS,
        table=table_rows(entries),
        notes=notes(comparison, done),
        plot=plot,
        class_headings=class_headings(comparison),
        class_table=by_class,
        class_title=TITLE,
        class_note=NOTE,
        run_headings=list(runs[0]),
        runs=[[shown_value(value) for value in row.values()] for row in runs],
        settings={
            title: {k: shown_value(v) for k, v in named.items() if k not in _SET_BY_COMPARE}
            for title, named in shown.items()
        },
        version=pgl.__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")
