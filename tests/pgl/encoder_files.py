"""Exported encoders without a pretraining run, and nnU-Net plans, for the tests of the exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl.backbone import build_decoder
from pgl.encoder_settings import EncoderSettings
from pgl.export.decoder import trained_of_decoder
from pgl.export.encoder import FORMAT, FORMAT_VERSION
from pgl.networks import build_encoder, describe

UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
INTENSITY = {"clip_hu": [-1024.0, 325.0], "mean_hu": -158.58, "std_hu": 324.70}


def encoder_file(
    path: Path,
    settings: EncoderSettings | None = None,
    level: int | None = None,
    patch_size: tuple[int, int, int] = (4, 16, 16),
    intensity: dict[str, Any] | None = None,
    decoder_level: int | None = None,
) -> Path:
    """A file of ``--format encoder`` whose values are those of no initialisation; with the decoder's, as far
    as its stage ``decoder_level`` needs them, where that is given.
    """
    if settings is None:
        # Late: tests/nnunet runs where pgl_ops need not be built.
        from tests.pgl.training_data import small_encoder

        settings = small_encoder()
    torch.manual_seed(5)
    description = describe(settings)
    encoder = build_encoder(description)
    _shake(encoder)
    strides = torch.cumprod(torch.tensor([list(s) for s in settings.strides]), dim=0)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network_weights": {name: tensor.clone() for name, tensor in encoder.state_dict().items()},
        "network": {
            **description,
            "input_channels": settings.input_channels,
            "feature_strides": strides.tolist(),
            "feature_level": len(settings.strides) - 1 if level is None else level,
            "patch_size": list(patch_size),
            "spacing_mm": [3.0, 1.0, 1.0],
            "intensity": intensity or INTENSITY,
            "pgl_ops_version": "0.1.0",
            "format_version": FORMAT_VERSION,
            "trained_steps": 7,
        },
    }
    if decoder_level is not None:
        decoder = build_decoder(encoder)
        _shake(decoder)
        content["network"]["decoder_level"] = decoder_level
        content["decoder_weights"] = trained_of_decoder(
            {name: tensor.clone() for name, tensor in decoder.state_dict().items()},
            len(settings.strides),
            decoder_level,
        )
    torch.save(content, path)
    return path


def _shake(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def small_plans(**changes: Any) -> dict[str, Any]:
    """Plans as nnU-Net's residual-encoder planner writes them, for the network of ``small_encoder()``.

    Args:
        changes: replacements in ``arch_kwargs`` of ``3d_fullres``.
    """
    return {
        "dataset_name": "Dataset001_Small",
        "plans_name": "nnUNetResEncUNetMPlans",
        "original_median_spacing_after_transp": [4.0, 0.8, 0.8],
        "original_median_shape_after_transp": [30, 100, 120],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "nnUNetPlannerResEncM",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": 900.0,
                "mean": 80.0,
                "median": 82.0,
                "min": -300.0,
                "percentile_00_5": -60.0,
                "percentile_99_5": 210.0,
                "std": 45.0,
            }
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [14, 60, 66],
                "median_image_size_in_voxels": [30.0, 100.0, 120.0],
                "spacing": [4.0, 0.8, 0.8],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "architecture": {
                    "network_class_name": UNET,
                    "arch_kwargs": {
                        "n_stages": 3,
                        "features_per_stage": [4, 8, 8],
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
                        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
                        "n_blocks_per_stage": [1, 1, 1],
                        "n_conv_per_stage_decoder": [2, 1],
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                        **changes,
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            },
            "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [8.0, 1.6, 1.6], "next_stage": "cascade"},
            "cascade": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


def write_plans(path: Path, plans: dict[str, Any]) -> Path:
    path.write_text(json.dumps(plans), encoding="utf-8")
    return path
