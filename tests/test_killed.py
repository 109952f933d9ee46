"""Killed anywhere, a run goes on to the same bits: weights, moments, average, metrics, measurements."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from children import Child
from conftest import assert_same_run
from stress import Tally

from selfdistill import checkpoint
from selfdistill.config import TrainConfig
from selfdistill.tracking import StepsFile
from selfdistill.train import train

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

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(settings: Make, write_rows: Callable[..., Path]) -> Make:
    test = str(write_rows(count=4, name="test.jsonl"))

    def of(variant: str, out: str) -> TrainConfig:
        values = STEPS | VARIANTS[variant]
        return settings(out, **values | ({"test": test} if "eval_steps" in values else {}))

    return of


def measured(config: TrainConfig) -> list[dict[str, Any]]:
    """Lines of evaluations.jsonl and token_views.jsonl, without what the clock says."""
    files = [Path(config.output_dir) / name for name in ("evaluations.jsonl", "token_views.jsonl")]
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


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.stress)])
@pytest.mark.parametrize("variant", VARIANTS)
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


class _Dies:
    """Kills its own process at the ``at``-th operation on a file below ``folder``: before it, or in its middle."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")

    def __init__(self, folder: str, at: int) -> None:
        self._folder, self._left = folder, at
        sys.addaudithook(self._hook)
        save, write = checkpoint.save_file, StepsFile.write

        def torn_save(tensors: Any, path: Any) -> None:
            save(tensors, path)
            if self._now():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def torn_line(file: Any, values: dict[str, Any]) -> None:
            if self._now():
                file._file.write(json.dumps(values)[:7])
                file._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, values)

        checkpoint.save_file, StepsFile.write = torn_save, torn_line  # type: ignore[method-assign]

    def _now(self) -> bool:
        self._left -= 1
        return self._left == 0

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and str(arguments[0]).startswith(self._folder) and self._now():
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.stress)])
@pytest.mark.parametrize("variant", ["full, EMA teacher, evaluated", "samples of the teacher"])
def test_killed_at_every_operation_on_a_file(make: Make, tmp_path: Path, variant: str, every: int) -> None:
    tally = Tally(f"killed at an operation on a file: {variant}")
    whole, log = make(variant, "whole"), tmp_path / "log"
    assert Child(lambda: train(whole), log).wait() == 0, log.read_text()
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
