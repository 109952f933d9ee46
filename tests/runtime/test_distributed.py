"""Several processes that train one model: the numbers of one process, one set of files, and an end that is no loss."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from children import JOINED, Child, second_gets, started_together, train_together
from conftest import assert_same_run, final_weights, largest_difference, metrics_of
from stress import Tally

from selfdistill import api
from selfdistill.cli import main
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import Evaluator
from selfdistill.runtime import distributed, read_lines
from selfdistill.runtime.distributed import all_reduce_gradients, barrier, broadcast_from_rank0, buckets
from selfdistill.training.checkpoint import (
    Position,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from selfdistill.training.train import plan_memory, train
from selfdistill.training.trainer import Trainer

COMMON: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "save_steps": 2, "ema_rate": 0.2, "drift_steps": 2}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"batch_size": 3, "loss_normalisation": "token", "importance_cap": 2.0}, id="uneven"),
        pytest.param({"batch_size": 1, "teacher": "frozen"}, id="more_processes_than_rows"),
        pytest.param(
            {"lora_rank": 4, "gradient_accumulation_steps": 2, "num_generations": 2, "teacher": "snapshot"},
            id="lora",
            marks=pytest.mark.slow,
        ),
        pytest.param({}, id="ema", marks=pytest.mark.slow),
        pytest.param(
            {"method": "isdft", "method_settings": {"ramp_steps": 3, "pull": 0.1}, "learning_rate": 1e-4},
            id="isdft",
            marks=pytest.mark.slow,
        ),
        pytest.param({"method": "ssd", "learning_rate": 1e-4}, id="ssd", marks=pytest.mark.slow),
        pytest.param({"method": "sft", "batch_size": 5}, id="sft", marks=pytest.mark.slow),
        pytest.param(
            {"method": "offline_distillation", "teacher": "frozen"}, id="teacher_samples", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_train_to_the_weights_of_one(
    settings: Callable[..., TrainConfig], tmp_path: Path, values: dict[str, Any]
) -> None:
    one, two = settings("one", **COMMON | values), settings("two", **COMMON | values)
    train(one)
    train_together(two, tmp_path)
    assert largest_difference(final_weights(one), final_weights(two)) < 1e-5
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    files = [sorted(path.name for path in Path(config.output_dir).iterdir()) for config in (one, two)]
    assert files[0] == files[1]
    assert (tmp_path / "two.1.log").read_text().count("step") == 0


def test_the_first_process_alone_chooses_the_checkpoint(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that could not find it would end before the others have met it, and they would wait."""
    config = settings(**COMMON | {"max_steps": 2})
    train(config)

    def seen_by_the_first(folder: Path) -> Path | None:
        if os.environ["RANK"] != "0":
            raise UserError("no checkpoint is intact")
        return newest_whole(folder)

    monkeypatch.setattr(sys.modules["selfdistill.training.train"], "newest_whole", seen_by_the_first)
    train_together(config.model_copy(update={"max_steps": 3}), tmp_path, resume=True)
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3]


def test_processes_refuse_a_checkpoint_together(tmp_path: Path) -> None:
    """One of them sees a corrupt file; the other must not wait for it, or go on alone."""
    model = torch.nn.Linear(2, 2)
    folders = []
    for rank in range(2):
        where = tmp_path / str(rank)
        where.mkdir()
        optimizer = torch.optim.AdamW(model.parameters())
        folders.append(save_checkpoint(where, Position(1, 2), "", model, optimizer, None, keep=2))
    (folders[1] / "weights.safetensors").write_bytes(b"none")

    def work() -> None:
        Accelerator()
        path = folders[int(os.environ["RANK"])]
        message = f"{folders[1]}: cannot read the checkpoint"
        with pytest.raises(UserError, match=re.escape(message)):
            load_checkpoint(path, model, torch.optim.AdamW(model.parameters()), None)

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()
    load_checkpoint(folders[0], model, torch.optim.AdamW(model.parameters()), None)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    settings: Callable[..., TrainConfig], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    values = COMMON | {"test": str(write_rows(count=5, name="test.jsonl")), "eval_steps": 2, "view_rows": 3}
    one, two = settings("one", **values), settings("two", **values)
    train(one)
    train_together(two, tmp_path)
    texts = [(Path(config.output_dir) / "evaluations.jsonl").read_text().splitlines() for config in (one, two)]
    assert len(texts[0]) == len(texts[1]) == 3
    for a, b in zip(*texts, strict=True):
        found, expected = json.loads(a), json.loads(b)
        found.pop("seconds"), expected.pop("seconds")
        assert found.pop("kl_base") == pytest.approx(expected.pop("kl_base"), abs=1e-5)
        assert found == expected
    views = [(Path(config.output_dir) / "token_views.jsonl").read_text().count("\n") for config in (one, two)]
    assert views[0] == views[1] > 0


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, TrainConfig]:
    """Runs of two processes to the end, by their settings."""
    return {}


@pytest.fixture
def whole_run(
    settings: Callable[..., TrainConfig], uninterrupted: dict[str, TrainConfig], tmp_path: Path
) -> Callable[..., TrainConfig]:
    """A run of two processes to the end, which tests share."""

    def run(**values: Any) -> TrainConfig:
        if (key := repr(values)) not in uninterrupted:
            config = settings("whole", **values)
            train_together(config, tmp_path)
            uninterrupted[key] = config
        return uninterrupted[key]

    return run


COPIES = pytest.param({}, id="copies")
SHARDED: tuple[str, dict[str, Any]] = ("sharded", {"fsdp": True})
SHARDED_LORA = pytest.param({"fsdp": True, "lora_rank": 4}, id="sharded_lora", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "values", [COPIES, pytest.param(SHARDED[1], id=SHARDED[0], marks=pytest.mark.slow), SHARDED_LORA]
)
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on_to_the_same_bits(
    settings: Callable[..., TrainConfig],
    whole_run: Callable[..., TrainConfig],
    tmp_path: Path,
    values: dict[str, Any],
) -> None:
    broken = settings("broken", **COMMON | values)
    first, second = started_together(lambda: train(broken, on_step=second_gets(signal.SIGKILL)), tmp_path / "broken")
    assert second.wait() == -signal.SIGKILL
    began = time.monotonic()
    assert first.wait(60) == 1
    assert time.monotonic() - began < 60
    assert [path.name[-1] for path in list_checkpoints(Path(broken.output_dir))] == ["2"]
    train_together(broken, tmp_path, resume=True)
    assert_same_run(whole_run(**COMMON | values), broken)


def command_line(config: TrainConfig, folder: Path) -> Callable[[], int]:
    """``selfdistill train`` with these settings, from a file in ``folder``."""
    file = folder / "settings.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    return lambda: main(["train", "--config", str(file)])


def test_a_run_that_succeeds_ends_its_group(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Or PyTorch warns of what NCCL leaks."""
    run = command_line(settings(**COMMON | {"max_steps": 1, "drift_steps": 0}), tmp_path)

    def work() -> int:
        code = run()
        assert not torch.distributed.is_initialized()
        return code

    first, second = started_together(work, tmp_path / "log")
    assert (first.wait(), second.wait()) == (0, 0), first.log.read_text() + second.log.read_text()
    assert "final model: " in first.log.read_text()


def assert_says_of_the_other(child: Child, what: str) -> None:
    said = f"another process of this run {what}; its checkpoints are intact, continue with --resume ("
    assert child.log.read_text().splitlines()[-1].startswith(f"selfdistill: error: {said}")


def test_a_run_whose_other_process_has_ended_says_so_in_one_line(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("broken", **COMMON | {"max_steps": 200})
    first, second = started_together(command_line(config, tmp_path), tmp_path / "broken")
    metrics = Path(config.output_dir) / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    second.kill()
    second.wait()
    assert first.wait(60) == 3
    assert_says_of_the_other(first, "has ended")


def test_a_run_whose_other_process_hangs_says_so_in_one_line(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("hung", **COMMON | {"max_steps": 200})
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=5))
    real = Trainer.step

    def hangs(run: Trainer, index: int) -> dict[str, Any]:
        """Between steps, as the gradients have a time limit of their own."""
        if index == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(run, index)

    monkeypatch.setattr(Trainer, "step", hangs)
    first, second = started_together(command_line(config, tmp_path), tmp_path / "hung")
    assert first.wait(60) == 3
    second.kill()
    assert_says_of_the_other(first, "has not answered in time")


def test_the_backend_of_gradients_connects_before_a_plan_reads_how_much_memory_is_free(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    runs = sys.modules["selfdistill.training.train"]
    summed, read = torch.distributed.all_reduce, runs.own_memory

    def sums(tensor: torch.Tensor) -> None:
        summed(tensor)
        happened.append(f"connects the {tensor.device}")

    def reads(device: torch.device) -> int | None:
        happened.append("reads")
        return read(device)

    monkeypatch.setattr(torch.distributed, "all_reduce", sums)
    monkeypatch.setattr(runs, "own_memory", reads)

    def work() -> None:
        config = settings()
        plan_memory(config, load_demonstrations(config.data), None)
        assert happened == ["connects the cpu", "reads"]

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()


def test_a_process_that_works_alone_may_take_longer_than_an_operation_on_gradients(tmp_path: Path) -> None:
    def work() -> int:
        short = timedelta(seconds=1)
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=short)])
        broadcast_from_rank0(lambda: time.sleep(1.5))
        if os.environ["RANK"] == "1":
            time.sleep(1.5)
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        all_reduce_gradients([weight])
        if os.environ["RANK"] == "0":
            time.sleep(1.5)
        barrier()
        return 10 if weight.grad.tolist() == [2.0, 2.0] else 11

    assert [child.wait() for child in started_together(work, tmp_path / "log")] == [10, 10]


@pytest.mark.parametrize(
    "values", [COPIES, pytest.param(SHARDED[1], id=SHARDED[0], marks=pytest.mark.slow), SHARDED_LORA]
)
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    settings: Callable[..., TrainConfig],
    whole_run: Callable[..., TrainConfig],
    tmp_path: Path,
    values: dict[str, Any],
) -> None:
    stopped = settings("stopped", **COMMON | values)
    children = started_together(lambda: train(stopped, on_step=second_gets(signal.SIGTERM)), tmp_path / "stopped")
    for child in children:
        assert child.wait() == 1
        assert "stopped after step 3 of 4; progress is saved, continue with resume=True" in child.log.read_text()
    train_together(stopped, tmp_path, resume=True)
    assert_same_run(whole_run(**COMMON | values), stopped)


def test_a_callback_in_one_process_ends_the_run_in_both(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings("run", **COMMON, test=str(write_rows()), eval_steps=2)

    def second_has_enough(step: int, _loaded: Any, metrics: dict[str, Any]) -> bool:
        assert ("eval/accuracy" in metrics) == (step == 2)  # in both
        return step == 3 and os.environ["RANK"] == "1"

    train_together(config, tmp_path, on_step=second_has_enough)
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3]
    assert [line["step"] for line in read_lines(Path(config.output_dir) / "evaluations.jsonl")] == [0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--model", "m"], "found 2 processes, but only train supports several: run eval in one"),
        (
            ["train", "--model", "MODEL", "--data", "DATA", "--output_dir", "o"],
            "setting 'context': 'auto' needs a single process; find the best with selfdistill check and name it",
        ),
        (
            ["train", "--model", "m", "--documents", "d", "--output_dir", "o"],
            "setting 'documents': make the questions first (selfdistill questions), in a single process",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
) -> None:
    there = {"MODEL": str(model_folder()), "DATA": str(write_rows())}
    arguments = [there.get(word, word) for word in arguments]
    child = Child(lambda: main(arguments), tmp_path / "log", {"WORLD_SIZE": "2", "RANK": "0"})
    assert child.wait() == 2
    assert child.log.read_text() == f"selfdistill: error: {message}\n"


@pytest.mark.stress
def test_accelerate_launch_with_two_processes(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally(
        "two processes by accelerate launch: weights of one, also sharded; one killed ends the other; goes on"
    )
    one, two, cut = (settings(name, **COMMON) for name in ("one", "two", "cut"))
    train(one)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "selfdistill", "train"]

    def command(config: TrainConfig, *more: str) -> list[str]:
        file = tmp_path / "settings.yaml"
        file.write_text(dump_yaml(config), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [*launch[:3], "--main_process_port", port, *launch[3:], "--config", str(file), *more]

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # its launcher has no option for several processes on CPUs
    done = subprocess.run(command(two), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("final model") == 1
    assert JOINED in done.stderr
    assert largest_difference(final_weights(one), final_weights(two)) < 1e-5
    assert metrics_of(one) == [pytest.approx(line, abs=1e-5) for line in metrics_of(two)]
    sharded = settings("sharded", fsdp=True, **COMMON)
    done = subprocess.run(command(sharded), capture_output=True, text=True, check=False)
    tally.count(done.returncode == 0, f"sharded: {done.stderr[-3000:]}")
    assert largest_difference(final_weights(one), final_weights(sharded)) < 2e-5
    longer = cut.model_copy(update={"max_steps": 400, "save_steps": 50, "lr_scheduler_type": "constant"})
    launcher = subprocess.Popen(command(longer), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(list_checkpoints(Path(longer.output_dir))) < 2:
        assert launcher.poll() is None, launcher.stderr.read() if launcher.stderr else ""
        time.sleep(0.1)
    below = psutil.Process(launcher.pid).children(recursive=True)
    workers = sorted((child for child in below if "RANK" in child.environ()), key=lambda child: child.environ()["RANK"])
    assert len(workers) == 2, [child.cmdline() for child in below]
    began = time.monotonic()
    workers[1].kill()
    _, text = launcher.communicate(timeout=60)
    tally.count(launcher.returncode not in (0, None), "exit code")
    assert time.monotonic() - began < 60
    assert not any(worker.is_running() for worker in workers)
    assert "another process of this run has ended; its checkpoints are intact, continue with --resume" in text
    steps = int(list_checkpoints(Path(longer.output_dir))[-1].name[-8:])
    done = subprocess.run(
        command(longer, "--resume", "--max_steps", str(steps + 2)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming after step {steps}\n" in done.stderr
    tally.finish()


def test_processes_that_are_not_joined_are_refused(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings()
    child = Child(command_line(config, tmp_path), tmp_path / "log", {"WORLD_SIZE": "2", "RANK": "0"})
    assert child.wait() == 2
    assert (
        "2 processes were started, but accelerate joined 1; on CPUs set ACCELERATE_USE_CPU=true"
        in child.log.read_text()
    )
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_a_run_of_two_processes_that_falls_apart_leaves_the_model_before(
    settings: Callable[..., TrainConfig], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    test = str(write_rows(count=4, name="test.jsonl"))
    apart: dict[str, Any] = {
        "teacher": "live",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "drift_steps": 5,
    }
    config = settings(
        **COMMON | apart | {"max_steps": 40, "save_steps": 0, "test": test, "eval_steps": 3, "stop_on_collapse": True}
    )
    for child in started_together(lambda: train(config), tmp_path / "log"):
        assert child.wait() == 1
        assert "final is the model of step 3, evaluated before the collapse" in child.log.read_text()
    assert (Path(config.output_dir) / "final" / "README.md").exists()


@pytest.mark.parametrize(
    ("failing", "fsdp", "saved"),
    [
        pytest.param("0", False, ["2", "3"], id="first", marks=pytest.mark.slow),
        pytest.param("1", False, ["2", "3"], id="second"),
        pytest.param("1", True, ["2"], id="sharded", marks=pytest.mark.slow),
    ],
)
def test_a_measurement_that_fails_in_one_process_ends_both(
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    failing: str,
    fsdp: bool,
    saved: list[str],
) -> None:
    config = settings(fsdp=fsdp, **COMMON | {"test": str(write_rows(count=4, name="test.jsonl")), "eval_steps": 3})

    def work() -> None:
        measure, calls = Evaluator.measure, count()

        def once(evaluator: Evaluator, loaded: Any, who: str) -> Any:
            if next(calls) and os.environ["RANK"] == failing:  # not the base, before the first step
                raise UserError("no answer")
            return measure(evaluator, loaded, who)

        Evaluator.measure = once  # type: ignore[method-assign]
        train(config)

    for child in started_together(work, tmp_path / "log"):
        assert child.wait(60) == 1
    assert [path.name[-1] for path in list_checkpoints(Path(config.output_dir))] == saved


def test_a_gradient_that_no_process_has_stays_none(tmp_path: Path) -> None:
    def work() -> int:
        Accelerator()
        one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        if os.environ["RANK"] == "1":
            one.grad = torch.full((2,), 3.0)
        all_reduce_gradients([one, other])
        assert one.grad is not None
        return 10 if one.grad.tolist() == [3.0, 3.0] and other.grad is None else 11

    assert [child.wait() for child in started_together(work, tmp_path / "log")] == [10, 10]


def test_gradients_of_all_shapes_and_types_are_summed_together(tmp_path: Path) -> None:
    def work() -> int:
        Accelerator()
        rank = float(os.environ["RANK"])
        shapes = [((3, 2), torch.float32), ((4,), torch.bfloat16), ((2, 2), torch.bfloat16), ((), torch.float32)]
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
        for number, parameter in enumerate(parameters):
            places = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)
            parameter.grad = places + 10 * number + 100 * rank
        all_reduce_gradients(parameters)
        for number, parameter in enumerate(parameters):
            places = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)
            if not torch.equal(parameter.grad, 2 * (places + 10 * number) + 100):
                return 11 + number
        return 10

    assert [child.wait() for child in started_together(work, tmp_path / "log")] == [10, 10]


def test_a_bucket_has_neighbours_of_one_type_and_is_not_too_large() -> None:
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in [(2, torch.float32), (1, torch.float32), (9, torch.float32)]]
    tensors += [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)]
    assert [[t.numel() for t in bucket] for bucket in buckets(tensors, 12)] == [[2, 1], [9], [2], [2, 2]]
    assert buckets([], 12) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:4242", 3),
        ("NCCL error: ncclRemoteError: A call failed, possibly due to a remote process exiting prematurely", 3),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)", 3),
        ("Timed out after 301 seconds waiting for clients. 1/2 clients joined.", 3),
        ("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000", None),
        ("CUDA out of memory. Tried to allocate 2 GiB", 2),
    ],
)
def test_errors_that_are_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, code: int | None
) -> None:
    def breaks(**_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(api, "train", breaks)
    command = ["train", "--model", "m", "--data", "d", "--output_dir", "o"]
    if code is None:
        with pytest.raises(RuntimeError, match=words[:10]):
            main(command)
    else:
        assert main(command) == code
        assert capsys.readouterr().err.count("\n") == 1


def test_a_judge_that_does_not_answer_is_the_error_of_both(tmp_path: Path) -> None:
    def work() -> int:
        Accelerator()

        def ask() -> None:
            raise UserError(f"asked by {os.environ['RANK']}")

        try:
            broadcast_from_rank0(ask)
        except UserError as error:
            return 10 if str(error) == "asked by 0" else 11
        return 12

    assert [child.wait() for child in started_together(work, tmp_path / "log")] == [10, 10]
