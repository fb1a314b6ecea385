"""Tables as text: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pgl.printing import printable


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row under those columns; an empty field where a value is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; names from strangers change neither its columns nor a terminal that shows it."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(printable(cell).replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
