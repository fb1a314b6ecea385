"""``fresh_stages``: the deepest pretrained stages of an encoder start at random all the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.encoder_settings import chosen_levels


def check_with_file(config: FinetuneConfig, export: dict[str, Any], stages: int) -> None:
    """Refuse a weights file, before anything is done with it, whose stages cannot be left out as asked.

    Args:
        config: of the fine-tuning.
        export: the content of its weights file.
        stages: of the network that is fine-tuned.

    Raises:
        ValueError: the file has fewer trained stages, the network none of these, or the file contradicts
            itself.
    """
    if not config.fresh_stages:
        return
    from pgl.export import check_networks  # not above: the settings of a comparison need no torch

    check_networks(export, config.weights)
    trained = export["network"]["feature_level"] + 1
    if config.fresh_stages > trained:
        raise ValueError(
            f"fresh_stages must be at most {trained}, the encoder's stages that were pretrained in "
            f"{config.weights}, got {config.fresh_stages}"
        )
    first = stages_left_out(config, export).start
    if first >= stages:
        raise ValueError(
            f"fresh_stages {config.fresh_stages} leaves out stages from {first} on of {config.weights}, but "
            f"the network has {stages} stages, 0 to {stages - 1}: leave encoder or fresh_stages out"
        )


def stages_left_out(config: FinetuneConfig, export: dict[str, Any]) -> range:
    """The encoder's stages, from 0, that are not copied from a weights file: ``fresh_stages`` of those that
    pretraining trained, and the untrained ones below them.
    """
    if not config.fresh_stages:
        return range(0)
    network = export["network"]
    return range(network["feature_level"] + 1 - config.fresh_stages, network["arguments"]["n_stages"])


def check_with_pretraining(fresh_stages: int, runs: Collection[PretrainConfig]) -> None:
    """Refuse, before they are run, pretrainings whose fine-tuning cannot leave so many stages behind.

    Args:
        fresh_stages: of the fine-tuning.
        runs: the pretrainings.

    Raises:
        ValueError: a run pretrains the decoder on those stages, has fewer, or runs differ in them.
    """
    if not fresh_stages:
        return
    if any(run.method.features == "decoder" for run in runs):
        raise ValueError(
            "fresh_stages must be 0 with method.features decoder, whose decoder is pretrained on those "
            f"stages, got {fresh_stages}"
        )
    trained = sorted({_trained_stages(run) for run in runs})
    if len(trained) > 1:
        raise ValueError(
            f"fresh_stages must be 0 where pretrainings train different stages of the encoder ({trained[0]} "
            f"of them in one, {trained[-1]} in another), got {fresh_stages}: set method.feature_level to -1"
        )
    if trained and fresh_stages > trained[0]:
        raise ValueError(
            f"fresh_stages must be at most {trained[0]}, the encoder's stages that are pretrained, "
            f"got {fresh_stages}"
        )


def _trained_stages(run: PretrainConfig) -> int:
    if run.method.name == "genesis":
        return len(run.encoder.strides)
    method = run.method
    return 1 + max(chosen_levels(run.encoder, method.feature_level, method.more_levels, decoder=False))
