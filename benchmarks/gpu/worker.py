"""The process that runs the checks. Another one, which holds no GPU, starts it, ends it and keeps the results."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from bench import Bench, Found, NotRun, Number

START_S = 90.0
"""How long a process may take to start, with PyTorch, transformers and the GPU."""


class NotStarted(Exception):
    """The process for the checks did not start; the message says why."""


@dataclass
class Result:
    """What became of a check."""

    name: str
    what: str
    outcome: str
    """``passed``, ``failed`` or ``not run``."""
    why: str = ""
    """Why it failed or was not run."""
    seconds: float = 0.0
    numbers: list[Number] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "numbers": [number.row() for number in self.numbers]}


class Worker:
    """A process for checks, started when it is needed and again after it was ended."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._process: Any = None
        self._link: Connection
        self.device: dict[str, Any] = {}
        """The device and the versions."""
        self.checks: list[tuple[str, str, float]] = []
        """Names of the checks, what they are, and what seconds each may take on a GPU."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:  # let it end by itself, if it is not within a check
            self._link.close()
            self._process.join(5)
        self.end()

    def start(self) -> None:
        """Start the process, if there is none.

        Raises:
            NotStarted: there is no GPU, or something cannot be imported.
        """
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._bench))
        self._process.start()
        theirs.close()
        why = f"the process for the checks did not start in {START_S:.0f} s"
        try:
            if self._link.poll(START_S):
                why, self.device, self.checks = self._link.recv()
        except EOFError:
            why = "the process for the checks ended at its start"
        if why:
            self.end()
            raise NotStarted(why)

    def end(self) -> None:
        """End the process, and all that it started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()
        self._process = None

    def run(self, name: str, what: str, limit: float) -> Result:
        """Run a check, and end the process if the check fails or takes longer than ``limit`` seconds."""
        try:
            self.start()
        except NotStarted as error:
            return Result(name, what, "failed", str(error))
        began = time.monotonic()
        result = Result(name, what, "failed", f"stopped after {limit:.0f} s")
        self._link.send((name, limit))
        try:
            for kind, value in self._messages(began + limit):
                if kind == "number":
                    result.numbers.append(value)
                else:
                    result.outcome, result.why = kind, value
        except EOFError:
            result.why = "its process ended"
        result.seconds = time.monotonic() - began
        if result.outcome == "failed":
            self.end()
        wrong = [number for number in result.numbers if not number.passes]
        if result.outcome == "passed" and wrong:
            result.outcome = "failed"
            result.why = "; ".join(f"{number.name} is {number.text()}" for number in wrong)
        return result

    def _messages(self, end: float) -> Iterator[tuple[str, Any]]:
        """What the process says of its check, until it ends or time is up."""
        while self._link.poll(max(0.0, end - time.monotonic())):
            kind, value = self._link.recv()
            yield kind, value
            if kind != "number":
                return


def serve(link: Connection, bench: Bench) -> None:
    """Run the checks that are asked for, one after the other."""
    os.setsid()  # so that all that a check starts can be ended with it
    sys.stdout = sys.stderr
    if not bench.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from checks import CHECKS

        checks = [(check.name, check.what, check.seconds) for check in CHECKS]
        link.send(("", description(bench), checks))
    except Exception as error:
        link.send((reason(error), {}, []))
        return
    by_name = {check.name: check for check in CHECKS}
    while True:
        try:
            name, limit = link.recv()
        except EOFError:
            return
        try:
            by_name[name].run(replace(bench, seconds=limit), Found(lambda number: link.send(("number", number))))
            link.send(("passed", ""))
        except NotRun as error:
            link.send(("not run", str(error)))
        except Exception as error:
            traceback.print_exc()
            link.send(("failed", reason(error)))
        gc.collect()
        if bench.cuda:
            sys.modules["torch"].cuda.empty_cache()


def reason(error: Exception) -> str:
    """The error's last line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def description(bench: Bench) -> dict[str, Any]:
    """The device and the versions.

    Raises:
        NotStarted: there is no GPU, and one is asked for.
    """
    import torch

    if not bench.cuda:
        torch.set_num_threads(1)
    found: dict[str, Any] = {"device": bench.device, "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if bench.cuda:
        if not torch.cuda.is_available():
            raise NotStarted("PyTorch finds no GPU; --device cpu tries the checks with small sizes")
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
        found |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found
