"""Fine-tune a pretrained encoder in a MONAI training loop.

    pgl phantom --output ct --cases 6
    pgl prepare ct/images --output cache
    pgl pretrain --data cache --output run --config configs/smoke.yaml
    pgl export run --output encoder.pt
    python examples/monai_finetune.py --encoder encoder.pt --images ct/images --labels ct/labels --classes 9

Images and labels are paired by file name. The last fifth of the cases, at least one, is for validation. What
belongs to the encoder is its input: axes, spacing and intensities as in pretraining, all written in its file.
The rest is MONAI as in any other script: copy it and change what you like.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.networks.blocks import UnetOutBlock, UnetUpBlock
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    SpatialPadd,
)
from monai.utils import set_determinism
from torch import Tensor, nn

import pgl
from pgl.export import read_export


class SegmentationNet(nn.Module):
    """The pretrained encoder with MONAI's U-Net decoder.

    Tensor[N, 1, D, H, W] to logits [N, classes, D, H, W]. D, H, W must be multiples of the encoder's total
    stride, which is ``read_export(FILE)["network"]["feature_strides"][-1]``.
    """

    def __init__(self, encoder_file: Path, classes: int) -> None:
        super().__init__()
        encoder: Any = pgl.load_encoder(encoder_file).train()
        widths, strides = encoder.output_channels, encoder.strides
        self.encoder = encoder
        self.decoder = nn.ModuleList(
            UnetUpBlock(
                spatial_dims=3,
                in_channels=widths[stage],
                out_channels=widths[stage - 1],
                kernel_size=encoder.kernel_sizes[stage - 1],
                stride=1,
                upsample_kernel_size=strides[stage],
                norm_name="instance",
            )
            for stage in range(len(widths) - 1, 0, -1)
        )
        self.head = UnetOutBlock(spatial_dims=3, in_channels=widths[0], out_channels=classes)

    def forward(self, images: Tensor) -> Tensor:
        *skips, features = self.encoder(images)
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            features = up(features, skip)
        return self.head(features)


def read_case(image: Path, label: Path, network: dict[str, Any]) -> dict[str, Tensor]:
    """Image and label, Tensor[1, D, H, W], as the encoder has seen images in pretraining.

    Args:
        image: CT in HU, in a format that pgl prepare reads.
        label: whole numbers on the image's grid.
        network: ``read_export(FILE)["network"]``.
    """
    low, high = network["intensity"]["clip_hu"]
    hu = on_grid(image, network["spacing_mm"], sitk.sitkLinear, low)
    classes = on_grid(label, network["spacing_mm"], sitk.sitkNearestNeighbor, 0)
    normalised = (np.clip(hu, low, high) - network["intensity"]["mean_hu"]) / network["intensity"]["std_hu"]
    return {
        "image": torch.from_numpy(normalised.astype(np.float32))[None],
        "label": torch.from_numpy(classes.astype(np.int64))[None],
    }


def on_grid(path: Path, spacing_mm: Sequence[float], interpolator: int, outside: float) -> np.ndarray:
    """The array (D, H, W) at a spacing (D, H, W), axes toward superior, posterior, left."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    spacing_xyz = [float(mm) for mm in reversed(spacing_mm)]
    size_xyz = [
        max(1, round(n * old / new))
        for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing_xyz, strict=True)
    ]
    resampled = sitk.Resample(
        image,
        size_xyz,
        sitk.Transform(),
        interpolator,
        image.GetOrigin(),
        spacing_xyz,
        image.GetDirection(),
        outside,
    )
    return sitk.GetArrayFromImage(resampled)


def train(arguments: argparse.Namespace) -> float:
    """Fine-tune, validate, save; returns the mean Dice of the validation cases."""
    set_determinism(arguments.seed)
    network = read_export(arguments.encoder)["network"]
    patch = [
        -(-size // stride) * stride
        for size, stride in zip(
            arguments.patch or network["patch_size"], network["feature_strides"][-1], strict=True
        )
    ]
    images = sorted(path for path in arguments.images.iterdir() if path.is_file())
    cases = [read_case(path, arguments.labels / path.name, network) for path in images]
    held_out = max(1, len(cases) // 5)
    training, validation = cases[:-held_out], cases[-held_out:]

    keys = ["image", "label"]
    augment = Compose(
        [
            SpatialPadd(keys, patch, value=[training[0]["image"].min().item(), 0]),
            RandCropByPosNegLabeld(keys, "label", patch, pos=2, neg=1, num_samples=arguments.batch),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandScaleIntensityd("image", factors=0.1, prob=0.3),
            RandGaussianNoised("image", prob=0.2, std=0.1),
        ]
    )
    loader = DataLoader(Dataset(training, augment), batch_size=1, shuffle=True)
    device = torch.device(arguments.device)
    net = SegmentationNet(arguments.encoder, arguments.classes).to(device)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    # The encoder has learnt something already: small steps there, large ones in the new decoder.
    optimizer = torch.optim.AdamW(
        [
            {"params": net.encoder.parameters(), "lr": arguments.rate / 10},
            {"params": [*net.decoder.parameters(), *net.head.parameters()]},
        ],
        lr=arguments.rate,
    )
    step = 0
    while step < arguments.steps:
        for batch in loader:
            loss = loss_of(net(batch["image"].to(device)), batch["label"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % arguments.log_every == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            if step == arguments.steps:
                break

    net.eval()
    dice = DiceMetric(include_background=False)
    with torch.no_grad():
        for case in validation:
            logits = sliding_window_inference(
                case["image"][None].to(device),
                patch,
                sw_batch_size=2,
                predictor=net,
                overlap=0.5,
                mode="gaussian",
            )
            predicted = one_hot(logits.argmax(1, keepdim=True), arguments.classes)
            dice(predicted, one_hot(case["label"][None].to(device), arguments.classes))
    mean = float(dice.aggregate())
    print(f"validation Dice {mean:.4f} of {held_out} case(s)")
    if arguments.output:
        torch.save({"state_dict": net.state_dict(), "classes": arguments.classes}, arguments.output)
    return mean


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained encoder in a MONAI training loop.")
    parser.add_argument("--encoder", type=Path, required=True, help="of `pgl export --format encoder`")
    parser.add_argument("--images", type=Path, required=True, help="folder of CT")
    parser.add_argument(
        "--labels", type=Path, required=True, help="folder of labels with the images' file names"
    )
    parser.add_argument("--classes", type=int, default=2, help="labels, background included")
    parser.add_argument("--patch", type=int, nargs=3, help="D H W voxels (default: pretraining's)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the decoder")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where to save the network")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse())
