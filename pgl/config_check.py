"""Which settings of a pretraining run work together; all else is refused before anything is read."""

from __future__ import annotations

import math
import re

from pgl.config import ACCELERATORS, PRECISIONS, MethodSettings, PretrainConfig, settled
from pgl.encoder_settings import chosen_levels, stride_at

_DEVICES = re.compile(r"auto|-1|[1-9]\d*|\d+(,\d+)+,?|\d+,")


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
    if len(config.views.flip_chances) != 3:
        raise ValueError(
            "views.flip_probability must be one number, or three for D, H and W, got "
            f"{config.views.flip_probability}"
        )
    for chance in config.views.flip_chances:
        _in_range("views.flip_probability", chance, 0, 1)
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
    if train.compile and train.recompute and config.encoder.norm == "batch":
        raise ValueError(
            "train.compile and train.recompute together need encoder.norm instance: compiled, running "
            "statistics would count each batch twice; switch one of them off"
        )
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
    if tuple(views.patch_size) == tuple(stride):
        raise ValueError(
            f"views.patch_size {tuple(views.patch_size)} leaves a single voxel at stage {deepest}, of stride "
            f"{tuple(stride)}: give at least twice that on one axis"
        )


def _method_and_options(config: PretrainConfig) -> None:
    method, default = config.method, MethodSettings()
    if method.name not in ("pgl", "byol", "genesis"):
        raise ValueError(f"method.name must be pgl, byol or genesis, got {method.name!r}")
    if not (method.decorrelation >= 0 and math.isfinite(method.decorrelation)):
        raise ValueError(f"method.decorrelation must be finite and at least 0, got {method.decorrelation}")
    for name in ("more_levels", "features", "decorrelation"):
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
    if config.seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {config.seed}")
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
