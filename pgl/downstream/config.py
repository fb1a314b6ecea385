"""The settings of a fine-tuning run: plain dataclasses, as in :mod:`pgl.config`. All defaults are our choice.

Triples are in the order of the tensor's axes (D, H, W).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pgl.config import ACCELERATORS, PRECISIONS, AugmentSettings, IntensitySettings
from pgl.encoder_settings import EncoderSettings

Triple = tuple[int, int, int]
RANDOM = "random"


@dataclass
class SplitSettings:
    """Which cases are tested on; they depend on nothing else than these settings and the cases' names.

    Args:
        test_fraction: share of the patients that is only ever tested on.
        test_subjects: names of the test cases; goes before ``test_fraction``.
        seed: of the order in which patients become test patients.
        patient: regular expression whose first group is the patient in a case's name, such as ``(.+)_scan``;
            all cases of a patient are on one side. Empty: each case is a patient.
    """

    test_fraction: float = 0.25
    test_subjects: list[str] = field(default_factory=list)
    seed: int = 0
    patient: str = ""


@dataclass
class PatchSettings:
    """How training patches are cut.

    Args:
        patch_size: voxels of a patch, and of the window that slides over a volume later.
        crop_scale: edge of what is cut relative to the patch, lowest and highest, drawn for each axis; it is
            scaled to the patch.
        flip_probability: chance of a mirror on each axis (D, H, W). Set the last to 0 where classes differ in
            being left or right.
        foreground: share of the patches that hold a voxel of a class drawn at random; the others lie
            anywhere.
    """

    patch_size: Triple = (16, 96, 96)
    crop_scale: tuple[float, float] = (0.8, 1.25)
    flip_probability: tuple[float, float, float] = (0.5, 0.5, 0.5)
    foreground: float = 0.5


@dataclass
class FinetuneOptimizerSettings:
    """The optimiser and its schedule.

    Args:
        name: ``adamw`` or ``sgd`` (with Nesterov's momentum).
        learning_rate: highest rate, reached after the warm-up.
        encoder_factor: rate of the encoder relative to the decoder's.
        weight_decay: decay of weights; biases and norms are exempt.
        momentum: of SGD.
        warmup_steps: steps of the linear warm-up.
        schedule: ``poly`` falls as (1 − step/steps)^0.9, ``cosine`` along half a cosine.
        clip_gradient: longest gradient.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    encoder_factor: float = 1.0
    weight_decay: float = 1e-4
    momentum: float = 0.99
    warmup_steps: int = 50
    schedule: Literal["poly", "cosine"] = "poly"
    clip_gradient: float = 12.0


@dataclass
class FinetuneTrainSettings:
    """How long and on what.

    Args:
        steps: optimiser steps; the schedule spans them.
        batch_size: patches a step.
        workers: processes that read patches; 0 reads in the training process.
        accelerator: ``auto``, ``cpu`` or ``cuda``; one device is used.
        precision: ``auto`` (bf16-mixed on a GPU that has it, else 32-true), ``32-true``, ``bf16-mixed`` or
            ``16-mixed``.
        threads: CPU threads of torch, 0 leaves torch's own choice.
        log_every: steps between lines in metrics.jsonl.
        checkpoint_every: steps between writes of checkpoints/last.pt.
    """

    steps: int = 5000
    batch_size: int = 2
    workers: int = 4
    accelerator: str = "auto"
    precision: str = "auto"
    threads: int = 0
    log_every: int = 20
    checkpoint_every: int = 500


@dataclass
class InferenceSettings:
    """How a whole volume is segmented.

    Args:
        overlap: part of a window that it shares with the next along each axis; windows are weighted with a
            Gaussian.
        batch_size: windows at a time.
        mirror: average over the mirrored volumes (8 times the work).
    """

    overlap: float = 0.5
    batch_size: int = 2
    mirror: bool = False


@dataclass
class FinetuneConfig:
    """Everything ``pgl finetune`` needs.

    Args:
        data: a cache with labels that ``pgl prepare`` wrote.
        output: the run's folder, created; see :mod:`pgl.downstream.train` for what lies in it.
        weights: a file of ``pgl export --format encoder``, or ``random``.
        fraction: share of the training patients whose labels are used; smaller shares are parts of larger
            ones of the same seed.
        seed: of the decoder's weights, of the training patients' order and of the patches.
        resume: continue the run in ``output``.
        source: a data set with labels that is prepared into ``data`` first (or brought up to date there, but
            not by ``resume``); leave out for a cache that is there already.
        layout: of ``source``, see :class:`pgl.labels.settings.LabelSettings`.
        spacing_mm: voxel size (D, H, W) that ``source`` is prepared to, and that a cache must have; leave out
            for that of the cache (of a ``source``: the default of ``pgl prepare``).
        classes: what is segmented: name → names (or numbers) of the cache's classes that make it up; what is
            not named is background. Leave out for all of the cache's classes.
        split: test cases.
        encoder: the network's encoder; leave out for that of the weights file (random: the default encoder).
        decoder_convs: convolutions of each stage of the decoder.
        fresh_stages: so many of the encoder's pretrained stages, the deepest ones, start at random all the
            same, and so do stages below them. The stem is always copied.
        intensity: HU to network input; leave out for that of the weights file (random: the default).
        patches: training patches.
        augment: intensity augmentation.
        optimizer: optimiser and schedule.
        train: length and device.
        inference: sliding window.
    """

    data: Path
    output: Path
    weights: str
    fraction: float = 1.0
    seed: int = 0
    resume: bool = False
    source: Path | None = None
    layout: Literal["auto", "msd", "kits", "bcv", "nnunet"] = "auto"
    spacing_mm: tuple[float, float, float] | None = None
    classes: dict[str, list[str | int]] | None = None
    split: SplitSettings = field(default_factory=SplitSettings)
    encoder: EncoderSettings | None = None
    decoder_convs: int = 1
    fresh_stages: int = 0
    intensity: IntensitySettings | None = None
    patches: PatchSettings = field(default_factory=PatchSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimizer: FinetuneOptimizerSettings = field(default_factory=FinetuneOptimizerSettings)
    train: FinetuneTrainSettings = field(default_factory=FinetuneTrainSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)


def check(config: FinetuneConfig) -> None:
    """Refuse settings that cannot work, before anything is read or written.

    Raises:
        ValueError: names the setting, what it is, what was expected.
    """
    _within("fraction", config.fraction, 0, 1, open_low=True)
    if not config.split.test_subjects:
        _within("split.test_fraction", config.split.test_fraction, 0, 0.9, open_low=True)
    _check_pattern(config.split.patient)
    patches = config.patches
    if len(patches.patch_size) != 3 or min(patches.patch_size) < 1:
        raise ValueError(f"patches.patch_size must be three positive numbers, got {patches.patch_size}")
    if not 0.1 <= patches.crop_scale[0] <= patches.crop_scale[1] <= 4:
        raise ValueError(
            f"patches.crop_scale must be two numbers in [0.1, 4], lowest first, got {patches.crop_scale}"
        )
    if len(patches.flip_probability) != 3:
        raise ValueError(
            f"patches.flip_probability must be three numbers, for D, H and W, got {patches.flip_probability}"
        )
    for chance in patches.flip_probability:
        _within("patches.flip_probability", chance, 0, 1)
    _within("patches.foreground", patches.foreground, 0, 1)
    _within("inference.overlap", config.inference.overlap, 0, 0.95)
    optimizer, train = config.optimizer, config.train
    for name, value in (
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.clip_gradient", optimizer.clip_gradient),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("encoder_factor", "weight_decay"):
        if getattr(optimizer, name) < 0:
            raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(optimizer, name)}")
    if config.fresh_stages and not optimizer.encoder_factor:
        raise ValueError(
            "optimizer.encoder_factor must be above 0 with fresh_stages, since random stages would stay as "
            "they are, got 0"
        )
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
    if not 0 <= optimizer.warmup_steps < train.steps:
        raise ValueError(
            f"optimizer.warmup_steps must lie in [0, train.steps={train.steps}), got {optimizer.warmup_steps}"
        )
    for name, number, least in (
        ("seed", config.seed, 0),
        ("split.seed", config.split.seed, 0),
        ("decoder_convs", config.decoder_convs, 1),
        ("fresh_stages", config.fresh_stages, 0),
        ("train.workers", train.workers, 0),
        ("train.threads", train.threads, 0),
        ("inference.batch_size", config.inference.batch_size, 1),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    for name, seed in (("seed", config.seed), ("split.seed", config.split.seed)):
        if seed >= 2**63:
            raise ValueError(f"{name} must be below 2^63, got {seed}")
    for name, choice, allowed in (
        ("train.accelerator", train.accelerator, ACCELERATORS),
        ("train.precision", train.precision, PRECISIONS),
    ):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
    if config.classes is not None and (not config.classes or not all(config.classes.values())):
        raise ValueError(
            f"classes must name at least one class, each made of at least one, got {config.classes}"
        )


def _check_pattern(pattern: str) -> None:
    if not pattern:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"split.patient is no regular expression: {pattern!r} ({error})") from error
    if groups < 1:
        raise ValueError(f"split.patient needs a group such as '(.+)_scan', got {pattern!r}")


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low}, {high}], got {value}")
