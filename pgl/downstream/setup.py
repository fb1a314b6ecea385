"""From a run's settings and its weights file: the network, what it is fed, the device, what is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgl.config import IntensitySettings
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.fresh_stages import stages_left_out
from pgl.downstream.labels import LabelledCache
from pgl.downstream.network import Loaded, check_stages, is_alias, summary
from pgl.encoder_settings import default_encoder
from pgl.export import check_networks
from pgl.export.decoder import stage_of
from pgl.files.atomic import write_json
from pgl.networks import describe
from pgl.settings import as_plain, differing

# Arguments of the encoder that change none of its values.
_WITHOUT_EFFECT = ("return_skips", "inplace")


def prepare_source(config: FinetuneConfig) -> None:
    """Make the cache from ``config.source``, if that is given.

    Raises:
        FileNotFoundError: no source.
        ValueError: no usable data.
    """
    if config.source is not None and not config.resume:
        # Reading images needs SimpleITK, training from a cache does not.
        from pgl.labels.settings import LabelSettings
        from pgl.prepare.run import PrepareSettings, prepare

        settings = PrepareSettings() if config.spacing_mm is None else PrepareSettings(config.spacing_mm)
        prepare([config.source], config.data, settings, labels=LabelSettings(layout=config.layout))


def labelled_cache(config: FinetuneConfig) -> LabelledCache:
    """The cache to train on.

    Raises:
        FileNotFoundError: no cache.
        ValueError: no usable data, or a cache of another spacing.
    """
    cache = LabelledCache(config.data, config.classes)
    there = cache.images.spacing_mm
    if config.spacing_mm is not None and tuple(config.spacing_mm) != tuple(there):
        raise ValueError(
            f"spacing_mm is {tuple(config.spacing_mm)} (D, H, W), but the cache {config.data} has {there}: "
            "prepare it anew, or change spacing_mm"
        )
    return cache


def description(config: FinetuneConfig, export: dict[str, Any] | None) -> dict[str, Any]:
    """The encoder's description: of the settings, else of the weights file, else the default."""
    if config.encoder is not None:
        return describe(config.encoder)
    if export is not None:
        return {key: export["network"][key] for key in ("class", "arguments")}
    return describe(default_encoder())


def intensity(config: FinetuneConfig, export: dict[str, Any] | None) -> IntensitySettings:
    """HU to network input: of the settings, else of the weights file, else the default."""
    if config.intensity is not None:
        return config.intensity
    if export is None:
        return IntensitySettings()
    given = export["network"]["intensity"]
    return IntensitySettings(tuple(given["clip_hu"]), given["mean_hu"], given["std_hu"])


def pretrained_weights(
    config: FinetuneConfig, export: dict[str, Any], description: dict[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a weights file to load, those of a decoder as ``decoder.*``; and the names of those that
    are left out: of stages that start afresh, and of a decoder whose stages would not be the network's.

    Raises:
        ValueError: the decoder is not that of the encoder that the file describes.
    """
    weights = dict(export["network_weights"])
    fresh = stages_left_out(config, export)
    left_out = [name for name in weights if stage_of(name) in fresh]
    for name in left_out:
        del weights[name]
    if "decoder_weights" in export:
        check_networks(export, config.weights)
        decoder = {f"decoder.{name}": tensor for name, tensor in export["decoder_weights"].items()}
        if decoder_misfit(config, export, description):
            left_out += list(decoder)
        else:
            weights |= decoder
    return weights, [name for name in left_out if not is_alias(name)]


def decoder_misfit(config: FinetuneConfig, export: dict[str, Any], description: dict[str, Any]) -> str:
    """Why a file's decoder cannot be taken; empty if it can, or if there is none."""
    if "decoder_weights" not in export:
        return ""
    if differing_arguments(export["network"]["arguments"], description["arguments"]):
        return "the network has another encoder than the file"
    if config.fresh_stages:
        return f"fresh_stages is {config.fresh_stages}, and it was pretrained on those stages"
    if config.decoder_convs != 1:
        return f"decoder_convs is {config.decoder_convs}, and was 1 in pretraining"
    return ""


def differing_arguments(file: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The encoder's arguments that make it another network, in the order of their names."""

    def compared(arguments: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in arguments.items() if key not in _WITHOUT_EFFECT}
        for key, value in kept.items():
            if isinstance(value, Mapping):
                kept[key] = {name: one for name, one in value.items() if name not in _WITHOUT_EFFECT}
        return dict(as_plain(kept))

    return differing(compared(file), compared(here))


def check_patch(config: FinetuneConfig, description: dict[str, Any]) -> None:
    """Raise ValueError if the patch does not fit the encoder's strides."""
    arguments = description["arguments"]
    check_stages(arguments)
    stride = [math.prod(axis) for axis in zip(*arguments["strides"], strict=True)]
    patch = config.patches.patch_size
    if any(n % s or n == s for n, s in zip(patch, stride, strict=True)):
        raise ValueError(
            f"patches.patch_size {tuple(patch)} must be a multiple, at least twice, of the encoder's total "
            f"stride {tuple(stride)} on each axis (D, H, W)"
        )
    if arguments["input_channels"] != 1:
        raise ValueError(f"the encoder takes {arguments['input_channels']} channels; a cache holds CT alone")


def accelerator(name: str) -> str:
    """The kind of device that ``auto`` stands for."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def say_loaded(
    say: Callable[..., None],
    folder: Path,
    config: FinetuneConfig,
    export: dict[str, Any] | None,
    loaded: Loaded | None,
    spacing_mm: Sequence[float],
) -> None:
    """Say which tensors came from the weights file, and write all names to weights.json."""
    if export is None or loaded is None:
        say("weights: random" + (", so fresh_stages says nothing" if config.fresh_stages else ""))
        return
    described = description(config, export)
    where = folder / "weights.json"
    write_json(where, vars(loaded))
    say(f"{config.weights}: {len(loaded.loaded)} tensors loaded: {summary(loaded.loaded)}")
    say(f"{len(loaded.missing)} missing, so they start at random: {summary(loaded.missing) or 'none'}")
    say(f"{len(loaded.unused)} unused: {summary(loaded.unused) or 'none'}; all names are in {where}")
    if config.fresh_stages:
        stages = described["arguments"]["n_stages"]
        fresh = [str(n) for n in stages_left_out(config, export) if n < stages]
        say(f"fresh_stages {config.fresh_stages}: of the encoder, stage {', '.join(fresh)} starts at random")
    if misfit := decoder_misfit(config, export, described):
        say(f"WARNING: the pretrained decoder is left out: {misfit}", style="bold red")
    if loaded.reshaped:
        count, first = len(loaded.reshaped), loaded.reshaped[0]
        say(f"WARNING: {count} have another shape and were not loaded, such as {first}", style="bold red")
    for difference in differences_from(config, export, spacing_mm):
        say(f"WARNING: {difference}", style="bold red")
    if export["network"]["trained_steps"] == 0:
        say("the weights come from an untrained network")


def differences_from(
    config: FinetuneConfig, export: dict[str, Any], spacing_mm: Sequence[float]
) -> list[str]:
    """What is not as it was in pretraining, so that tensors of the same shape may mean something else."""
    network, told = export["network"], []
    then, now = tuple(network["spacing_mm"]), tuple(spacing_mm)
    if then != now:
        told.append(
            f"the weights were trained at {then} mm (D, H, W), the cache {config.data} has {now} mm: prepare "
            "it at theirs"
        )
    file, here = network["arguments"], description(config, export)["arguments"]
    other = [f"{key} {file.get(key)}, now {here.get(key)}" for key in differing_arguments(file, here)]
    if other:
        told.append(
            f"the network is not the one that the weights were trained in: {'; '.join(other)} (leave encoder "
            "out to take the file's)"
        )
    before, after = (
        (*map(float, own.clip_hu), float(own.mean_hu), float(own.std_hu))
        for own in (intensity(replace(config, intensity=None), export), intensity(config, export))
    )
    if before != after:
        told.append(
            "the weights were trained on HU clipped to [{}, {}], less {}, divided by {}; now [{}, {}], {}, "
            "{} (leave intensity out to take the file's)".format(*before, *after)
        )
    return told
