"""A SOURCE in which nothing is found may lie on a disk that is not mounted: its cases stay."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from rich.console import Console

from pgl.cache.volumes import VolumeCache
from pgl.prepare.report import PrepareReport
from pgl.prepare.run import PrepareSettings, prepare
from tests.pgl.ct_files import body, write


def run(sources: list[Path], cache: Path) -> tuple[PrepareReport, str]:
    """The report, and what stood on the terminal."""
    terminal = io.StringIO()
    settings = PrepareSettings((3.0, 2.0, 2.0), (8, 16, 16), workers=1)
    return prepare(sources, cache, settings, Console(file=terminal)), terminal.getvalue()


def sources_of(cache: Path) -> list[str]:
    return sorted(case.source for case in VolumeCache(cache).cases)


def test_cases_of_an_empty_source_stay_beside_those_of_another(tmp_path):
    here, disk, cache = tmp_path / "here", tmp_path / "disk", tmp_path / "cache"
    files = [here / "a.nrrd", here / "b.nrrd", disk / "c.nrrd", disk / "deep" / "d.nrrd"]
    for seed, path in enumerate(files):
        write(path, body(seed=seed))
    run([here, disk], cache)
    files[1].unlink()
    shutil.move(disk, tmp_path / "away")
    disk.mkdir()
    (disk / "README.txt").write_text("Nothing is mounted here.")

    report, said = run([here, disk], cache)

    # b is gone from a SOURCE with others.
    assert (report.removed, report.cases, report.exit_code) == (1, 3, 0)
    assert sources_of(cache) == [str(files[2]), str(files[3]), str(files[0])]
    expected = f"no volume was found in SOURCE {disk}, so the 2 cases made from it stay in the cache"
    assert f"WARNING {expected}: is its disk mounted?" in said

    disk.joinpath("README.txt").unlink()
    disk.rmdir()
    shutil.move(tmp_path / "away", disk)
    files[2].unlink()
    report, said = run([here, disk], cache)
    assert (report.removed, report.cases) == (1, 2) and "WARNING" not in said


def test_cases_of_an_empty_source_inside_another_stay(tmp_path):
    data, disk, cache = tmp_path / "data", tmp_path / "data" / "disk", tmp_path / "cache"
    write(data / "a.nrrd")
    write(disk / "b.nrrd", body(seed=1))
    run([data], cache)
    (disk / "b.nrrd").unlink()
    report, said = run([data, disk], cache)
    assert report.removed == 0 and f"SOURCE {disk}, so the 1 case made from it stays" in said
    assert run([data], cache)[0].removed == 1


def test_a_source_that_is_reached_through_another_is_not_empty(tmp_path):
    data, link, cache = tmp_path / "data", tmp_path / "link", tmp_path / "cache"
    write(data / "a.nrrd")
    write(data / "b.nrrd", body(seed=1))
    link.symlink_to("data")
    run([link], cache)
    (data / "b.nrrd").unlink()
    report, said = run([data, link], cache)
    assert (report.removed, report.cases) == (1, 1) and "WARNING" not in said
