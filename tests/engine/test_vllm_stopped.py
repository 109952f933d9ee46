"""Commands with an engine that are killed, asked to stop or whose engine fails: nothing is lost, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from children import Child
from conftest import ENDS, NEEDS_VLLM, VLLM, assert_same_run, metrics_of

from selfdistill.cli import main
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.model.engine import close_engine
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

pytestmark = NEEDS_VLLM
STEPS = 12
Run = Callable[[Path], TrainConfig]


def still_running(group: int) -> list[psutil.Process]:
    """Processes of a group, or of a session with its number, that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if group in (os.getpgid(process.pid), os.getsid(process.pid)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


class Command:
    """``selfdistill`` in a session and with a folder for temporary files of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.scratch = folder / f"scratch-{len(list(folder.iterdir()))}"
        self.scratch.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "selfdistill", *arguments],
            env=os.environ | {"TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def send_after(self, lines: int, metrics: Path, number: int) -> None:
        """Send a signal when the run has written so many lines."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self._process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                self._process.send_signal(number)
                return
            time.sleep(0.002)
        raise AssertionError(f"not {lines} lines: {self.ended()}")

    def ended(self) -> tuple[int, str]:
        """The exit code and the last line on standard error, when no process of the command is left."""
        try:
            _, said = self._process.communicate(timeout=120)
        finally:
            left = still_running(self._process.pid)
            for process in left:
                process.kill()
        assert not left
        return self._process.returncode, (said.splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing interrupts; it is made once."""
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def run(
    settings: Callable[..., TrainConfig],
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    shared: Path,
) -> Run:
    """Settings of a run into a folder."""
    values: dict[str, Any] = {"model": str(model_folder(head_dim=32, ends=ENDS)), "max_steps": STEPS, "lora_rank": 4}
    for name in ("data", "test"):
        file = shared / f"{name}.jsonl"
        if not file.exists():
            write_rows(name=file.name).rename(file)
        values[name] = str(file)
    return lambda folder: settings(output_dir=str(folder), save_steps=4, eval_steps=5, **values, **VLLM)


@pytest.fixture
def whole(run: Run, shared: Path) -> TrainConfig:
    """A run that nothing interrupted."""
    config = run(shared / "whole")
    if not Path(config.output_dir).exists():
        train(config)
        close_engine()
    return config


def arguments_of(config: TrainConfig, folder: Path) -> list[str]:
    file = folder / "settings.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    return ["train", "--config", str(file)]


def saved_steps(config: TrainConfig) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(Path(config.output_dir))]


def assert_lost_nothing(whole: TrainConfig, resumed: TrainConfig) -> None:
    assert_same_run(whole, resumed)
    assert [line["step"] for line in metrics_of(resumed)] == list(range(1, STEPS + 1))
    lines = [(Path(config.output_dir) / "evaluations.jsonl").read_text().count("\n") for config in (whole, resumed)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_from_outside(run: Run, whole: TrainConfig, tmp_path: Path, number: int) -> None:
    cut = run(tmp_path / "cut")
    command = Command(tmp_path, *arguments_of(cut, tmp_path))
    command.send_after(5, tmp_path / "cut" / "metrics.jsonl", number)
    code, last = command.ended()
    saved = saved_steps(cut)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        assert saved == [4]
    else:
        assert code == 128 + number
        assert last.endswith(f"stopped after step {saved[-1]} of {STEPS}; progress is saved, continue with resume=True")
        assert saved[0] == 4 < saved[-1]
    again = Command(tmp_path, "train", "--resume", "--output_dir", cut.output_dir)
    code, last = again.ended()
    assert code == 0, last
    assert_lost_nothing(whole, cut)
    # vLLM 0.28 leaves an empty file of its process group behind.
    assert not [path for path in again.scratch.iterdir() if not path.name.startswith("vllm_dist_")]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice() -> None:
    interrupt()
    interrupt()


def run_out_of_memory() -> None:
    raise MemoryError("no room for the cache")


FAILED = "engine vllm failed: MemoryError: no room for the cache"


@pytest.mark.parametrize(
    ("happens", "step", "code", "says", "saved"),
    [
        (interrupt, 6, 130, "stopped after step 7 of 12; progress is saved, continue with resume=True", [4, 7]),
        (interrupt_twice, 6, 130, "selfdistill: interrupted", [4]),
        (run_out_of_memory, 6, 3, f"stopped after step 6: {FAILED}", [4, 6]),
        (run_out_of_memory, 4, 3, f"stopped after step 4: {FAILED}", [4]),
        (run_out_of_memory, 0, 3, f"stopped after step 0: {FAILED}", [0]),
    ],
)
def test_in_the_middle_of_sampling(
    run: Run,
    whole: TrainConfig,
    tmp_path: Path,
    happens: Callable[[], None],
    step: int,
    code: int,
    says: str,
    saved: list[int],
) -> None:
    """At the first token of a step (from 0): each step samples one at least."""
    cut, log = run(tmp_path / "cut"), tmp_path / "log"
    arguments = arguments_of(cut, tmp_path)

    def command() -> int:
        from vllm.v1.engine.llm_engine import LLMEngine

        train_step, engine_step, tokens = Trainer.step, LLMEngine.step, [0]

        def noted(trainer: Trainer, number: int) -> dict[str, Any]:
            tokens[0] = 1 if number == step else 0
            return train_step(trainer, number)

        def sampling(engine: Any) -> Any:
            tokens[0] -= 1
            if tokens[0] == 0:
                happens()
            return engine_step(engine)

        Trainer.step, LLMEngine.step = noted, sampling  # type: ignore[method-assign]
        return main(arguments)

    child = Child(command, log)
    assert child.wait() == code, log.read_text()
    assert not still_running(child.pid)
    assert says in log.read_text().splitlines()[-1]
    assert saved_steps(cut) == saved
    train(cut, resume=True)
    close_engine()  # the next test forks
    assert_lost_nothing(whole, cut)


def test_in_the_middle_of_an_evaluation(run: Run, whole: TrainConfig, tmp_path: Path) -> None:
    cut, log = run(tmp_path / "cut"), tmp_path / "log"
    arguments = arguments_of(cut, tmp_path)

    def command() -> int:
        from vllm.v1.engine.llm_engine import LLMEngine

        train_step = Trainer.step

        def noted(trainer: Trainer, number: int) -> dict[str, Any]:
            metrics = train_step(trainer, number)
            if number == 9:
                LLMEngine.step = lambda self: run_out_of_memory()
            return metrics

        Trainer.step = noted  # type: ignore[method-assign]
        return main(arguments)

    assert Child(command, log).wait() == 3, log.read_text()
    assert f"{cut.output_dir}: stopped after step 10: {FAILED}" in log.read_text().splitlines()[-1]
    assert saved_steps(cut) == [8, 10]
    train(cut, resume=True)
    close_engine()
    assert_lost_nothing(whole, cut)
