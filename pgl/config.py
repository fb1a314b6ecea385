"""The settings of a pretraining run: plain dataclasses with units, defaults and where each default comes
from.

Origins: *paper* is fixed by the abstract of arXiv 2011.12640; *second-hand* was read in descriptions of the
paper's experiments; *our choice* is neither. Triples are in the order of the tensor's axes (D, H, W).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pgl.backbone import chosen_levels
from pgl.networks import EncoderSettings, default_encoder, stride_at

Triple = tuple[int, int, int]

ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
PRECISIONS = (
    "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "bf16", "16", "64",
)  # fmt: skip
_DEVICES = re.compile(r"auto|-1|[1-9]\d*|\d+(,\d+)+,?|\d+,")


@dataclass
class ViewSettings:
    """How two views are cut out of one context block.

    Args:
        patch_size: voxels of a view as the network sees it (second-hand).
        crop_scale: edge of a crop relative to the patch, lowest and highest, drawn for each axis and view
            (second-hand).
        min_overlap: least shared volume relative to the smaller crop (second-hand).
        flip_probability: chance of a mirror, for each axis and view (second-hand).
        context_size: voxels of the block read from a volume, in which both crops lie; the larger it is, the
            less the views overlap (our choice).
        min_body_fraction: a block is drawn again, a few times, while less than this share of its voxels is
            denser than air (our choice).
    """

    patch_size: Triple = (16, 96, 96)
    crop_scale: tuple[float, float] = (1.1, 1.4)
    min_overlap: float = 0.1
    flip_probability: float = 0.5
    context_size: Triple = (28, 168, 168)
    min_body_fraction: float = 0.25


@dataclass
class IntensitySettings:
    """Hounsfield units to network input: clip, subtract the mean, divide by the deviation (all second-hand).

    Args:
        clip_hu: lowest and highest HU kept.
        mean_hu: subtracted.
        std_hu: divided by.
    """

    clip_hu: tuple[float, float] = (-1024.0, 325.0)
    mean_hu: float = -158.58
    std_hu: float = 324.70


# Models Genesis: HU clipped to [−1000, 1000] and scaled to [0, 1].
GENESIS_INTENSITY = IntensitySettings((-1000.0, 1000.0), -1000.0, 2000.0)


@dataclass
class AugmentSettings:
    """Intensity augmentation of each view, on normalised values (ranges and chances second-hand).

    Args:
        noise_probability: chance of Gaussian noise.
        noise_variance: lowest and highest variance of the noise.
        blur_probability: chance of a Gaussian blur.
        blur_sigma: lowest and highest standard deviation of the blur, in voxels of the view.
        brightness_probability: chance of a multiplication.
        brightness_factor: lowest and highest factor.
        gamma_probability: chance of a gamma curve on values scaled to the view's own [min, max].
        gamma_exponent: lowest and highest exponent.
    """

    noise_probability: float = 0.1
    noise_variance: tuple[float, float] = (0.0, 0.1)
    blur_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    brightness_probability: float = 0.5
    brightness_factor: tuple[float, float] = (0.75, 1.25)
    gamma_probability: float = 0.5
    gamma_exponent: tuple[float, float] = (0.7, 1.5)


@dataclass
class MethodSettings:
    """The method, its heads, the alignment and the target network.

    Args:
        name: ``pgl``, or a baseline on the same views and encoder: ``byol`` compares whole views and has no
            use for the alignment, ``genesis`` (Models Genesis) restores distorted views and has no heads.
        feature_level: the encoder's stage whose features are aligned, −1 for the deepest (our choice).
        aligned_size: voxels of the aligned feature block (our choice).
        sampling_ratio: RoIAlign samples a bin and axis, −1 for as many as the bin has voxels (our choice).
        projector_hidden: width inside the local projector (our choice, BYOL's 4096).
        projector_channels: width of its output (our choice, BYOL's 256).
        predictor_hidden: width inside the predictor (our choice, BYOL's 4096).
        head_norm: normalisation inside the heads. ``batch`` as in BYOL; ``group`` for small batches (our
            choice).
        output_norm: normalisation of the projector's output, without scale and offset. Without one, a
            direction that all voxels share satisfies most of the loss and few dimensions are used (our
            choice).
        ema_start: decay of the target network at the first step (our choice, BYOL's cosine schedule).
        ema_end: decay at the last step.
        regions: boxes drawn at random inside what both views share, each aligned to ``aligned_size`` and
            compared; 0 compares all that is shared, as one region (our option, beyond the paper).
        region_scale: lowest and highest edge of such a box relative to what is shared, drawn for each axis.
        more_levels: further stages whose features are compared too, each with heads of its own; the loss is
            the mean over stages (our option, beyond the paper).
        features: whose features: ``encoder``, or ``decoder`` to pretrain the whole U-Net; then the stage is
            one of the decoder's, 0 the finest, and there is none at the encoder's deepest resolution (our
            option, beyond the paper).
        crop_prior: the aligner knows the crops and scales of the views (paper; off only in ablations).
        flip_prior: the aligner knows their mirrors and undoes them (paper; off only in ablations).
    """

    name: Literal["pgl", "byol", "genesis"] = "pgl"
    feature_level: int = -1
    aligned_size: Triple = (4, 6, 6)
    sampling_ratio: int = -1
    projector_hidden: int = 4096
    projector_channels: int = 256
    predictor_hidden: int = 4096
    head_norm: Literal["batch", "group"] = "batch"
    output_norm: Literal["none", "batch", "instance"] = "batch"
    ema_start: float = 0.99
    ema_end: float = 1.0
    regions: int = 0
    region_scale: tuple[float, float] = (0.5, 1.0)
    more_levels: list[int] = field(default_factory=list)
    features: Literal["encoder", "decoder"] = "encoder"
    crop_prior: bool = True
    flip_prior: bool = True


@dataclass
class OptimizerSettings:
    """The optimiser and its learning-rate schedule: linear warm-up, then a cosine to zero.

    Args:
        name: ``lars`` (second-hand), ``adamw`` or ``sgd``.
        learning_rate: highest rate, reached after the warm-up (second-hand for LARS: 0.2 at batch 128).
        weight_decay: decay of weights; biases and norms are exempt (our choice).
        momentum: of LARS and SGD (our choice).
        warmup_steps: steps of the warm-up (second-hand: 2 epochs of 500).
    """

    name: Literal["lars", "adamw", "sgd"] = "lars"
    learning_rate: float = 0.2
    weight_decay: float = 1e-6
    momentum: float = 0.9
    warmup_steps: int = 1000


@dataclass
class TrainSettings:
    """How long and on what (all our choice except ``batch_size``).

    Args:
        steps: optimiser steps of the whole run; the schedules span it.
        batch_size: samples (pairs of views) a step, over all devices together (second-hand).
        accumulate: pieces in which a device takes its share of the batch, one after the other, to save
            memory. The gradients are those of the whole share, but where a normalisation looks at the batch
            (``method.head_norm`` or ``output_norm`` ``batch``): it then sees a piece.
        workers: processes that read blocks; 0 reads in the training process.
        prefetch: batches that each of them reads ahead.
        accelerator: ``auto``, ``cpu`` or ``cuda`` (``gpu`` is the same).
        devices: devices on each machine, or ``auto``: all of them, or under ``torchrun`` one a process.
        num_nodes: machines; under ``torchrun`` its own number counts.
        precision: ``auto`` (bf16-mixed on GPUs that have it, 32-true elsewhere), or one of Lightning
            Fabric's names, e.g. ``32-true`` or ``bf16-mixed``.
        threads: CPU threads of torch, 0 leaves torch's own choice.
        channels_last: keep feature maps in the layout (N, D, H, W, C) in memory. Of use with
            ``encoder.norm`` ``batch`` only: torch's instance normalisation gives the other layout back.
        compile: translate the networks with torch.compile; the first steps take minutes.
        recompute: keep the outputs of stages only, and compute what lies inside them again in the backward
            pass: less memory, about a third more time.
        log_every: steps between lines in metrics.jsonl.
        checkpoint_every: steps between writes of checkpoints/last.pt.
        keep_every: steps between checkpoints that stay beside it as checkpoints/step-N.pt, 0 for none.
        kept: how many of these stay; older ones are deleted.
        skip_damaged: go on without a case whose file is damaged, naming it once; otherwise such a case stops
            the run.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    workers: int = 8
    prefetch: int = 2
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    precision: str = "auto"
    threads: int = 0
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_every: int = 0
    kept: int = 3
    skip_damaged: bool = False


@dataclass
class ValidationSettings:
    """The fixed view pairs on which matching accuracy and feature spread are measured (all our choice).

    Args:
        pairs: number of view pairs.
        every: steps between measurements; the untrained and the final network are always measured.
        fraction: share of the cases that is kept out of training for them.
        collapse_threshold: a feature spread below it raises the alarm; 1 is evenly spread, 0 one single
            point.
    """

    pairs: int = 64
    every: int = 1000
    fraction: float = 0.1
    collapse_threshold: float = 0.05


@dataclass
class PretrainConfig:
    """Everything ``pgl pretrain`` needs.

    Args:
        data: a cache that ``pgl prepare`` wrote.
        output: the run's folder, created; see :mod:`pgl.pretrain` for what lies in it.
        resume: continue the run in ``output`` from its last checkpoint.
        seed: of the weights, the samples and the augmentation.
        views: how views are cut.
        intensity: HU to network input.
        augment: intensity augmentation.
        encoder: the network to pretrain.
        method: heads, alignment, target network.
        optimizer: optimiser and schedule.
        train: length and devices.
        validation: the fixed pairs of the metrics.
    """

    data: Path
    output: Path
    resume: bool = False
    seed: int = 0
    views: ViewSettings = field(default_factory=ViewSettings)
    intensity: IntensitySettings = field(default_factory=IntensitySettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    encoder: EncoderSettings = field(default_factory=default_encoder)
    method: MethodSettings = field(default_factory=MethodSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)


def check(config: PretrainConfig) -> None:
    """Refuse settings that cannot work together, before anything is read or written.

    Raises:
        ValueError: names the setting, what it is, what was expected and what to change.
    """
    method, train = config.method, config.train
    _positive_triples(config)
    _seed_and_devices(config)
    _patch_and_context(config)
    _in_range("views.min_overlap", config.views.min_overlap, 0, 1, open_low=True)
    _in_range("views.flip_probability", config.views.flip_probability, 0, 1)
    _in_range("views.min_body_fraction", config.views.min_body_fraction, 0, 1)
    _ordered("views.crop_scale", config.views.crop_scale, least=0.01)
    _ordered("intensity.clip_hu", config.intensity.clip_hu, least=float("-inf"))
    if config.intensity.clip_hu[0] == config.intensity.clip_hu[1]:
        raise ValueError(
            f"intensity.clip_hu must be two different numbers, lowest first, got {config.intensity.clip_hu}: "
            "every voxel would be the same"
        )
    if config.intensity.std_hu <= 0:
        raise ValueError(f"intensity.std_hu must be positive, got {config.intensity.std_hu}")
    _method_and_options(config)
    for name in ("noise", "blur", "brightness", "gamma"):
        _in_range(f"augment.{name}_probability", getattr(config.augment, f"{name}_probability"), 0, 1)
    for name in ("noise_variance", "blur_sigma", "brightness_factor", "gamma_exponent"):
        _ordered(f"augment.{name}", getattr(config.augment, name), least=0)
    _in_range("method.ema_start", method.ema_start, 0, 1)
    _in_range("method.ema_end", method.ema_end, 0, 1)
    if method.sampling_ratio != -1 and method.sampling_ratio < 1:
        raise ValueError(
            f"method.sampling_ratio must be -1 (as many as a bin has voxels) or at least 1, got "
            f"{method.sampling_ratio}"
        )
    for name in ("projector_hidden", "projector_channels", "predictor_hidden"):
        if getattr(method, name) < 1:
            raise ValueError(f"method.{name} must be positive, got {getattr(method, name)}")
    if method.regions < 0:
        raise ValueError(f"method.regions must be 0 (all that is shared) or more, got {method.regions}")
    if method.regions and not method.crop_prior:
        raise ValueError(
            f"method.regions is {method.regions}, but without method.crop_prior nobody knows where the "
            "regions lie: set method.regions to 0"
        )
    _ordered("method.region_scale", method.region_scale, least=0.01)
    _in_range("method.region_scale", method.region_scale[1], 0, 1)
    for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "prefetch", "kept"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
    if config.optimizer.learning_rate <= 0:
        raise ValueError(f"optimizer.learning_rate must be positive, got {config.optimizer.learning_rate}")
    if not 0 <= config.optimizer.warmup_steps < train.steps:
        raise ValueError(
            f"optimizer.warmup_steps must lie in [0, train.steps={train.steps}), "
            f"got {config.optimizer.warmup_steps}: lower optimizer.warmup_steps or raise train.steps"
        )
    if not 0 <= config.optimizer.momentum < 1:
        raise ValueError(f"optimizer.momentum must lie in [0, 1), got {config.optimizer.momentum}")
    if config.validation.pairs < 1 or config.validation.every < 1:
        raise ValueError(f"validation.pairs and validation.every must be at least 1, got {config.validation}")
    _in_range("validation.fraction", config.validation.fraction, 0, 0.9)


def settled(config: PretrainConfig) -> PretrainConfig:
    """The settings with what the method itself fixes: Models Genesis takes its own intensities."""
    if config.method.name == "genesis" and config.intensity == IntensitySettings():
        return replace(config, intensity=GENESIS_INTENSITY)
    return config


def to_plain(config: PretrainConfig) -> dict[str, Any]:
    """The settings as nested dicts of plain data, with lists for tuples and text for paths."""
    return _plain(asdict(config))


def from_plain(plain: dict[str, Any]) -> PretrainConfig:
    """The settings that :func:`to_plain` gave.

    Raises:
        ValueError: a key is unknown or has a wrong type; the message names it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainConfig)
    # Its name until jsonargparse 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    try:
        return PretrainConfig(**vars(instantiate(parser.parse_object(plain))))
    except ArgumentError as error:
        raise ValueError(f"pretraining settings: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _positive_triples(config: PretrainConfig) -> None:
    named = {
        "views.patch_size": config.views.patch_size,
        "views.context_size": config.views.context_size,
        "method.aligned_size": config.method.aligned_size,
    }
    for name, triple in named.items():
        if len(triple) != 3 or any(int(size) != size or size < 1 for size in triple):
            raise ValueError(f"{name} must be three positive whole numbers (D, H, W), got {triple}")


def _patch_and_context(config: PretrainConfig) -> None:
    views, method = config.views, config.method
    decoder = method.features == "decoder"
    levels = chosen_levels(config.encoder, method.feature_level, method.more_levels, decoder)
    deepest = len(config.encoder.strides) - 1 if decoder else max(levels)
    stride = stride_at(config.encoder, deepest)
    for axis, name in enumerate("DHW"):
        patch, largest = views.patch_size[axis], views.patch_size[axis] * views.crop_scale[1]
        if patch % stride[axis]:
            raise ValueError(
                f"views.patch_size is {patch} on axis {name}, which the encoder's total stride "
                f"{stride[axis]} at stage {deepest} (method.feature_level {method.feature_level}) does not "
                "divide: change the patch or encoder.strides"
            )
        if largest > views.context_size[axis]:
            raise ValueError(
                f"views.context_size is {views.context_size[axis]} on axis {name}, smaller than the largest "
                f"crop {patch} × {views.crop_scale[1]} = {largest:.1f}: enlarge it to hold both crops"
            )


def _method_and_options(config: PretrainConfig) -> None:
    method, default = config.method, MethodSettings()
    if method.name not in ("pgl", "byol", "genesis"):
        raise ValueError(f"method.name must be pgl, byol or genesis, got {method.name!r}")
    for name in ("more_levels", "features"):
        if method.name != "pgl" and getattr(method, name) != getattr(default, name):
            raise ValueError(
                f"method.{name} is an option of method.name pgl, got {getattr(method, name)} with "
                f"{method.name}: leave it out"
            )
    intensity = settled(config).intensity
    low, high = intensity.clip_hu
    if method.name == "genesis" and (intensity.mean_hu, intensity.std_hu) != (low, high - low):
        raise ValueError(
            "method.name genesis takes inputs in [0, 1], got intensity.clip_hu "
            f"{intensity.clip_hu}, mean_hu {intensity.mean_hu}, std_hu {intensity.std_hu}: leave intensity "
            f"out, or give mean_hu {low:g} and std_hu {high - low:g}"
        )


def _seed_and_devices(config: PretrainConfig) -> None:
    train = config.train
    for name, number in (
        ("seed", config.seed),
        ("train.workers", train.workers),
        ("train.keep_every", train.keep_every),
        ("train.threads", train.threads),
    ):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    if config.encoder.input_channels != 1:
        raise ValueError(
            f"encoder.input_channels must be 1, got {config.encoder.input_channels}: a cache holds CT alone"
        )
    for name, value, allowed in (
        ("train.accelerator", train.accelerator, ACCELERATORS),
        ("train.precision", train.precision, PRECISIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not _DEVICES.fullmatch(str(train.devices)):
        raise ValueError(
            "train.devices must be auto, a number of devices of at least 1, -1 for all, or numbers of "
            f"devices such as 0,2, got {train.devices!r}"
        )
    if train.num_nodes < 1:
        raise ValueError(f"train.num_nodes must be at least 1, got {train.num_nodes}")


def _in_range(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low}, {high}], got {value}")


def _ordered(name: str, pair: tuple[float, float], least: float) -> None:
    if len(pair) != 2 or not least <= pair[0] <= pair[1]:
        raise ValueError(f"{name} must be two numbers, lowest first and at least {least}, got {pair}")
