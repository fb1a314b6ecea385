"""The settings of a pretraining run: plain dataclasses with units, defaults and where each default comes
from.

Origins: *paper* is fixed by the abstract of arXiv 2011.12640; *second-hand* was read in descriptions of the
paper's experiments; *our choice* is neither. Triples are in the order of the tensor's axes (D, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pgl.encoder_settings import EncoderSettings, default_encoder
from pgl.settings import settings_of

Triple = tuple[int, int, int]

ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
# Of Lightning Fabric's, not those of weights that are float64, or of half precision, which loses small steps.
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass
class ViewSettings:
    """How two views are cut out of one context block.

    Args:
        patch_size: voxels of a view as the network sees it (second-hand).
        crop_scale: edge of a crop relative to the patch, lowest and highest, drawn for each axis and view
            (second-hand).
        min_overlap: least shared volume relative to the smaller crop (second-hand).
        flip_probability: chance of a mirror, for each axis and view; one number (second-hand) or one for each
            axis.
        context_size: voxels of the block read from a volume, in which both crops lie; the larger it is, the
            less the views overlap (our choice).
        min_body_fraction: a block is drawn again, a few times, while less than this share of its voxels is
            denser than air (our choice).
    """

    patch_size: Triple = (16, 96, 96)
    crop_scale: tuple[float, float] = (1.1, 1.4)
    min_overlap: float = 0.1
    flip_probability: float | tuple[float, float, float] = 0.5
    context_size: Triple = (28, 168, 168)
    min_body_fraction: float = 0.25

    @property
    def flip_chances(self) -> tuple[float, ...]:
        """``flip_probability`` of each axis (D, H, W)."""
        chance = self.flip_probability
        return (chance,) * 3 if isinstance(chance, int | float) else tuple(chance)


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
        decorrelation: weight of a penalty on channels of the projection that tell of each other, see
            :mod:`pgl.methods.decorrelation`; 0 for none. The penalty grows with ``projector_channels``; 0.04
            was tried with 64 and 128 (our option, beyond the paper).
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
    decorrelation: float = 0.0
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
            memory. The gradients are those of the whole share, but where something looks at the batch
            (``method.head_norm`` or ``output_norm`` ``batch``, ``method.decorrelation``): it then sees
            a piece.
        workers: processes that read blocks; 0 reads in a thread of the training process.
        prefetch: batches that each of them reads ahead.
        accelerator: ``auto``, ``cpu`` or ``cuda`` (``gpu`` is the same).
        devices: devices on each machine, or ``auto``: all of them, or under ``torchrun`` one a process.
        num_nodes: machines; under ``torchrun`` its own number counts.
        precision: ``auto`` (bf16-mixed on GPUs that have it, 32-true elsewhere), ``32-true``, ``bf16-mixed``
            or ``16-mixed``.
        threads: CPU threads of torch, 0 leaves torch's own choice.
        channels_last: keep feature maps in the layout (N, D, H, W, C) in memory. Of use with
            ``encoder.norm`` ``batch`` only: torch's instance normalisation gives the other layout back.
        compile: translate the networks with torch.compile; the first steps take minutes.
        recompute: keep the outputs of stages only, and compute what lies inside them again in the backward
            pass: less memory, about a third more time. Not with ``compile`` where ``encoder.norm`` is batch.
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


def genesis_intensity(own: IntensitySettings) -> IntensitySettings:
    """What Models Genesis makes of settings that it shares with other methods: the same window, scaled to
    [0, 1], but its own window in place of the default one.
    """
    if own == IntensitySettings():
        return GENESIS_INTENSITY
    low, high = own.clip_hu
    return IntensitySettings((low, high), low, high - low)


def settled(config: PretrainConfig) -> PretrainConfig:
    """The settings with what the method itself fixes: Models Genesis takes its own intensities."""
    if config.method.name == "genesis" and config.intensity == IntensitySettings():
        return replace(config, intensity=GENESIS_INTENSITY)
    return config


def from_plain(plain: dict[str, Any]) -> PretrainConfig:
    """The settings that :func:`pgl.settings.to_plain` gave.

    Raises:
        ValueError: a key is unknown or has a wrong type; the message names it.
    """
    return settings_of(PretrainConfig, plain, "pretraining settings")
