"""What would stop a fine-tuning at its start, found before anything is pretrained for it."""

from __future__ import annotations

from collections.abc import Iterable

from pgl.downstream.config import FinetuneConfig
from pgl.downstream.labels import LabelledCache, make_task
from pgl.downstream.setup import check_patch, description, labelled_cache
from pgl.files.lock import reading


def check_beforehand(runs: Iterable[tuple[str, FinetuneConfig]]) -> None:
    """Refuse fine-tunings that their data, their split or their network would stop.

    Args:
        runs: name of the task ("" if there is one alone) and settings, with ``encoder`` given.

    Raises:
        FileNotFoundError: there is no such cache.
        InUse: ``pgl prepare`` is changing it.
        ValueError: it has no labels, damaged ones, another spacing, not the classes of a task, or no case for
            a fraction; or the patch does not fit the network.
    """
    caches: dict[str, LabelledCache] = {}
    for task, config in runs:
        where = str(config.data)
        try:
            if where not in caches:
                with reading(config.data):
                    caches[where] = labelled_cache(config)
            cache = caches[where]
            make_task(cache.records, config.classes, where)
            cache.split(config.split, config.fraction, config.seed)
            check_patch(config, description(config, None))
        except ValueError as error:
            raise ValueError(f"task {task}: {error}" if task else str(error)) from error
