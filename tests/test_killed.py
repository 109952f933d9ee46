"""Killed anywhere, a run goes on to the same bits: weights, moments, average, metrics, measurements."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from children import Child
from conftest import assert_same_run
from power import Disk
from stress import Tally

from selfdistill.cli import main
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.methods.samples_file import SAMPLES_FILE, SamplesFile
from selfdistill.runtime.tracking import StepsFile
from selfdistill.training import checkpoint
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "full, EMA teacher, evaluated": {"teacher": "ema", "eval_steps": 2},
    "full, frozen teacher": {"teacher": "frozen"},
    "full, snapshot teacher": {"teacher": "snapshot"},
    "LoRA, EMA teacher": {"teacher": "ema", "lora_rank": 4},
    "LoRA, frozen teacher, evaluated": {"teacher": "frozen", "lora_rank": 4, "eval_steps": 2},
    "LoRA, snapshot teacher": {"teacher": "snapshot", "lora_rank": 4},
    "accumulation, several generations": {"gradient_accumulation_steps": 2, "num_generations": 2},
    "SFT": {"method": "sft"},
    "GRPO": {"method": "grpo", "temperature": 1.0, "num_generations": 2},
    "two stages, frozen base": {"method": "sft_reinvoke", "teacher": "frozen"},
    "samples of the teacher": {"method": "offline_distillation", "teacher": "frozen"},
}
STEPS = {"batch_size": 4, "max_steps": 8, "save_steps": 3, "ema_rate": 0.2, "snapshot_steps": 3, "drift_steps": 4}
"""Of six rows: checkpoints in the middle of epochs, and batches across their borders."""

QUICK = ("two stages, frozen base",)
"""Killed at random moments in the quick tests too; together they have what the others have."""

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the tests share: rows, and runs that nothing interrupted."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture
def make(settings: Make, write_rows: Callable[..., Path], shared: Path) -> Make:
    files = [write_rows(), write_rows(count=4, name="test.jsonl")]
    data, test = (str(shutil.copy(file, shared)) for file in files)

    def of(variant: str, out: str, **more: Any) -> TrainConfig:
        values = {"data": data} | STEPS | VARIANTS[variant] | more
        return settings(out, **values | ({"test": test} if "eval_steps" in values else {}))

    return of


@pytest.fixture
def uninterrupted(make: Make, shared: Path) -> Callable[[str], TrainConfig]:
    """A variant's run that nothing interrupted; tests share it."""

    def run(variant: str) -> TrainConfig:
        config = make(variant, "whole", output_dir=str(shared / variant))
        if not Path(config.output_dir).exists():
            train(config)
        return config

    return run


def measured(config: TrainConfig) -> list[dict[str, Any]]:
    """Lines of the files with evaluations, replies and token views, without what the clock says."""
    names = ("evaluations.jsonl", "test_replies.jsonl", "token_views.jsonl")
    files = [Path(config.output_dir) / name for name in names]
    lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def the_same(whole: TrainConfig, other: TrainConfig) -> bool:
    try:
        assert_same_run(whole, other)
        assert measured(whole) == measured(other)
        left = [path.name for path in Path(other.output_dir).rglob(".*")]
        assert not left, left
    except AssertionError:
        return False
    return True


def test_other_weights_metrics_or_files_are_noticed(make: Make, tmp_path: Path) -> None:
    whole, again, other = (make("SFT", name) for name in ("whole", "again", "other"))
    for config in (whole, again, other.model_copy(update={"seed": 1})):
        train(config)
    assert the_same(whole, again)
    assert not the_same(whole, other)
    (Path(again.output_dir) / ".config.yaml.unfinished").touch()
    assert not the_same(whole, again)


@pytest.mark.parametrize(
    ("variant", "kills"),
    [
        *(pytest.param(name, 2, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS),
        *(pytest.param(name, 50, marks=pytest.mark.stress) for name in VARIANTS),
    ],
)
def test_killed_at_random_moments(make: Make, tmp_path: Path, variant: str, kills: int) -> None:
    tally = Tally(f"killed at a random moment: {variant}")
    whole, log = make(variant, "whole"), tmp_path / "log"
    began = time.monotonic()
    assert Child(lambda: train(whole), log).wait() == 0, log.read_text()
    lasts = time.monotonic() - began
    chance, killed = random.Random(variant), 0
    for number in count():
        cut = make(variant, f"cut{number}")
        code, before = -signal.SIGKILL, killed
        while code == -signal.SIGKILL:
            child = Child(lambda: train(cut, resume=True), log)  # noqa: B023
            if killed < kills:
                time.sleep(chance.uniform(0, 1.1) * lasts)
                child.kill()
            code = child.wait()
            killed += code == -signal.SIGKILL
        right = code == 0 and the_same(whole, cut)
        for _ in range(killed - before):
            tally.count(right, cut.output_dir)
        if killed >= kills:
            break
    tally.finish()


def test_what_a_checkpoint_or_a_final_model_consists_of_is_flushed_before_it_has_its_name(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("SFT", "run", max_steps=2, save_steps=1, eval_steps=1)
    Path(config.output_dir).mkdir()
    disk = Disk(monkeypatch, Path(config.output_dir))
    train(config)
    places = ["checkpoint-00000001", "checkpoint-00000002", "final"]
    assert {"config.yaml", *places} <= disk.names
    for place in ("config.yaml", *places):
        assert disk.lost_within(place) == set()
    for place in places:
        assert disk.events[disk.events.index(("rename", place)) + 1] == ("flush", ".")
    files = {"metrics.jsonl", "evaluations.jsonl", "test_replies.jsonl"}
    for place in places[:2]:
        assert not files & disk.lost[place]
    assert all((Path(config.output_dir) / file).stat().st_size for file in files)


class _Dies:
    """Kills its own process at the ``at``-th operation on a file below ``folder``: before it, or in its middle."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")

    def __init__(self, folder: str, at: int) -> None:
        self._folder, self._left = folder, at
        sys.addaudithook(self._hook)
        save, write, append = checkpoint.save_file, StepsFile.write, SamplesFile.append

        def torn_save(tensors: Any, path: Any) -> None:
            save(tensors, path)
            if self._now():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def torn_line(file: Any, values: dict[str, Any]) -> None:
            if self._now():
                file.file.write(json.dumps(values)[:7])
                file.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, values)

        def torn_samples(file: SamplesFile, samples: Any) -> None:
            append(file, samples)
            if self._now():
                path = Path(folder) / SAMPLES_FILE
                os.truncate(path, os.path.getsize(path) - 9)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save_file = torn_save
        StepsFile.write, SamplesFile.append = torn_line, torn_samples  # type: ignore[method-assign]

    def _now(self) -> bool:
        self._left -= 1
        return self._left == 0

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and str(arguments[0]).startswith(self._folder) and self._now():
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("variant", "every"),
    [
        ("full, EMA teacher, evaluated", 47),
        pytest.param("samples of the teacher", 25, marks=pytest.mark.slow),
        pytest.param("full, EMA teacher, evaluated", 1, marks=pytest.mark.stress),
        pytest.param("samples of the teacher", 1, marks=pytest.mark.stress),
    ],
)
def test_killed_at_every_operation_on_a_file(
    make: Make, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path, variant: str, every: int
) -> None:
    tally = Tally(f"killed at an operation on a file: {variant}")
    whole, log = uninterrupted(variant), tmp_path / "log"
    for at in count(1, every):
        cut = make(variant, f"cut{at}")

        def dying() -> None:
            _Dies(cut.output_dir, at)  # noqa: B023
            train(cut)  # noqa: B023

        code = Child(dying, log).wait()
        if code == 0:  # it has fewer operations than that
            break
        assert code == -signal.SIGKILL, log.read_text()
        code = Child(lambda: train(cut, resume=True), log).wait()  # noqa: B023
        tally.count(code == 0 and the_same(whole, cut), f"operation {at}")
    assert tally.tried * every > 60
    tally.finish()


# --- asked to stop, and machines that give out ---


def trained_until(config: TrainConfig, tmp_path: Path, step: int, happens: Callable[[], object]) -> tuple[int, str]:
    """Exit code and last line of a command in whose step number ``step`` (from 0) something happens."""
    file, log = tmp_path / "settings.yaml", tmp_path / "log"
    file.write_text(dump_yaml(config), encoding="utf-8")

    def command() -> int:
        whole = Trainer.step

        def steps(run: Trainer, at: int) -> dict[str, Any]:
            if at == step:
                happens()
            return whole(run, at)

        Trainer.step = steps  # type: ignore[method-assign]
        return main(["train", "--config", str(file)])

    code = Child(command, log).wait()
    return code, log.read_text().splitlines()[-1]


def saved_steps(config: TrainConfig) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(Path(config.output_dir))]


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM,), 143),
        ((signal.SIGINT,), 130),
        ((signal.SIGHUP, signal.SIGHUP), 129),  # of a closed terminal: from the shell, and from the kernel
        pytest.param((signal.SIGTERM, signal.SIGTERM), 143, marks=pytest.mark.slow),
        ((signal.SIGINT, signal.SIGINT), None),
        pytest.param((signal.SIGTERM, signal.SIGINT), None, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_a_further_ctrl_c_leaves_at_once(
    make: Make,
    uninterrupted: Callable[[str], TrainConfig],
    tmp_path: Path,
    signals: tuple[int, ...],
    code: int | None,
) -> None:
    """``code``: None if the run leaves at once."""
    whole, stopped = uninterrupted("full, frozen teacher"), make("full, frozen teacher", "stopped")
    found, last = trained_until(stopped, tmp_path, 3, lambda: [os.kill(os.getpid(), number) for number in signals])
    if code is not None:
        assert found == code
        assert last == (
            f"selfdistill: {stopped.output_dir}: stopped after step 4 of 8; progress is saved, continue with --resume"
        )
        assert saved_steps(stopped) == [3, 4]
    else:
        assert found == 130
        assert last == "selfdistill: interrupted"
        assert saved_steps(stopped) == [3]
    train(stopped, resume=True)
    assert the_same(whole, stopped)


def test_ctrl_c_that_also_ends_the_reader_of_the_output_saves(
    make: Make, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    """As in ``selfdistill train ... 2>&1 | tee log``."""
    whole, stopped = uninterrupted("full, frozen teacher"), make("full, frozen teacher", "stopped")

    def interrupt() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
        os.kill(os.getpid(), signal.SIGINT)

    code, _ = trained_until(stopped, tmp_path, 3, interrupt)
    assert (code, saved_steps(stopped)) == (130, [3, 4])
    train(stopped, resume=True)
    assert the_same(whole, stopped)


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    make: Make, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    """The kernel's own refusal: no file may be larger than half of a checkpoint's weights."""
    whole, full = uninterrupted("full, EMA teacher, evaluated"), make("full, EMA teacher, evaluated", "full")
    size = (list_checkpoints(Path(whole.output_dir))[0] / "weights.safetensors").stat().st_size

    def fill_up() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, last = trained_until(full, tmp_path, 4, fill_up)
    assert code == 2
    assert last.startswith(f"selfdistill: error: {full.output_dir}/checkpoint-00000006: cannot write the checkpoint (")
    assert "earlier checkpoints are intact. Free disk space, then continue with --resume" in last
    assert saved_steps(full) == [3]
    train(full, resume=True)
    assert the_same(whole, full)


def test_no_memory_is_one_line_and_loses_no_checkpoint(
    make: Make, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    whole, poor = uninterrupted("full, frozen teacher"), make("full, frozen teacher", "poor")

    def starve() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        torch.empty(1 << 30)

    code, last = trained_until(poor, tmp_path, 4, starve)
    assert code == 2
    assert last == (
        "selfdistill: error: out of memory: raise --gradient_accumulation_steps to 2 (also with --resume), or lower "
        "--max_completion_length; checkpoints are intact"
    )
    assert saved_steps(poor) == [3]
    train(poor, resume=True)
    assert the_same(whole, poor)


# --- the same everywhere, and for long ---


def test_the_same_seed_gives_the_same_bits_in_another_process(
    make: Make, uninterrupted: Callable[[str], TrainConfig], tmp_path: Path
) -> None:
    here, there = uninterrupted("LoRA, EMA teacher"), make("LoRA, EMA teacher", "there")
    assert Child(lambda: train(there), tmp_path / "log").wait() == 0
    assert the_same(here, there)


@pytest.mark.parametrize(
    "steps", [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.stress)]
)
def test_a_long_run_takes_no_more_memory_files_or_time(settings: Make, steps: int) -> None:
    process, seen = psutil.Process(), []

    def look(step: int, _loaded: Any, _metrics: Any) -> None:
        if step and step % (steps // 50) == 0:
            gc.collect()
            seen.append((step, process.memory_info().rss, process.num_fds(), time.perf_counter()))

    test = {"save_steps": steps // 10, "eval_steps": 0, "drift_steps": 10, "logging_steps": steps}
    train(settings(max_steps=steps, **test), on_step=look)
    half = seen[len(seen) // 2 :] if steps < 1000 else seen[5:]  # what is kept for speed has been filled by then
    at, rss, files, clock = (np.array(column, dtype=float) for column in zip(*half, strict=True))
    slope = np.polyfit(at, rss, 1)[0] * 100 / 2**20
    assert slope < 1, f"{slope:.2f} MiB per 100 steps"
    assert files.max() == files.min()
    took = np.diff(clock)
    first, last = np.median(took[: len(took) // 3]), np.median(took[-(len(took) // 3) :])
    tally = Tally(f"flat over {steps} steps: {slope:+.2f} MiB per 100 steps, step time x {last / first:.2f}")
    tally.count(steps < 1000 or last < 1.5 * first, f"{first:.4f} s, then {last:.4f} s")
    tally.finish()
