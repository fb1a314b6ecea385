"""The words of ``pgl export``: its options, and what it says about what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_CONFIGURATION = "3d_fullres"
# Options that only some formats have.
_BELONG_TO = {
    "plans": ("nnunet",),
    "configuration": ("nnunet",),
    "dataset_json": ("nnunet",),
    "classes": ("nnunet",),
    "write_plans": ("nnunet",),
    "seed": ("nnunet",),
    "patch_size": ("nnunet", "nnssl"),
}


def export_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl export``."""
    parser.add_argument(
        "run", metavar="RUN", help="the folder of `pgl pretrain`, or a file of `--format encoder`"
    )
    parser.add_argument(
        "--format",
        choices=["encoder", "nnunet", "nnssl"],
        default="encoder",
        help="encoder: the encoder's weights and description, for `pgl.load_encoder`; nnunet: for "
        "`nnUNetv2_train -pretrained_weights`; nnssl: for `nnUNetv2_train_pretrained`. See docs/exporting.md",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the file to write, replaced if it exists"
    )
    parser.add_argument(
        "--checkpoint",
        choices=["last", "best", "initial"],
        default="last",
        help="the weights: of the last step, of the highest matching accuracy, or of the untrained network",
    )
    parser.add_argument("--plans", metavar="FILE", help="nnunet: the plans file of the dataset")
    parser.add_argument(
        "--configuration",
        metavar="NAME",
        help=f"nnunet: the plans' configuration (default: {_CONFIGURATION})",
    )
    parser.add_argument(
        "--dataset_json",
        "--dataset-json",
        metavar="FILE",
        help="nnunet: the dataset's dataset.json, for the number of channels and classes",
    )
    parser.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="nnunet: the number of classes, background included (default: 2)",
    )
    parser.add_argument(
        "--write_plans",
        "--write-plans",
        metavar="NAME.json",
        help="nnunet: also write plans with the encoder's network, spacing and normalisation, and make the "
        "weights for these",
    )
    parser.add_argument(
        "--patch_size",
        type=tuple[int, int, int],
        metavar="D,H,W",
        help="nnunet with --write_plans, and nnssl: voxels of a patch in fine-tuning (default: nnunet: near "
        "that of --plans; nnssl: pretraining's)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="nnunet: of the decoder's values (default: 0)")


def check_export(arguments: Namespace) -> None:
    """Refuse options that do not belong together.

    Raises:
        ValueError: with the options' names.
    """
    for option, formats in _BELONG_TO.items():
        if getattr(arguments, option) is not None and arguments.format not in formats:
            raise ValueError(f"--{option} is for --format {' and '.join(formats)}, got {arguments.format}")
    if arguments.format != "nnunet":
        return
    if arguments.plans is None:
        raise ValueError(
            "--format nnunet needs --plans FILE, the dataset's plans (nnUNet_preprocessed/DATASET/*.json)"
        )
    if arguments.dataset_json is not None and arguments.classes is not None:
        raise ValueError("--dataset_json and --classes exclude each other")
    if arguments.patch_size is not None and arguments.write_plans is None:
        raise ValueError("--patch_size needs --write_plans, since the plans of --plans have their own patch")


def export(arguments: Namespace) -> int:
    """Export, and say what was written."""
    if arguments.format == "nnunet":
        _nnunet(arguments)
    elif arguments.format == "nnssl":
        _nnssl(arguments)
    else:
        _encoder(arguments)
    return 0


def _encoder(arguments: Namespace) -> None:
    from pgl.export.encoder import export_encoder

    network = export_encoder(arguments.run, arguments.output, arguments.checkpoint)
    after = f"after {network['trained_steps']} steps"
    load = f"pgl.load_encoder({str(arguments.output)!r})"
    if "decoder_level" not in network:
        say(f"{arguments.output}: the encoder {after}; load it with {load}")
        return
    say(
        f"{arguments.output}: encoder and decoder (its stage {network['decoder_level']} and coarser ones) "
        f"{after}; `pgl finetune --weights` takes both, {load} the encoder"
    )


def _nnunet(arguments: Namespace) -> None:
    from pgl.export.nnunet import export_nnunet

    configuration = arguments.configuration or _CONFIGURATION
    written = export_nnunet(
        arguments.run,
        arguments.output,
        arguments.plans,
        configuration=configuration,
        dataset_json=arguments.dataset_json,
        classes=arguments.classes,
        write_plans=arguments.write_plans,
        patch_size=arguments.patch_size,
        checkpoint=arguments.checkpoint,
        seed=arguments.seed or 0,
    )
    untrained = (
        f", {written.untrained} untrained (stages beyond the trained one)" if written.untrained else ""
    )
    say(
        f"{arguments.output}: {written.pretrained} tensors from {written.trained_steps} steps of pretraining"
        f"{untrained}, {written.fresh} fresh (decoder); nnU-Net draws the {written.segmentation} of the "
        "segmentation layers itself"
    )
    plans = Path(arguments.write_plans or arguments.plans)
    if arguments.write_plans:
        say(f"{plans}: plans for these weights; put it into nnUNet_preprocessed/DATASET, then")
        say(f"  nnUNetv2_preprocess -d DATASET -plans_name {plans.stem} -c {configuration}")
    for note in written.notes:
        say(f"note: {note}")
    weights = f"-pretrained_weights {arguments.output}"
    say(f"  nnUNetv2_train DATASET {configuration} FOLD -p {plans.stem} {weights}")


def _nnssl(arguments: Namespace) -> None:
    from pgl.export.nnssl import export_nnssl

    network = export_nnssl(arguments.run, arguments.output, arguments.patch_size, arguments.checkpoint)
    steps = network["trained_steps"]
    say(f"{arguments.output}: the encoder after {steps} steps, as a checkpoint of nnssl")
    say(f"  nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc {arguments.output} -am like_pretrained")
    say("  nnUNetv2_train_pretrained DATASET 3d_fullres FOLD -p PLANS -tr PretrainedTrainer")
    say("note: this route normalises each image by itself (z-score); --format nnunet keeps pretraining's HU")
