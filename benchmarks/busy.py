"""A step beside a busy neighbour against the same step alone, where both have the same two cores.

    python benchmarks/busy.py [--threads 2] [--steps 5] [--batch_size 8] [--tokens 32] [--model smollm2-135m]

SDFT with a frozen teacher on the package's facts, full fine-tuning in float32, exactly ``tokens`` new tokens a prompt.
The neighbour is a process that multiplies matrices on one thread; it is stopped while it is not wanted. Steps alone and
beside it alternate in one process, always of the same rows, and the learning rate is so small that the model stays what
it is: first with a teacher that must read its contexts in every step, as in a first epoch, then with one that has read
them. Prints the median seconds of a step and of its parts.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from measure import alternate

from selfdistill.config import TrainConfig
from selfdistill.data import packaged
from selfdistill.training.trainer import Trainer

NO_TOKEN = -1
"""An end token that is never sampled, so that every completion has the full length."""
MULTIPLY = """
import os, torch
parent, matrix = os.getppid(), torch.randn(512, 512)
torch.set_num_threads(1)
print("ready", flush=True)
while os.getppid() == parent:
    matrix @ matrix
"""
PARTS = ("step", "rollout", "teacher", "student", "update")


class Neighbour:
    """A process that multiplies matrices on one thread, while it is not stopped."""

    def __enter__(self) -> Neighbour:
        self._process = subprocess.Popen([sys.executable, "-c", MULTIPLY], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the neighbour did not start")
        self.works(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def works(self, wanted: bool) -> None:
        """Let it continue, or stop it."""
        os.kill(self._process.pid, signal.SIGCONT if wanted else signal.SIGSTOP)


def make_run(options: argparse.Namespace, folder: str) -> Trainer:
    """A run whose samples all have the full length."""
    run = Trainer(
        TrainConfig(
            model=options.model,
            data=packaged("knowledge.train.jsonl"),
            context="document:repeats=2",
            teacher="frozen",
            output_dir=folder,
            batch_size=options.batch_size,
            max_completion_length=options.tokens,
            max_steps=1,
            learning_rate=1e-12,
            drift_steps=0,
            mixed_precision="no",
        )
    )
    run.loaded = replace(run.loaded, end_token_ids=(NO_TOKEN,))
    return run


def forget(run: Trainer) -> None:
    """Let the teacher read its contexts again."""
    assert run.teacher is not None
    contexts = [row.teacher_ids for row in run.stage.task.examples if row.teacher_ids]
    run.prefix_caches[run.teacher.rule] = run.forward_pass.keep(contexts, run.config.teacher_cache_mib * 2**20)


def compare(run: Trainer, neighbour: Neighbour, steps: int, *, reads: bool) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a step, alone and beside the neighbour."""
    lines: dict[str, list[dict[str, float]]] = {"alone": [], "beside": []}

    def step(name: str) -> Callable[[], None]:
        def go() -> None:
            if reads:
                forget(run)
            neighbour.works(name == "beside")
            lines[name].append(run.step(0))
            neighbour.works(False)

        return go

    alternate({name: step(name) for name in lines}, steps)
    # The first of each only warmed up.
    return {name: {part: median(m[f"time/{part}_s"] for m in own[1:]) for part in PARTS} for name, own in lines.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--model", default="smollm2-135m")
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, medians of {options.steps} steps of {options.batch_size} prompts")
    print("| contexts | part | alone, s | beside a busy neighbour, s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Neighbour() as neighbour:
        run = make_run(options, folder)
        for name, reads in (("read in every step", True), ("kept", False)):
            found = compare(run, neighbour, options.steps, reads=reads)
            for part in PARTS:
                alone, beside = found["alone"][part], found["beside"][part]
                print(f"| {name} | {part} | {alone:.3f} | {beside:.3f} | {beside / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
