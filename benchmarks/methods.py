"""What a step of each method costs: its time, and that before the first step, against SDFT with a frozen teacher.

    python benchmarks/methods.py [--steps 4] [--only METHOD]...

All learn the package's task ``chains`` with 16 samples per step: eight for each of two prompts from a scorer's rewards,
one for each of 16 prompts otherwise. Steps of a method and of SDFT alternate in one process; the learning rate is so
small that the model stays what it is. ``cpt`` is left out, because it reads documents instead. The steps of
``sft_reinvoke`` are those of its second stage; the first is ``sft``. The models of ``npo`` and ``t3s`` are the starter
model, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from typing import Any

from measure import Stepped, alternate, now

from selfdistill.config import TrainConfig
from selfdistill.data import packaged

COMMON: dict[str, Any] = {
    "model": "smollm2-135m",
    "data": packaged("chains.plans.jsonl"),
    "num_demonstrations": 48,
    "context": "turns:repeats=2",
    "scorer": "python:selfdistill.data.bundled.checks.fields",
    "max_completion_length": 40,
    "teacher": "frozen",
    "batch_size": 16,
    "max_steps": 20,
    "learning_rate": 1e-12,
    "drift_steps": 0,
}
GROUPS: dict[str, Any] = {"batch_size": 2, "num_generations": 8}
OTHER: dict[str, Any] = {"teacher_model": "smollm2-135m"}
BASELINE = "sdft"
RUNS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dft": {},
    "eaft": {},
    "t3s": OTHER,
    "sft_reinvoke": {"max_steps": 2},
    "sft_from_teacher": {},
    "offline_distillation": {},
    "ssd": {},
    "opsd": {},
    "vopd": {},
    "isdft": {},
    "veto": {},
    "msd": {},
    "atesd": {},
    "grpo": GROUPS,
    "sdpo": GROUPS,
    "pope": GROUPS | {"num_generations": 4},
    "trapo": GROUPS | {"num_generations": None},
    "actguide": GROUPS,
    "sort": GROUPS,
    "npo": GROUPS | OTHER,
}


class Timed(Stepped):
    """A run with the seconds that it took to begin, the model's loading included."""

    def __init__(self, method: str, settings: dict[str, Any], folder: str) -> None:
        began = now()
        super().__init__(TrainConfig(**COMMON | settings | {"method": method, "output_dir": folder}))
        self.began_s = now() - began


def measured(method: str, steps: int) -> dict[str, float]:
    """Ratios of a step and of what comes before the first one to a step of SDFT; medians, with the tokens scored."""
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as baseline:
        of_baseline = Timed(BASELINE, {}, baseline)
        runs = {method: Timed(method, RUNS[method], own), BASELINE: of_baseline}
        seconds = alternate(runs, steps)
        before = runs[method].began_s - of_baseline.began_s
        return {
            "step": seconds[method] / seconds[BASELINE],
            "before": before / seconds[BASELINE],
            "seconds": seconds[method],
            "tokens": runs[method].tokens(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of each method against one of SDFT.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", action="append", choices=list(RUNS), help="a method; repeatable; default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Timed(BASELINE, {}, folder)  # what a process does once, such as importing, is nobody's
    for method in options.only or RUNS:
        print(json.dumps({"method": method} | measured(method, options.steps)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
