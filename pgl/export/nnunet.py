"""``pgl export --format nnunet``: a file that ``nnUNetv2_train … -pretrained_weights FILE`` loads.

nnU-Net's loader reads ``network_weights`` and wants every tensor of its own network there with its shape,
but for the segmentation layers (``.seg_layers.``), which it never loads. So the whole U-Net of the plans is
built, the encoder is copied in (and the decoder, where that was pretrained), and the state dict is saved
under all its names: nnU-Net's modules register the same tensor more than once (``.all_modules.``,
``decoder.encoder.``), and in the file these share their values too.

Keys of the file: ``network_weights``, and under ``pgl`` what it was made of, as plain data.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import pgl
from pgl.export.decoder import leading_stages, stage_of
from pgl.export.encoder import check_output, encoder_of, listed, write_tensors
from pgl.export.new_plans import adapted
from pgl.export.plans import differences, input_notes, read_configuration, read_json
from pgl.files.atomic import write_json
from pgl.networks import constructor_arguments, seeded_module

PLANS = "plans of nnU-Net v2"
DEFAULT_CLASSES = 2
_SEGMENTATION = ".seg_layers."


@dataclass(frozen=True)
class NnunetExport:
    """What was written; a tensor that has several names counts once.

    Attributes:
        trained_steps: optimiser steps of pretraining behind the weights.
        pretrained: tensors that pretraining trained.
        untrained: tensors of encoder stages beyond the trained one, which hold their initial values.
        fresh: tensors of the decoder with new random values: all that was not pretrained.
        segmentation: tensors that nnU-Net draws itself, whatever the file holds.
        plans_name: the name of the plans to train with (``-p``).
        notes: what nnU-Net would feed the network differently from pretraining, and what of a pretrained
            decoder does not fit.
    """

    trained_steps: int
    pretrained: int
    untrained: int
    fresh: int
    segmentation: int
    plans_name: str
    notes: list[str] = field(default_factory=list)


def export_nnunet(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    plans: str | os.PathLike[str],
    configuration: str = "3d_fullres",
    dataset_json: str | os.PathLike[str] | None = None,
    classes: int | None = None,
    write_plans: str | os.PathLike[str] | None = None,
    patch_size: tuple[int, int, int] | None = None,
    checkpoint: str = "last",
    seed: int = 0,
) -> NnunetExport:
    """Write the weights of the plans' whole network, its encoder pretrained, to ``output``; and its decoder,
    where that was pretrained and the plans have the same stages.

    Args:
        source: the folder of ``pgl pretrain``, or a file of ``pgl export --format encoder``.
        output: the file to write, usually ``*.pth``.
        plans: the plans file of the dataset.
        configuration: the entry of its ``configurations`` that will be trained.
        dataset_json: the dataset's ``dataset.json``, for the number of channels and classes; or
        classes: outputs of the network, background included. Without either, two; nnU-Net loads its
            segmentation layers from no file, so that other numbers work as well.
        write_plans: also write plans to this file, ``NAME.json``, with the encoder's network, spacing and
            normalisation, and make the weights for them; then ``plans`` may be of another network.
        patch_size: (D, H, W) voxels of the written plans; default: near those of ``plans``.
        checkpoint: which weights of the run: ``last``, ``best`` or ``initial``.
        seed: of the decoder's random values.

    Raises:
        FileNotFoundError: a file or the run is missing.
        FileExistsError: ``write_plans`` would replace plans that are not of this program.
        ValueError: the encoder does not fit the plans; all differences are listed. Or a file is damaged or
            of another kind.
    """
    check_output(output, "pgl_nnunet.pth", source)
    if patch_size is not None and write_plans is None:
        raise ValueError("patch_size is for the plans of --write-plans; other plans have their own")
    content = encoder_of(source, checkpoint)
    network = content["network"]
    document = read_json(plans, PLANS)
    channels, outputs = _heads(document, configuration, str(plans), dataset_json, classes)
    if write_plans is not None:
        target = Path(write_plans)
        _check_that_it_may_be_written(target, Path(output))
        document = adapted(document, configuration, network, target.stem, str(plans), patch_size)
        document["pgl"] = _made_of(network, configuration)
    planned = read_configuration(document, configuration, str(plans))
    found = differences(network, planned, channels)
    if found:
        raise ValueError(
            f"the encoder does not fit {configuration!r} of {plans}: {listed(found, limit=40)}. Pretrain "
            "with the plans' encoder, or let --write-plans NAME.json write plans with this encoder's network"
        )
    decoder = planned["architecture"]["arch_kwargs"].get("n_conv_per_stage_decoder")
    unet = seeded_module(seed, lambda: _build(network, decoder, outputs, str(plans)))
    unet.encoder.load_state_dict(content["network_weights"], strict=True)
    taken, notes = _hand_over_decoder(unet.decoder, content.get("decoder_weights", {}), decoder)
    file = {
        # As it is: tensors of several names share their memory, and so they do in the file.
        "network_weights": dict(unet.state_dict()),
        "pgl": {**_made_of(network, configuration), "decoder_seed": seed, "classes": outputs},
    }
    if write_plans is not None:
        write_json(target, document)
    write_tensors(output, file)
    return NnunetExport(
        trained_steps=network["trained_steps"],
        plans_name=str(document.get("plans_name")) if write_plans is None else target.stem,
        notes=[*notes, *input_notes(network, document, planned)],
        **_count(unet, network["feature_level"], taken),
    )


def count_classes(dataset: dict[str, Any], source: str) -> int:
    """Outputs of nnU-Net's network for a ``dataset.json``: its labels, background included and ``ignore``
    not; or, where a label is a list, its regions.

    Raises:
        ValueError: ``labels`` is missing or malformed.
    """
    labels = dataset.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{source}: 'labels' must name the labels, as in nnU-Net v2, got {labels!r}")
    values = {name: value for name, value in labels.items() if name != "ignore"}
    try:
        groups = [
            {int(v) for v in value} if isinstance(value, list) else {int(value)} for value in values.values()
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: a label must be a number or a list of numbers: {error}") from error
    if any(isinstance(value, list) and len(value) > 1 for value in values.values()):
        return sum(group != {0} for group in groups)
    return len(set().union(*groups))


def _heads(
    plans: dict[str, Any],
    configuration: str,
    source: str,
    dataset_json: str | os.PathLike[str] | None,
    classes: int | None,
) -> tuple[int, int]:
    """Image channels and outputs of the network."""
    if dataset_json is not None and classes is not None:
        raise ValueError("give dataset_json or classes, not both")
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be 1 or more, background included, got {classes}")
    if dataset_json is not None:
        dataset = read_json(dataset_json, "a dataset.json of nnU-Net v2")
        channels = dataset.get("channel_names", dataset.get("modality"))
        if not isinstance(channels, dict) or not channels:
            raise ValueError(
                f"{dataset_json}: 'channel_names' must name the image channels, got {channels!r}"
            )
        return len(channels), count_classes(dataset, str(dataset_json))
    schemes = read_configuration(plans, configuration, source).get("normalization_schemes")
    if not isinstance(schemes, list) or not schemes:
        raise ValueError(
            f"{source}: normalization_schemes of {configuration!r} must have an entry a channel, "
            f"got {schemes!r}"
        )
    return len(schemes), classes if classes is not None else DEFAULT_CLASSES


def _check_that_it_may_be_written(plans: Path, output: Path) -> None:
    if plans.suffix != ".json":
        raise ValueError(
            f"--write-plans needs a file NAME.json, which nnU-Net finds by `-p NAME`, got {plans}"
        )
    if plans.resolve() == output.resolve():
        raise ValueError(f"--output and --write-plans are the same file, {plans}")
    if plans.exists() and not _is_ours(plans):
        raise FileExistsError(
            f"{plans} exists and was not written by pgl: choose another name for --write-plans"
        )


def _is_ours(plans: Path) -> bool:
    try:
        return "pgl" in read_json(plans, PLANS)
    except (OSError, ValueError):
        return False


def _build(network: dict[str, Any], decoder: Any, outputs: int, source: str) -> Any:
    """The U-Net around the encoder, with fresh weights.

    The encoder's arguments are known to equal the plans', so its own are used: nothing that the plans name
    is imported.
    """
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    arguments = constructor_arguments(network)
    del arguments["return_skips"]
    steps = arguments["n_stages"] - 1
    per_stage = [decoder] * steps if isinstance(decoder, int) else decoder
    if (
        not isinstance(per_stage, list)
        or len(per_stage) != steps
        or not all(isinstance(n, int) and 0 < n < 100 for n in per_stage)
    ):
        raise ValueError(
            f"{source}: n_conv_per_stage_decoder must be {steps} positive numbers, got {decoder!r}"
        )
    unet = ResidualEncoderUNet(
        **arguments, num_classes=outputs, n_conv_per_stage_decoder=per_stage, deep_supervision=True
    )
    unet.apply(unet.initialize)
    return unet


def _made_of(network: dict[str, Any], configuration: str) -> dict[str, Any]:
    return {"network": network, "configuration": configuration, "pgl_ops_version": pgl.__version__}


def _hand_over_decoder(
    decoder: nn.Module, pretrained: Mapping[str, Tensor], convolutions: Any
) -> tuple[set[str], list[str]]:
    """Copy what was pretrained of the decoder, as far as the plans' has the same stages: the names of what
    was copied, and a note about the rest.
    """
    fitting = leading_stages(pretrained, decoder.state_dict())
    decoder.load_state_dict(fitting, strict=False)
    if len(fitting) == len(pretrained):
        return set(fitting), []
    rest = len({stage_of(name) for name in pretrained} - {stage_of(name) for name in fitting})
    return set(fitting), [
        f"{rest} of the decoder's pretrained stages are left out and start afresh: n_conv_per_stage_decoder "
        f"is {convolutions} in the plans, and was 1 a stage in pretraining"
    ]


def _count(unet: nn.Module, feature_level: int, of_decoder: Collection[str]) -> dict[str, int]:
    seen: set[int] = set()
    counts = {"pretrained": 0, "untrained": 0, "fresh": 0, "segmentation": 0}
    # Encoder names come first, so that its tensors count there and not under decoder.encoder.
    for name, tensor in unet.state_dict().items():
        if _address(tensor) in seen:
            continue
        seen.add(_address(tensor))
        counts[_origin(name, feature_level, of_decoder)] += 1
    return counts


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _origin(name: str, feature_level: int, of_decoder: Collection[str]) -> str:
    if _SEGMENTATION in name:
        return "segmentation"
    if not name.startswith("encoder."):
        return "pretrained" if name.removeprefix("decoder.") in of_decoder else "fresh"
    parts = name.split(".")
    return "untrained" if parts[1] == "stages" and int(parts[2]) > feature_level else "pretrained"
