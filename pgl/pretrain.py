"""``pgl pretrain``: run the method over a cache of volumes, measure it, and leave everything in one folder.

The run's folder, RUN/::

    config.yaml            every setting of the run, readable by ``pgl pretrain --config``
    environment.json       versions, device, command line, which cases train and which validate
    log.txt                what was said on the terminal
    metrics.jsonl          one JSON object a line, told apart by "kind":
        {"kind": "train", "step", "loss", "learning_rate", "ema", "steps_per_s", "seconds"}
        {"kind": "validation", "step", "matching_accuracy", "chance", "feature_spread", "feature_rank",
         "projected_matching_accuracy", "projected_spread", "loss"}
        The first validation line has step 0: the untrained network.
    tensorboard/           the same numbers for TensorBoard
    checkpoints/
        initial.pt         the untrained network (step 0)
        last.pt            the latest step, with all that ``--resume`` needs
        best.pt            the step with the highest matching accuracy so far
        step-N.pt          with train.keep_every: last.pt as it was after step N, the newest few of them
    bad-batch-N.json       where step N had a loss that is not finite: the cases and boxes of its views

What a checkpoint holds is written in :mod:`pgl.training.checkpoint`; all load with ``weights_only=True``.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only

from pgl.cache.integrity import DamagedCase
from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig, settled
from pgl.config_check import check
from pgl.files.lock import only_writer, reading
from pgl.methods.registry import build_method
from pgl.networks import count_parameters
from pgl.runs.folder import BEST, INITIAL, LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import keep_last, kept_path, remove_partial, save_checkpoint
from pgl.training.contexts import Batch, ContextDataset, GlobalBatches, hold_out, make_loader
from pgl.training.device_feed import on_device
from pgl.training.devices import devices_of, precision_of, slow_precision
from pgl.training.kept_memory import keep_freed_memory
from pgl.training.process_group import AgreedStop, ends_with_the_run
from pgl.training.read_ahead import ReadAhead
from pgl.training.readers import starting_readers, too_many_readers
from pgl.training.record import RunRecord, write_environment, write_settings
from pgl.training.state import refuse_what_is_not_finite, restore, state_of, state_to_resume
from pgl.training.step import TrainingStep
from pgl.training.validation import Validation
from pgl.training.watch import LossWatch, agree, finish_the_step_on_signal


def pretrain(config: PretrainConfig) -> Path:
    """Run, or with ``config.resume`` continue, a pretraining.

    A resumed run ends in the same weights as one that was never interrupted (bitwise, on one CPU with the
    same number of threads), and its metrics are those of one, but for times. SIGINT, SIGTERM and SIGUSR1
    finish the step (with several processes: the next one that is logged), write ``last.pt`` and then raise
    KeyboardInterrupt.

    Args:
        config: all settings.

    Returns:
        The run's folder.

    Raises:
        ValueError: settings that do not fit together, or they or the cache differ from those of the run
            to resume.
        FileNotFoundError: no cache at ``config.data``, or nothing at ``config.output`` to resume.
        FileExistsError: ``config.output`` holds a run and ``resume`` is not set, or no run and it is.
        InUse: another run is writing to ``config.output``, or ``pgl prepare`` to the cache.
        FloatingPointError: the loss or the weights are no longer finite; the message names the cases of the
            step and the file that describes its batch.
        OSError: something cannot be written; checkpoints that are there stay whole.
        KeyboardInterrupt: stopped by a signal, after the state was saved.
    """
    check(config)
    config = settled(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with _locks(config):
        return _launch(config)


def _launch(config: PretrainConfig) -> Path:
    cache = VolumeCache(config.data)
    saved = state_to_resume(config, cache)
    train = config.train
    devices, num_nodes = devices_of(train)
    fabric = Fabric(
        accelerator=train.accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=precision_of(train.precision, train.accelerator),  # type: ignore[arg-type]
    )
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with ends_with_the_run():
        fabric.launch()
        return _Run(config, cache, fabric, saved).run()


@contextmanager
def _locks(config: PretrainConfig) -> Iterator[None]:
    """Keep another run away from the output, and the cases as they are; the first process does for all."""
    if not _is_first():
        yield
        return
    with reading(config.data), only_writer(config.output):
        yield


def _is_first() -> bool:
    """Whether this is the first of the run's processes, as far as the launcher has told before they meet."""
    node = os.environ.get("NODE_RANK", "0") if "RANK" not in os.environ else "0"
    return not getattr(rank_zero_only, "rank", 0) and node in ("", "0")


class _Run:
    """The parts of a run and its loop."""

    def __init__(
        self, config: PretrainConfig, cache: VolumeCache, fabric: Fabric, saved: dict[str, Any] | None
    ) -> None:
        self.config, self.cache, self.fabric = config, cache, fabric
        self.folder = Path(config.output)
        self.step = saved["step"] if saved else 0
        self.metrics: dict[str, float] = saved["metrics"] if saved else {}
        self.best: dict[str, float] = saved["best"] if saved else {}

        self.do_step = TrainingStep(config, build_method(config), fabric)
        self.method, self.optimizer = self.do_step.method, self.do_step.optimizer
        if saved:
            # After the set-up, so that the optimiser's state lands on the device of the parameters.
            restore(self.method, self.optimizer, saved)

        case_ids = [case.case_id for case in cache.cases]
        training, validation = hold_out(case_ids, config.validation.fraction, config.seed)
        self.case_ids = case_ids
        self.dataset = ContextDataset(
            cache,
            training,
            config.views,
            config.augment,
            config.seed,
            regions=config.method.regions,
            region_scale=config.method.region_scale,
            skip_damaged=config.train.skip_damaged,
        )
        if fabric.is_global_zero:
            remove_partial(self.folder)
        self.losses = LossWatch(
            fabric, case_ids, self.folder, self.step, saved["pending_losses"] if saved else ()
        )
        self.record = RunRecord(self.folder, self.step, config.train.steps, fabric.is_global_zero)
        self.validation = Validation(cache, validation, config) if fabric.is_global_zero else None
        if fabric.is_global_zero:
            self._write_head(training, validation)
        self.left_out: set[int] = set()
        for batch in self.validation.batches if self.validation else ():
            self._note_damaged(batch.damaged)

    def run(self) -> Path:
        steps = self.config.train.steps
        with ExitStack() as self.closing:
            # Before there is a last.pt: whoever sees it may ask this run to stop.
            asked_to_stop = self.closing.enter_context(finish_the_step_on_signal())
            if self.step == 0:
                self._validate()
                self._save(INITIAL, together=False)
                # So that a run that is killed at any later moment can be resumed.
                self._save(LAST, together=False)
            elif not kept_path(self.folder, self.step).exists():
                self._keep()  # killed just before it would have
            self.record.start()
            self.closing.callback(self.record.close)
            self._loop(asked_to_stop)
        self.record.say(f"done: {steps} steps, everything lies in {self.folder}")
        return self.folder

    def _loop(self, asked_to_stop: threading.Event) -> None:
        train, fabric = self.config.train, self.fabric
        numbers = GlobalBatches(
            self.step,
            train.steps,
            train.batch_size,
            fabric.global_rank,
            fabric.world_size,
            train.accumulate,
        )
        batches = on_device(self._read(numbers, asked_to_stop), fabric.device)
        while pieces := list(islice(batches, train.accumulate)):
            self.losses.add(self._training_step(pieces), pieces)
            for piece in pieces:
                self._note_damaged(piece.damaged)
            self.step += 1
            last = self.step == train.steps
            # Whether to stop is agreed upon where all processes meet.
            together = self.step % train.log_every == 0 or last
            if together:
                self._log()
            stop = agree(fabric, asked_to_stop.is_set()) if together or fabric.world_size == 1 else False
            if last or self.step % self.config.validation.every == 0:
                self.losses.check()
                self._validate()
                self.losses.restart_clock()
            if last or stop or self._is_kept() or self.step % train.checkpoint_every == 0:
                self.losses.check()
                self._save(LAST)
                self._keep()
            if stop and not last:
                self._say_stopped()
                raise AgreedStop
            self.record.show(self.step)

    def _is_kept(self) -> bool:
        every = self.config.train.keep_every
        return bool(every) and self.step % every == 0

    def _keep(self) -> None:
        if self._is_kept() and self.fabric.is_global_zero:
            keep_last(self.folder, self.step, self.config.train.kept)

    def _read(self, numbers: GlobalBatches, asked_to_stop: threading.Event) -> Iterator[Batch]:
        train = self.config.train
        on_gpu = self.fabric.device.type == "cuda"
        with starting_readers():
            batches: Iterator[Batch] = iter(
                make_loader(self.dataset, numbers, train.workers, train.prefetch, on_gpu)
            )
        if train.workers == 0:
            batches = ahead = ReadAhead(batches)
            self.do_step.have_meanwhile(ahead.ask)
            self.closing.callback(ahead.close)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                # Whoever asked to stop may have ended the reading processes as well; the last step is whole.
                if not asked_to_stop.is_set():
                    if isinstance(error, DamagedCase):
                        # Without the traceback of the process that read.
                        raise DamagedCase(str(error)) from None
                    raise
                self._save(LAST, together=False)
                self._say_stopped()
                raise KeyboardInterrupt from error
            yield batch

    def _note_damaged(self, cases: torch.Tensor) -> None:
        for case in set(cases.tolist()) - self.left_out:
            self.left_out.add(case)
            self.record.say(
                f"WARNING: case {self.case_ids[case]} is left out, since its file in {self.config.data} is "
                "damaged: run pgl prepare again to remake it",
                style="bold red",
            )

    def _say_stopped(self) -> None:
        self.record.say(f"stopped after step {self.step}; `--resume` goes on from here")

    def _training_step(self, pieces: Sequence[Batch]) -> torch.Tensor:
        return self.do_step(self.step, pieces)

    def _log(self) -> None:
        self._gather_damaged()
        loss, speed = self.losses.collect()
        numbers = {
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "ema": self.do_step.decay(self.step - 1),
            "steps_per_s": speed,
            "seconds": self.losses.seconds_since_start(),
        }
        self.record.write("train", self.step, numbers)

    def _gather_damaged(self) -> None:
        """Let the first process, which alone writes, know what the others have left out."""
        if self.config.train.skip_damaged and self.fabric.world_size > 1:
            mask = torch.zeros(len(self.case_ids), device=self.fabric.device)
            mask[list(self.left_out)] = 1
            everywhere = self.fabric.all_reduce(mask, reduce_op="sum")
            found = everywhere.nonzero().flatten().cpu()  # type: ignore[union-attr]
            self._note_damaged(found)

    def _validate(self) -> None:
        if self.validation is not None:
            with self.fabric.autocast():
                self.metrics = self.validation.measure(self.method)
            self.record.write("validation", self.step, self.metrics)
            self._report()
        self.fabric.barrier()

    def _report(self) -> None:
        now = self.metrics
        self.record.say(
            f"step {self.step}: matching accuracy {now['matching_accuracy']:.4f} "
            f"(chance {now['chance']:.4f}), feature spread {now['feature_spread']:.3f}, "
            f"rank {now['feature_rank']:.1f}, validation loss {now['loss']:.3f}"
        )
        threshold = self.config.validation.collapse_threshold
        for name in ("feature_spread", "projected_spread"):
            if name in now and not now[name] >= threshold:
                self.record.say(
                    f"WARNING, COLLAPSE: {name} is {now[name]:.4f}, below {threshold}: the features are "
                    "nearly the same everywhere. Lower optimizer.learning_rate, raise method.ema_start, or "
                    "use method.head_norm=batch.",
                    style="bold red",
                )
        # The untrained network is a reference, not a result.
        if self.step and now["matching_accuracy"] > self.best.get("matching_accuracy", -math.inf):
            self.best = {**now, "step": self.step}
            self._save(BEST, together=False)

    def _save(self, name: str, together: bool = True) -> None:
        """Write a checkpoint; ``together`` where all processes do so at the same step."""
        pending = self.losses.pending(together)
        if not self.fabric.is_global_zero:
            return
        refuse_what_is_not_finite(self.method, self.step)
        content = {
            "step": self.step,
            "samples": self.step * self.config.train.batch_size,
            "spacing_mm": list(self.cache.spacing_mm),
            "metrics": self.metrics,
            "best": self.best,
            "pending_losses": pending,
            **state_of(self.method, self.optimizer if name == LAST else None, self.config),
        }
        self.record.secure()
        save_checkpoint(checkpoint_path(self.folder, name), content)

    def _write_head(self, training: list[int], validation: list[int]) -> None:
        config, method, say = self.config, self.method, self.record.say
        names = {
            "training": [self.case_ids[i] for i in training],
            "validation": [self.case_ids[i] for i in validation],
        }
        write_settings(self.folder, to_plain(config))
        precision = precision_of(config.train.precision, config.train.accelerator)
        write_environment(self.folder, self.fabric.device, self.fabric.world_size, precision, names)
        if self.step:
            say(f"resuming {self.folder} after step {self.step} of {config.train.steps}")
        say(
            f"{len(training)} training and {len(validation)} validation cases of {config.data}, "
            f"{self.fabric.world_size} × {self.fabric.device.type}, {precision}, "
            f"{torch.get_num_threads()} CPU threads"
        )
        for note in (too_many_readers(config.train.workers), slow_precision(precision, self.fabric.device)):
            if note:
                say(note)
        if set(training) & set(validation):
            say(
                f"validation uses the training cases: {len(self.case_ids)} cases are too few to hold some "
                "out, or validation.fraction is 0"
            )
        backbone = method.backbone
        of, stages = config.method.features, len(config.encoder.strides)
        places = " and ".join(
            f"stage {level} at stride {stride}"
            for level, stride in zip(backbone.levels, backbone.strides, strict=True)
        )
        say(
            f"method {config.method.name}: {of} {count_parameters(backbone):,} trained parameters, "
            f"features of {places}, whole method {count_parameters(method):,}"
        )
        if backbone.deepest < stages - 1:
            say(
                f"stages {backbone.deepest + 1} to {stages - 1} lie beyond method.feature_level and stay "
                "untrained"
            )
