"""What the benchmarks share: alternating timings and peak memory. Linux only (memory is read from /proc)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from selfdistill.config import TrainConfig
from selfdistill.runtime import begin_peak, peak_memory
from selfdistill.training.trainer import Trainer


def now() -> float:
    """The clock in seconds, after the GPU, if one is in use, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int, warm_ups: int = 1) -> dict[str, float]:
    """Median seconds of each function, run in turn ``repeats`` times after the warm-ups: noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_ups + repeats):
        for name, run in runs.items():
            began = now()
            run()
            if repeat >= warm_ups:
                seconds[name].append(now() - began)
    return {name: median(values) for name, values in seconds.items()}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak resident memory of the process while ``run`` runs, above what it had before."""
    cpu = torch.device("cpu")
    begin_peak(cpu)
    before = peak_memory(cpu)
    run()
    return peak_memory(cpu) - before


def peak_tensor_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of the tensors that ``run`` makes, without what the C library keeps between them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    present, peak = 0, 0
    for event in sorted((e for e in events.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


class Stepped:
    """A run that goes on by a step on each call."""

    def __init__(self, config: TrainConfig) -> None:
        self.run = Trainer(config)
        self.metrics: list[dict[str, float]] = []

    def __call__(self) -> None:
        self.metrics.append(self.run.step(len(self.metrics)))

    def tokens(self) -> float:
        """Scored tokens a step, all parts together."""
        return median(line["tokens"] for line in self.metrics)
