"""What the benchmarks share: alternating timings and peak memory. Linux only (memory is read from /proc; glibc)."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from selfdistill.config import TrainConfig
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
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that a warm-up freed, and the allocator kept, would not count again
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


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


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
