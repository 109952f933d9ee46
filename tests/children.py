"""Work in processes of its own, forked, so that it can be killed and does not import everything again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from selfdistill.config.train import TrainConfig
from selfdistill.training.train import train

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


class Child:
    """A forked process that does ``work`` and ends with 0, or with 1 and a traceback in ``log``."""

    def __init__(self, work: Callable[[], object], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for name in WORLD:
                    os.environ.pop(name, None)
                os.environ.update(environment or {})
                AcceleratorState._reset_state(reset_partial_state=True)
                result = work()
                code = result if isinstance(result, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, or minus the number of the signal; the process is killed where it takes too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.kill()
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s: {self.log.read_text()[-2000:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def started_together(work: Callable[[], object], log: Path, count: int = 2) -> list[Child]:
    """``count`` processes that know of each other, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(count):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        children.append(Child(work, log.with_suffix(f".{rank}.log"), numbers | where))
    return children


JOINED = "2 processes, which share every batch"


def train_together(config: TrainConfig, tmp_path: Path, **more: Any) -> None:
    """Train in two processes, to the end."""
    children = started_together(lambda: train(config, **more), tmp_path / Path(config.output_dir).name)
    for child in children:
        assert child.wait() == 0, child.log.read_text()
    said = f"{JOINED} and the weights\n" if config.fsdp else f"{JOINED}\n"
    assert said in children[0].log.read_text()


def second_gets(number: int) -> Callable[[int, Any], None]:
    """For ``on_step``: the second process sends itself a signal after step 3."""

    def on_step(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)

    return on_step
