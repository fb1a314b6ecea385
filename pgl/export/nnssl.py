"""``pgl export --format nnssl``: a file that ``nnUNetv2_train_pretrained`` fine-tunes from.

That route reads checkpoints of nnssl, nnU-Net's framework for self-supervised pretraining. It takes
``network_weights`` and, under ``nnssl_adaptation_plan``::

    architecture_plans      arch_class_name, arch_kwargs, arch_kwargs_requiring_import: the network to build
    architecture_kwargs     arch_kwargs again, where DynamicPretrainedTrainer looks for kernels and stages
    pretrain_plan           configurations: {name: {spacing, patch_size, ...}}; only the first one is read
    pretrain_num_input_channels       a dataset with more channels gets the stem repeated
    recommended_downstream_patchsize  becomes the patch of fine-tuning
    key_to_encoder, key_to_stem       prefixes in network_weights of the stages and of what precedes them
    keys_to_in_proj         the layers whose width depends on the input channels
    key_to_lpe              None: there is no positional embedding

``citations`` are printed when fine-tuning starts. All of it is plain: lists, numbers, text and tensors, which
``torch.load(FILE, weights_only=True)`` reads. Format as read by nnU-Net's ``like_nnssl.py`` and
``pretrainedTrainer.py`` in its repository (2026); nnunetv2 2.8.1 from the package index does not have the
route yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pgl
from pgl.export.encoder import check_output, encoder_of, write_tensors
from pgl.export.new_plans import architecture_block, check_patch, check_that_it_fits_a_unet

_STEM = "encoder.stem"
_CITATION = (
    "Xie, Y., Zhang, J., Liao, Z., Xia, Y., & Shen, C. (2020). PGL: Prior-Guided Local Self-supervised "
    "Learning for 3D Medical Image Segmentation. arXiv:2011.12640."
)


def export_nnssl(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    patch_size: Sequence[int] | None = None,
    checkpoint: str = "last",
) -> dict[str, Any]:
    """Write the encoder as a checkpoint of nnssl to ``output``.

    Args:
        source: the folder of ``pgl pretrain``, or a file of ``pgl export --format encoder``.
        output: the file to write, usually ``*.pth``.
        patch_size: (D, H, W) voxels that fine-tuning should use; default: pretraining's.
        checkpoint: which weights of the run: ``last``, ``best`` or ``initial``.

    Returns:
        ``network`` of the encoder, as in :mod:`pgl.export.encoder`.

    Raises:
        FileNotFoundError: the run or the file is missing.
        ValueError: it is damaged, the encoder cannot be part of a U-Net, or its strides do not divide
            ``patch_size``.
    """
    check_output(output, "pgl_nnssl.pth", source)
    content = encoder_of(source, checkpoint)
    # This route has a place for the encoder alone.
    network = {key: value for key, value in content["network"].items() if key != "decoder_level"}
    check_that_it_fits_a_unet(network)
    if patch_size is not None:
        check_patch(network, patch_size)
    file = {
        "network_weights": {f"encoder.{name}": tensor for name, tensor in content["network_weights"].items()},
        "nnssl_adaptation_plan": adaptation_plan(network, patch_size or network["patch_size"]),
        "citations": [{"type": "Pretraining method", "name": "PGL", "apa_citations": [_CITATION]}],
        "trainer_name": "PGL",
        "pgl": {"network": network, "pgl_ops_version": pgl.__version__},
    }
    write_tensors(output, file)
    return network


def adaptation_plan(network: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """``nnssl_adaptation_plan``, see above, for ``network`` of an exported encoder."""
    block = architecture_block(network)
    return {
        "architecture_plans": {
            "arch_class_name": block["network_class_name"],
            "arch_kwargs": block["arch_kwargs"],
            "arch_kwargs_requiring_import": block["_kw_requires_import"],
        },
        "architecture_kwargs": block["arch_kwargs"],
        "pretrain_plan": {
            "dataset_name": "pgl",
            "plans_name": "pgl",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {
                "pgl": {
                    "spacing": list(network["spacing_mm"]),
                    "patch_size": list(network["patch_size"]),
                    "normalization_schemes": ["CTNormalization"] * network["input_channels"],
                }
            },
        },
        "pretrain_num_input_channels": network["input_channels"],
        "recommended_downstream_patchsize": [int(size) for size in patch_size],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": _STEM,
        "keys_to_in_proj": [f"{_STEM}.convs.0.conv", f"{_STEM}.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
