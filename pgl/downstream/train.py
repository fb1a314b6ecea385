"""``pgl finetune``: a segmentation network from few labels, on top of pretrained weights or none.

The run's folder, RUN/::

    config.yaml            every setting, readable by ``pgl finetune --config``
    environment.json       for each start: versions, device, command line
    split.json             names of the training, unused and test cases
    weights.json           which tensors came from the weights file, by name
    log.txt                what was said on the terminal
    metrics.jsonl          {"kind": "train", "step", "loss", "learning_rate", "steps_per_s", "seconds"}
    checkpoints/last.pt    the latest step, with all that ``--resume`` needs
    model.pt               the final network, for ``pgl predict``
    results.json, .csv     Dice and 95 % Hausdorff distance of each test case and class, and their means

The network of the last step is the one that is tested: nothing is chosen by its score on the test cases.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from monai.losses import DiceCELoss
from torch import nn

from pgl.cache.manifest import sha256_of
from pgl.downstream.config import RANDOM, FinetuneConfig, check
from pgl.downstream.fresh_stages import check_with_file
from pgl.downstream.inference import probabilities
from pgl.downstream.labels import LabelledCache, digest_of
from pgl.downstream.metrics import Score, score_case
from pgl.downstream.model_file import NAME, Segmenter, save_model
from pgl.downstream.network import Loaded, build_unet, load_pretrained
from pgl.downstream.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from pgl.downstream.results import plain_scores, show, summarise, write_csv
from pgl.downstream.resume import load_state, prepare_folder, save_state
from pgl.downstream.sampling import PatchDataset, cut, make_loader
from pgl.downstream.setup import (
    accelerator,
    check_patch,
    description,
    intensity,
    labelled_cache,
    prepare_source,
    pretrained_weights,
    say_loaded,
)
from pgl.downstream.splits import Split
from pgl.export import read_export
from pgl.files.atomic import write_json
from pgl.files.lock import only_writer, reading
from pgl.networks import seeded_module
from pgl.runs.folder import SPLIT
from pgl.settings import to_plain
from pgl.training.devices import precision_of, slow_precision
from pgl.training.kept_memory import keep_freed_memory
from pgl.training.readers import starting_readers, too_many_readers
from pgl.training.record import RunRecord, write_environment, write_settings
from pgl.training.state import refuse_what_is_not_finite
from pgl.training.watch import finish_the_step_on_signal

RESULTS_FORMAT = "pgl-finetune-results"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train on a share of the labelled cases, test on the cases that are kept for it.

    Args:
        config: all settings.

    Returns:
        The content of results.json.

    Raises:
        ValueError: settings or weights that do not fit, a split without cases, or another run's settings
            with ``resume``.
        FileNotFoundError: no cache, no weights file, or nothing to resume.
        FileExistsError: ``output`` holds something and ``resume`` is not set.
        InUse: another run is writing to ``config.output``, or ``pgl prepare`` to the cache.
        FloatingPointError: the loss or a weight is no longer finite.
        KeyboardInterrupt: stopped by a signal, after the state was saved.
    """
    check(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    export = None if config.weights == RANDOM else read_export(config.weights)
    if export is not None:
        check_with_file(config, export, description(config, export)["arguments"]["n_stages"])
    folder = Path(config.output)
    with only_writer(folder):
        prepare_folder(folder, config)
        prepare_source(config)
        with reading(config.data):
            cache = labelled_cache(config)
            split = cache.split(config.split, config.fraction, config.seed)
            return _Run(config, cache, split, export, folder).run()


class _Run:
    """The parts of a run and its loop."""

    def __init__(
        self,
        config: FinetuneConfig,
        cache: LabelledCache,
        split: Split,
        export: dict[str, Any] | None,
        folder: Path,
    ) -> None:
        self.config, self.cache, self.split, self.folder = config, cache, split, folder
        self.description = description(config, export)
        self.intensity = intensity(config, export)
        check_patch(config, self.description)
        train = config.train
        self.precision = precision_of(train.precision, train.accelerator)
        self.fabric = Fabric(
            accelerator=accelerator(train.accelerator),
            devices=1,
            precision=self.precision,  # type: ignore[arg-type]
        )
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        outputs = cache.task.outputs
        self.network: nn.Module = seeded_module(
            config.seed, lambda: build_unet(self.description, outputs, config.decoder_convs)
        )
        loaded = self._load(export) if export else None
        optimizer = build_optimizer(self.network, config.optimizer)
        self.forward, self.optimizer = self.fabric.setup(self.network, optimizer)
        self.weights_sha256 = None if export is None else sha256_of(Path(config.weights))
        self.data_sha256 = digest_of(cache.records, split.test, split.training)
        saved = load_state(folder, config, self.weights_sha256, self.data_sha256, split)
        self.step = 0
        if saved:
            self.step = saved["step"]
            self.network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
        self.record = RunRecord(folder, self.step, train.steps, True)
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self._write_head(export, loaded)

    def _load(self, export: dict[str, Any]) -> Loaded:
        weights, left_out = pretrained_weights(self.config, export, self.description)
        loaded = load_pretrained(self.network, weights, self.config.weights)
        loaded.unused += left_out
        return loaded

    def run(self) -> dict[str, Any]:
        config = self.config
        self.record.start()
        try:
            with finish_the_step_on_signal() as asked_to_stop:
                self._train(asked_to_stop)
        finally:
            self.record.close()
        spacing = self.cache.images.spacing_mm
        segmenter = Segmenter(
            self.network.eval(),
            list(self.cache.task.names),
            self.intensity,
            spacing,
            config.patches.patch_size,
            self.precision,
        )
        save_model(self.folder / NAME, segmenter, self.description, config.decoder_convs, self.step)
        scores = self._test()
        results = self._results(scores)
        write_csv(self.folder / "results.csv", scores)
        write_json(self.folder / "results.json", results)
        title = (
            f"{len(self.split.test)} test cases, {len(self.split.training)} training cases, {config.weights}"
        )
        show(scores, self.record.console, title)
        self.record.say(f"done: {self.step} steps, everything lies in {self.folder}")
        return results

    def _train(self, asked_to_stop: threading.Event) -> None:
        config, train = self.config, self.config.train
        if self.step >= train.steps:
            return
        cases = [self.cache.subjects.index(subject) for subject in self.split.training]
        dataset = PatchDataset(self.cache, cases, config.patches, config.augment, config.seed)
        self.network.train()
        if not config.optimizer.encoder_factor:
            # Frozen altogether: batch normalisation would go on counting.
            self.network.encoder.eval()  # type: ignore[union-attr]
        losses: list[torch.Tensor] = []
        began = clock = time.perf_counter()
        with starting_readers():
            loader = make_loader(
                dataset,
                self.step,
                train.steps,
                train.batch_size,
                train.workers,
                pinned=self.fabric.device.type == "cuda",
            )
            batches = iter(loader)
        for patches in batches:
            losses.append(self._training_step(patches.to(self.fabric.device)))
            self.step += 1
            last, stop = self.step == train.steps, asked_to_stop.is_set()
            if last or stop or self.step % train.log_every == 0 or self.step % train.checkpoint_every == 0:
                loss = float(torch.stack(losses).mean())
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss became {loss:g} before step {self.step}: lower "
                        "optimizer.learning_rate, or use train.precision=32-true; the last checkpoint "
                        "holds a good state"
                    )
                now = time.perf_counter()
                numbers = {
                    "loss": loss,
                    "learning_rate": learning_rate_at(self.step - 1, train.steps, config.optimizer),
                    "steps_per_s": len(losses) / max(now - clock, 1e-9),
                    "seconds": now - began,
                }
                self.record.write("train", self.step, numbers)
                losses, clock = [], now
            if last or stop or self.step % train.checkpoint_every == 0:
                refuse_what_is_not_finite(self.network, self.step)
                save_state(
                    self.folder,
                    config,
                    self.weights_sha256,
                    self.data_sha256,
                    self.split,
                    self.step,
                    self.network,
                    self.optimizer,
                )
            if stop and not last:
                self.record.say(f"stopped after step {self.step}; `--resume` goes on from here")
                raise KeyboardInterrupt
            self.record.show(self.step)

    def _training_step(self, patches: Any) -> torch.Tensor:
        config = self.config
        rate = learning_rate_at(self.step, config.train.steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)  # type: ignore[arg-type]
        self.optimizer.zero_grad()
        inputs, classes = cut(patches, config.patches.patch_size, self.intensity)
        loss = self.loss(self.forward(inputs).float(), classes)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(
            self.forward,
            self.optimizer,
            max_norm=config.optimizer.clip_gradient,
            error_if_nonfinite=False,  # where losses are scaled, the optimiser leaves such a step out
        )
        self.optimizer.step()
        return loss.detach()

    def _test(self) -> list[Score]:
        self.network.eval()
        scores: list[Score] = []
        for place, subject in enumerate(self.split.test, start=1):
            self.record.say(f"testing {subject} ({place} of {len(self.split.test)})")
            index = self.cache.subjects.index(subject)
            with self.fabric.autocast():
                volume = probabilities(
                    self.network,
                    self.cache.read_image(index),
                    self.config.patches.patch_size,
                    self.intensity,
                    self.config.inference,
                    self.fabric.device,
                )
            truth = self.cache.read_classes(index)
            names, spacing = self.cache.task.names, self.cache.images.spacing_mm
            scores += score_case(subject, volume.argmax(0).astype("uint8"), truth, names, spacing)
        return scores

    def _results(self, scores: list[Score]) -> dict[str, Any]:
        config = self.config
        return {
            "format": RESULTS_FORMAT,
            "version": 1,
            "weights": config.weights,
            "weights_sha256": self.weights_sha256,
            "fraction": config.fraction,
            "seed": config.seed,
            "steps": self.step,
            "classes": list(self.cache.task.names),
            "spacing_mm": list(self.cache.images.spacing_mm),
            **vars(self.split),
            "data_sha256": self.data_sha256,
            "mean": summarise(scores),
            "cases": plain_scores(scores),
        }

    def _write_head(self, export: dict[str, Any] | None, loaded: Loaded | None) -> None:
        config, say, split = self.config, self.record.say, self.split
        write_settings(self.folder, to_plain(config))
        write_json(self.folder / SPLIT, vars(split))
        write_environment(self.folder, self.fabric.device, self.fabric.world_size, self.precision)
        if self.step:
            say(f"resuming {self.folder} after step {self.step} of {config.train.steps}")
        say(
            f"{len(split.training)} training, {len(split.test)} test and {len(split.unused)} unused cases of "
            f"{config.data}; classes {', '.join(self.cache.task.names)}; {self.fabric.device.type}"
        )
        for note in (
            too_many_readers(config.train.workers),
            slow_precision(self.precision, self.fabric.device),
        ):
            if note:
                say(note)
        say_loaded(self.record.say, self.folder, config, export, loaded, self.cache.images.spacing_mm)
