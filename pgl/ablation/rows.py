"""The rows of an ablation: what each changes of the method, all else equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pgl.config import MethodSettings, PretrainConfig

# The paper's: what the aligner knows.
PRIORS = ("both", "crop", "flip", "none")
# Options of ours, one at a time, with both priors; those of configs/beyond-the-paper.
BEYOND = ("regions", "levels", "unet", "decorrelated")
ROWS = (*PRIORS, *BEYOND)

_REGIONS = 4
_DECODER_STAGE = 1
_DECORRELATION = 0.04


def changed(config: PretrainConfig, row: str) -> MethodSettings:
    """The settings of the method in a row.

    Args:
        config: the settings that all rows share.
        row: one of ``ROWS``.

    Raises:
        ValueError: there is no such row, or it does not fit the encoder.
    """
    if row not in ROWS:
        raise ValueError(f"rows must be among {', '.join(ROWS)}, got {row!r}")
    method = config.method
    if row in PRIORS:
        return replace(method, crop_prior=row in ("both", "crop"), flip_prior=row in ("both", "flip"))
    options: dict[str, Any] = {"crop_prior": True, "flip_prior": True}
    if row == "regions":
        options["regions"] = _REGIONS
    elif row == "levels":
        options["more_levels"] = [_stage_above(config)]
    elif row == "decorrelated":
        options["decorrelation"] = _DECORRELATION
    else:
        options.update(features="decoder", feature_level=_DECODER_STAGE)
    return replace(method, **options)


def described(row: str, method: MethodSettings) -> str:
    """A row in words, for the table."""
    if row in PRIORS:
        return {"both": "PGL", "crop": "without flips", "flip": "without crops", "none": "with neither"}[row]
    return {
        "regions": f"{method.regions} random regions",
        "levels": f"stage {', '.join(map(str, method.more_levels))} too",
        "unet": f"the decoder's stage {method.feature_level}",
        "decorrelated": f"decorrelated, weight {method.decorrelation:g}",
    }[row]


def _stage_above(config: PretrainConfig) -> int:
    """The next finer stage than the one whose features are compared."""
    stage = config.method.feature_level % len(config.encoder.strides)
    if stage == 0:
        raise ValueError(
            "row levels compares the stage above method.feature_level too, and above "
            f"{config.method.feature_level} there is none: leave the row out"
        )
    return stage - 1
