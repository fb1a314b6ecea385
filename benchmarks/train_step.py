"""``python -m benchmarks.train_step``: what a PGL training step costs beside its bare network.

Contexts are random, so no data is needed. The bare network step is the online encoder's forward and backward
of the same views, already on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch


def main(argv: list[str] | None = None) -> int:
    """Measure and print one JSON object."""
    from pgl.config import MethodSettings
    from pgl.method import PGL
    from pgl.networks import EncoderSettings, default_encoder
    from pgl.views import cut, sample_view_pairs

    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="samples a step; 32 on a GPU, 2 on a CPU")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    batch = options.batch or (32 if gpu else 2)
    patch, context = ((16, 96, 96), (28, 168, 168)) if gpu else ((16, 48, 48), (28, 84, 84))
    encoder: EncoderSettings = default_encoder()
    heads = MethodSettings() if gpu else MethodSettings(projector_hidden=256, predictor_hidden=256)
    torch.manual_seed(0)
    method = PGL(encoder, heads).to(device)
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(-1000, 400, (batch, 1, *context), generator=generator, dtype=torch.int16)
    contexts = contexts.to(device)
    precision = torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext()

    def network_step(views: torch.Tensor) -> None:
        with precision:
            loss = method.backbone(views).float().square().mean()
        loss.backward()

    def whole_step() -> None:
        pairs = sample_view_pairs(generator, batch, context, patch).to(device)
        views = (cut(contexts, pairs).clamp(-1024, 325) + 158.58) / 324.7
        with precision:
            loss = method(views, pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update_target(0.99)

    views = (cut(contexts, sample_view_pairs(generator, batch, context, patch).to(device)) + 158.58) / 324.7
    times: dict[str, list[float]] = {"network": [], "step": []}
    for _ in range(options.steps + 2):
        for name, run in (("network", lambda: network_step(views)), ("step", whole_step)):
            began = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
            method.zero_grad(set_to_none=True)
    network, step = (median(times[name][2:]) for name in ("network", "step"))
    record = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "batch": batch,
        "patch": patch,
        "ratio_step_to_network": step / network,
        "samples_per_second": batch / step,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }
    text = json.dumps(record)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
