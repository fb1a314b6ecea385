"""Several processes train as one does: the same losses, one record, and no waiting for one that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pgl import pretrain as module
from pgl.config import PretrainConfig
from pgl.pretrain import pretrain
from pgl.runs.folder import LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training import process_group
from pgl.training.batch_norm import over_all_processes
from pgl.training.checkpoint import load_checkpoint
from tests.patience import PATIENCE_S, wait_until

from .training_data import make_cache, small_config

ROOT = Path(module.__file__).parents[1]
STEPS = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def with_batch_statistics(data: Path, output: Path) -> PretrainConfig:
    """All that looks at a whole batch: batch normalisation everywhere, with running statistics in the
    encoder, and decorrelation; a batch that two can share."""
    config = small_config(data, output, steps=STEPS)
    config.encoder = replace(config.encoder, norm="batch")
    config.method.head_norm = config.method.output_norm = "batch"
    config.method.decorrelation = 0.05
    config.optimizer.name, config.optimizer.learning_rate = "lars", 0.2
    config.train.batch_size, config.train.log_every, config.train.devices = 4, 1, "auto"
    config.train.checkpoint_every = config.validation.every = STEPS // 2
    return config


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*program: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, *program], capture_output=True, text=True, timeout=PATIENCE_S, env=environment()
    )


def written(config: PretrainConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(to_plain(config)), "utf-8")
    return path


def losses(run: Path, kind: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory) -> Path:
    """The run of a single process."""
    return pretrain(with_batch_statistics(cache, tmp_path_factory.mktemp("one") / "run"))


def test_torchrun_with_two_processes_gives_the_losses_of_one_and_one_record(cache, one, tmp_path):
    two = with_batch_statistics(cache, tmp_path / "two")
    done = torchrun("-m", "pgl", "pretrain", f"--config={written(two, tmp_path / 'config.yaml')}")
    assert done.returncode == 0, done.stderr
    assert len(losses(one)) == len(losses(two.output)) == STEPS
    assert losses(two.output) == pytest.approx(losses(one), abs=1e-5)
    assert losses(two.output, "validation") == pytest.approx(losses(one, "validation"), abs=1e-4)
    first, second = (load_checkpoint(checkpoint_path(run, LAST)) for run in (one, two.output))
    assert first["samples"] == second["samples"] == STEPS * 4
    for key, value in first["target"]["encoder"].items():
        torch.testing.assert_close(second["target"]["encoder"][key], value, atol=1e-4, rtol=1e-3)
    log = (two.output / "log.txt").read_text("utf-8")
    assert log.count("step 10: matching accuracy") == 1 and "2 × cpu" in log
    assert len(json.loads((two.output / "environment.json").read_text("utf-8"))["starts"]) == 1


# What pgl pretrain does, and then the names of the threads that it left. One that has ended may be listed for
# a moment still, and be gone when its name is read.
LEAVING = """
import sys
import time
from pathlib import Path
from pgl.cli import main

def names():
    for task in Path("/proc/self/task").iterdir():
        try:
            yield (task / "comm").read_text().strip()
        except OSError:
            pass

code = main(sys.argv[1:])
end = time.monotonic() + 5
while any("gloo" in name for name in names()) and time.monotonic() < end:
    time.sleep(0.02)
print("threads:", list(names()))
sys.exit(code)
"""


@contextmanager
def two_tasks_of_slurm(config: PretrainConfig, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The run as srun starts it, on two machines, which are both this one; what is left of it is killed."""
    config.train.devices, config.train.num_nodes = 1, 2
    (tmp_path / "script.py").write_text(LEAVING, "utf-8")
    settings = written(config, tmp_path / "config.yaml")
    words = [sys.executable, str(tmp_path / "script.py"), "pretrain", f"--config={settings}"]
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "pgl", "SLURM_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **job, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.kill()
            task.wait()


def assert_end_without_threads(tasks: list[subprocess.Popen[str]], code: int) -> None:
    ends = [task.communicate(timeout=PATIENCE_S) for task in tasks]
    assert [task.returncode for task in tasks] == [code, code], ends
    # A thread of gloo that outlives Python ends the process in abort, one time in many.
    for out, _ in ends:
        assert "threads:" in out and "gloo" not in out


def test_two_tasks_of_slurm_on_two_machines_give_the_losses_of_one_process(cache, one, tmp_path):
    config = with_batch_statistics(cache, tmp_path / "two")
    with two_tasks_of_slurm(config, tmp_path) as tasks:
        assert_end_without_threads(tasks, 0)
    assert losses(config.output) == pytest.approx(losses(one), abs=1e-5)
    assert "2 × cpu" in (config.output / "log.txt").read_text("utf-8")


def test_two_tasks_that_are_told_to_stop_save_and_leave_no_thread(cache, tmp_path):
    config = with_batch_statistics(cache, tmp_path / "two")
    config.train.steps = config.train.checkpoint_every = config.validation.every = 1_000_000
    metrics = config.output / "metrics.jsonl"
    with two_tasks_of_slurm(config, tmp_path) as tasks:
        wait_until(lambda: metrics.is_file() and '"train"' in metrics.read_text("utf-8"), tasks[0])
        for task in tasks:
            task.send_signal(signal.SIGTERM)
        assert_end_without_threads(tasks, 130)
    assert load_checkpoint(checkpoint_path(config.output, LAST))["step"] == len(losses(config.output)) > 0


def test_only_a_stop_that_all_agreed_upon_takes_the_group_down(monkeypatch):
    """After another interrupt the others may be waiting for this process: taking down would wait for them."""
    taken_down = []
    monkeypatch.setattr(process_group, "_take_down", lambda: taken_down.append(1))
    for stop, times in ((KeyboardInterrupt, 0), (ValueError, 0), (process_group.AgreedStop, 1)):
        with pytest.raises(stop), process_group.ends_with_the_run():
            raise stop
        assert len(taken_down) == times


BATCH_NORM = """
import sys
import torch
import torch.distributed
from torch import nn
from pgl.training.batch_norm import over_all_processes

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
case = torch.load(sys.argv[1], weights_only=True)
results = []
for affine in (False, True):
    norm = nn.BatchNorm3d(3, affine=affine, track_running_stats=affine).double()
    if affine:
        norm.load_state_dict(case["weights"])
    norm = over_all_processes(norm, 2, torch.device("cpu"))
    inputs = case["inputs"].chunk(2)[rank].clone().requires_grad_()
    for _ in range(2):
        out = norm(inputs)
    out.backward(case["gradient"].chunk(2)[rank])
    parameters = [p.grad for p in norm.parameters()]
    for gradient in parameters:
        torch.distributed.all_reduce(gradient)
    results.append({"out": out.detach(), "gradient": inputs.grad, "parameters": parameters,
                    "buffers": dict(norm.named_buffers())})
torch.save(results, f"{sys.argv[1]}.{rank}")
torch.distributed.destroy_process_group()
"""


def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(tmp_path):
    """In float64 against nn.BatchNorm3d, with and without weights: values, gradients, running statistics."""
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + 2 * torch.randn(4, 3, 2, 3, 4, generator=generator, dtype=torch.float64)
    gradient = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    wholes = [nn.BatchNorm3d(3, affine=affine, track_running_stats=affine).double() for affine in (0, 1)]
    with torch.no_grad():
        wholes[1].weight.uniform_(0.5, 2, generator=generator)
        wholes[1].bias.uniform_(-1, 1, generator=generator)
    case = {"inputs": inputs, "gradient": gradient, "weights": wholes[1].state_dict()}
    torch.save(case, tmp_path / "case")
    (tmp_path / "script.py").write_text(BATCH_NORM, "utf-8")
    done = torchrun(str(tmp_path / "script.py"), str(tmp_path / "case"))
    assert done.returncode == 0, done.stderr
    halves = [torch.load(tmp_path / f"case.{rank}", weights_only=True) for rank in range(2)]
    for whole, *parts in zip(wholes, *halves, strict=True):
        arriving = inputs.clone().requires_grad_()
        for _ in range(2):
            out = whole(arriving)
        out.backward(gradient)
        torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out.detach())
        torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), arriving.grad)
        for part in parts:
            assert part["buffers"].keys() == dict(whole.named_buffers()).keys()
            for name, value in whole.named_buffers():
                torch.testing.assert_close(part["buffers"][name], value)
            for mine, theirs in zip(part["parameters"], whole.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs.grad)


def test_one_process_keeps_its_own_batch_norm():
    network = nn.Sequential(nn.BatchNorm3d(2))
    assert type(over_all_processes(network, 1, torch.device("cpu"))[0]) is nn.BatchNorm3d


FAILING = """
import sys
import time
from pathlib import Path
import torch.distributed
from pgl import pretrain
from pgl.cli import main

original = pretrain._Run._training_step

def training_step(self, pieces):
    if self.step == 2 and torch.distributed.get_rank() == int(sys.argv[1]):
        Path(sys.argv[3]).write_text(str(time.monotonic()))
        raise RuntimeError("this process has burnt down")
    return original(self, pieces)

pretrain._Run._training_step = training_step
sys.exit(main(["pretrain", "--config", sys.argv[2]]))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_job_with_its_error(cache, tmp_path, rank):
    config = with_batch_statistics(cache, tmp_path / "run")
    config.train.steps = 1_000_000
    (tmp_path / "script.py").write_text(FAILING, "utf-8")
    settings = written(config, tmp_path / "config.yaml")
    done = torchrun(str(tmp_path / "script.py"), str(rank), str(settings), str(tmp_path / "failed"))
    assert done.returncode != 0
    assert "this process has burnt down" in done.stderr
    assert time.monotonic() - float((tmp_path / "failed").read_text()) < 45
    assert len(losses(config.output)) == 2
