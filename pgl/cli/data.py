"""The words of ``pgl phantom`` and ``pgl prepare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pgl.labels.settings import LabelSettings
    from pgl.prepare.run import PrepareSettings


def phantom_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl phantom``."""
    from pgl.phantom import make_phantoms

    parser.add_function_arguments(make_phantoms, skip={"progress"})


def phantom(arguments: Namespace) -> int:
    """Draw the phantoms and say where they are."""
    from rich.console import Console
    from rich.progress import Progress

    from pgl.phantom import make_phantoms

    with Progress(console=Console(stderr=True)) as progress:

        def show(done: int, total: int) -> None:
            if not progress.tasks:
                progress.add_task("drawing phantoms", total=total)
            progress.update(progress.tasks[0].id, completed=done)

        images = make_phantoms(**vars(arguments), progress=show)
    folder = images[0].parent
    say(f"{folder}: {len(images)} CT images; their labels lie in {folder.parent / 'labels'}")
    return 0


def prepare_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl prepare``."""
    from pgl.labels.settings import LabelSettings
    from pgl.prepare.run import PrepareSettings

    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folders, searched to the bottom, and files: NIfTI, NRRD, MetaImage, and DICOM series",
    )
    parser.add_argument("--output", required=True, metavar="CACHE", help="the cache folder, made or updated")
    parser.add_class_arguments(PrepareSettings)
    parser.add_class_arguments(LabelSettings)


def check_prepare(arguments: Namespace) -> None:
    """Raise ValueError, which names the setting, for what cannot be."""
    _settings(arguments)


def prepare(arguments: Namespace) -> int:
    """Make or update the cache; 1 if something was rejected."""
    from pgl.prepare.run import prepare

    settings, labels = _settings(arguments)
    return prepare(arguments.source, arguments.output, settings, labels=labels).exit_code


def _settings(arguments: Namespace) -> tuple[PrepareSettings, LabelSettings]:
    from dataclasses import fields

    from pgl.labels.settings import LabelSettings
    from pgl.prepare.run import PrepareSettings

    def of(kind: type) -> dict[str, Any]:
        return {field.name: arguments[field.name] for field in fields(kind)}

    return PrepareSettings(**of(PrepareSettings)), LabelSettings(**of(LabelSettings))
