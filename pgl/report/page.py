"""``pgl report``: collects what the page says, and fills the template.

``page.html`` is the page, ``page.css`` its looks, ``page.js`` draws curves and scrolls slices. All three,
and the data, go into one file. Its content security policy forbids every request, so it never asks the
network for anything, and text from files is escaped by Jinja2 or set as text, never as markup.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

import pgl
from pgl.config import PretrainConfig
from pgl.files.atomic import write_text
from pgl.report.curves import charts_of_run, charts_of_runs
from pgl.report.pairs import Pictures, pictures_of
from pgl.runs.facts import RunFacts, read_run
from pgl.runs.words import figures, names_of, shown_value, summary
from pgl.settings import defaults

REPORT = "report.html"
_PAIRS = 4


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    pairs: int = _PAIRS,
    data: str | os.PathLike[str] | None = None,
) -> tuple[Path, list[str]]:
    """Write the page of a run, or of several ones compared.

    Args:
        runs: a folder of ``pgl pretrain``, or several; they may still be going on.
        output: the file; RUN/report.html unless given, which it must be for several runs.
        pairs: view pairs to show of a single run; 0 for none, which also needs no cache.
        data: the cache of a single run, if it was moved.

    Returns:
        The file, and what the page lacks, in words. A page without its pictures, because the cache or a
        checkpoint cannot be read, is still a page; it says so itself, too.

    Raises:
        FileNotFoundError: a folder is no run.
        ValueError: nothing was measured yet, a file is damaged, or an argument is wrong.
    """
    folders = [Path(runs)] if isinstance(runs, str | os.PathLike) else [Path(run) for run in runs]
    if not folders:
        raise ValueError("runs must name at least one run, got none")
    if pairs < 0:
        raise ValueError(f"pairs must be at least 0, got {pairs}")
    if len(folders) > 1 and output is None:
        raise ValueError("output must say where the page of several runs goes, such as compared.html")
    facts = [read_run(folder) for folder in folders]
    for run in facts:
        if not run.train and not run.validation:
            raise ValueError(
                f"{run.folder}: nothing was measured yet; let the run do a few steps, then ask again"
            )
    path = Path(output) if output is not None else folders[0] / REPORT
    lacking: list[str] = []
    page = _page_of_run(facts[0], pairs, data, lacking) if len(facts) == 1 else _page_of_runs(facts)
    write_text(path, page)
    return path, lacking


def report_line(run: str | os.PathLike[str]) -> str:
    """Write RUN/report.html and say so in one line; for the end of a run, which it never fails.

    Whatever goes wrong here, the run is done and its checkpoints are whole: the line tells the reason.
    """
    try:
        path, lacking = write_report(run)
    except Exception as error:
        return f"no {REPORT}: {' '.join(str(error).split())}; `pgl report {run}` tries again"
    return f"report: {path}" + "".join(f" ({reason})" for reason in lacking)


def _page_of_run(run: RunFacts, pairs: int, data: str | os.PathLike[str] | None, lacking: list[str]) -> str:
    pictures: Pictures | None = None
    if pairs:
        try:
            pictures = pictures_of(run.folder, pairs, data)
        except (OSError, ValueError) as error:
            lacking.append(f"without pictures: {' '.join(str(error).split())}")
    return _fill(
        "page.html",
        title=f"Pretraining {run.name}",
        summary=summary(run),
        figures=figures(run),
        warnings=run.warnings(),
        charts=charts_of_run(run),
        pictures=pictures,
        lacking=lacking,
        validation=[{key: shown_value(line.get(key)) for key in _MEASURED} for line in run.validation],
        measured=_MEASURED,
        settings=_settings(run),
        starts=[{key: shown_value(value) for key, value in start.items()} for start in run.starts],
        cases=_cases(run),
        runs=None,
        differing=None,
    )


def _page_of_runs(runs: Sequence[RunFacts]) -> str:
    names = names_of(runs)
    return _fill(
        "page.html",
        title=f"{len(runs)} pretraining runs compared",
        summary=None,
        figures=None,
        warnings=[
            f"{name}: {text}" for run, name in zip(runs, names, strict=True) for text in run.warnings()
        ],
        charts=charts_of_runs(runs, names),
        pictures=None,
        lacking=[],
        validation=None,
        measured=None,
        settings=None,
        starts=None,
        cases=None,
        runs=[{"run": name, **dict(figures(run))} for run, name in zip(runs, names, strict=True)],
        differing=_differing(runs),
    )


_MEASURED = (
    "step", "matching_accuracy", "projected_matching_accuracy", "feature_spread", "projected_spread",
    "feature_rank", "loss",
)  # fmt: skip


def _settings(run: RunFacts) -> list[dict[str, Any]]:
    usual = defaults(PretrainConfig)
    return [
        {
            "key": key,
            "value": shown_value(value),
            "default": shown_value(usual[key]) if key in usual else "",
            "changed": key in usual and value != usual[key],
        }
        for key, value in run.settings.items()
    ]


def _differing(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [shown_value(run.settings.get(key)) for run in runs]
        if key not in ("output", "resume") and len(set(values)) > 1:
            rows.append({"key": key, "values": values})
    return rows


def _cases(run: RunFacts) -> dict[str, list[str]]:
    cases = run.environment.get("cases")
    if not isinstance(cases, dict):
        return {}
    return {
        str(side): [str(name) for name in names] for side, names in cases.items() if isinstance(names, list)
    }


def _fill(template: str, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pictures: Pictures | None = content.pop("pictures")
    shown = {
        "charts": content.pop("charts"),
        "pairs": pictures.pairs if pictures else [],
        "slab": pictures.slab if pictures else None,
        "networks": pictures.networks if pictures else [],
    }
    page = environment.get_template(template).render(
        **content,
        shown=shown,
        # Our own files: they go in as they are.
        style=jinja2.utils.markupsafe.Markup(_text("page.css")),
        script=jinja2.utils.markupsafe.Markup(_text("page.js")),
        version=pgl.__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    # Names of files that are no valid UTF-8 come as lone surrogates, which no UTF-8 page can hold.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(name: str) -> str:
    return (resources.files("pgl.report") / name).read_text(encoding="utf-8")
