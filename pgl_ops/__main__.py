"""``python -m pgl_ops``: a report on the installation, to paste into a bug report."""

from __future__ import annotations

import os
import platform
import sys

import torch

import pgl_ops


def report() -> tuple[str, bool]:
    """The installation in one line a fact; and whether the kernels give the reference's result everywhere."""
    build = pgl_ops.build_info()
    lines = [
        ("pgl_ops", build["version"]),
        ("python", f"{sys.version.split()[0]} on {platform.platform()}"),
        ("torch", f"{torch.__version__} (built for CUDA {torch.version.cuda})"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        *((key.replace("_", " "), value) for key, value in build.items() if key != "version"),
    ]
    right = True
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or "cpu"
        found = _self_check(torch.device(device))
        right = right and found.startswith("ok")
        lines.append((device, f"{name}: {found}"))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines), right


def _self_check(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((2, 8, 6, 7, 8), generator=generator).to(device)
    prediction = torch.randn((2, 8, 3, 4, 5), generator=generator).to(device)
    boxes = torch.tensor([[0, 1.0, 0.5, 2.0, 5.5, 6.0, 7.0], [1, 0, 0, 0, 6, 7, 8]], device=device)
    try:
        found = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes)
        expected = pgl_ops.reference.aligned_cosine_loss3d(prediction, features, boxes)
    except Exception as error:
        return f"FAILED: {error}"
    difference = abs(found.item() - expected.item())
    return f"ok (differs from the reference by {difference:.1e})" if difference < 1e-5 else "WRONG RESULT"


def main() -> int:
    """Print the report; 1 if a device gives a wrong result or none."""
    text, right = report()
    print(text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
