"""The methods of the trainer by their names in ``method.name``."""

from __future__ import annotations

from pgl.config import PretrainConfig
from pgl.methods.base import Method
from pgl.methods.byol import BYOL
from pgl.methods.genesis import Genesis
from pgl.methods.pgl import PGL
from pgl.networks import seeded_module

METHODS: dict[str, type[PGL] | type[BYOL] | type[Genesis]] = {"pgl": PGL, "byol": BYOL, "genesis": Genesis}


def build_method(config: PretrainConfig) -> Method:
    """The networks of a run at its start. The encoder's weights follow from ``seed`` and ``encoder`` alone,
    so they are the same for every method."""
    kind = METHODS[config.method.name]
    return seeded_module(config.seed, lambda: kind(config.encoder, config.method, config.train.recompute))
